"""Who may change the labels of an instance: its tags, its blocked operations and the other settings of its owner."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.core.errors import Forbidden
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Instance
from interlock.core.roles import Role


def check_lock(instance: Instance, role: Role) -> None:
    """Raise `Forbidden` if the instance is locked and the caller is no admin, under every policy.

    Blocked operations and tags restrict others, so that whom a lock binds cannot lift them either.
    """
    if instance.locked_by is None or role.includes(Role.ADMIN):
        return
    above = not role.includes(instance.lock_role)
    raise Forbidden(
        f"Permission denied: the VM {instance.name} is locked by {instance.locked_by}.",
        remedy="Ask an admin to unlock it." if above else f"Unlock it first: `interlock vm unlock {instance.name}`.",
    )


def check_tags(policy: CompiledPolicy, role: Role, before: Iterable[str], after: Iterable[str]) -> None:
    """Raise `Forbidden` if a protected tag is set or removed and the caller is no admin."""
    changed = policy.protected(frozenset(before).symmetric_difference(after))
    if not changed or role.includes(Role.ADMIN):
        return
    names = ", ".join(sorted(changed))
    raise Forbidden(
        f"Permission denied: only an admin may set or remove the tag{'s' if len(changed) > 1 else ''} {names}.",
        remedy=f"Ask an admin, or leave what the policy {policy.policy.name} protects as it is.",
    )
