"""Set a user's password in a guest."""

from __future__ import annotations

from interlock.core.errors import OperationRejected
from interlock.driver.operation_context import Done, OperationContext


async def set_password(work: OperationContext) -> Done:
    """Set the password through the guest agent.

    Raises:
        OperationRejected: the password was lost, because the server was restarted since the submission.
    """
    password = work.passwords.of(work.request.id)
    if password is None:
        raise OperationRejected(
            "The password was lost: it is kept in memory only, and the server was restarted.", remedy="Set it again."
        )
    user = str(work.request.parameters["user"])
    await work.hypervisor.set_password(work.permit, work.id, user, password)
    return Done(message=f"The password of {user} is set.")
