"""How a guest's owner gets in: passwords."""

from __future__ import annotations

from interlock.core.errors import Refused
from interlock.driver.work import Done, Work


async def set_password(work: Work) -> Done:
    """Have the guest's agent set a user's password.

    Raises:
        Refused: the server was restarted since it was asked, and the password with it forgotten.
    """
    password = work.passwords.of(work.request.id)
    if password is None:
        raise Refused("The password was only kept in memory, and the server was restarted since.", remedy="Ask again.")
    user = str(work.request.parameters["user"])
    await work.hypervisor.set_password(work.permit, work.id, user, password)
    return Done(message=f"The password of {user} is set.")
