"""The roles of callers."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from interlock.core.errors import Invalid


class Role(StrEnum):
    """A caller's role, from the least to the most powerful.

    An admin administers the server: its hosts, policy, public images and projects, and the tokens of every project.
    Instances, volumes and events are limited to the token's project, whatever its role.
    """

    AGENT = "agent"
    """May only connect as a host; it changes no instance."""
    READER = "reader"
    MEMBER = "member"
    PROJECT_ADMIN = "project_admin"
    """May do what a member may, and administers the tokens of its own project."""
    ADMIN = "admin"

    def includes(self, other: Role) -> bool:
        """Return whether a caller with this role may do what one with the other role may."""
        return _RANK[self] >= _RANK[other]


_RANK: Final = {Role.AGENT: 0, Role.READER: 1, Role.MEMBER: 2, Role.PROJECT_ADMIN: 2, Role.ADMIN: 3}


def named_role(name: str) -> Role:
    """Return a role by name. Raises `Invalid`."""
    if name not in _RANK:
        known = ", ".join(sorted(Role))
        raise Invalid(f"Unknown role {name!r:.80}.", remedy=f"The roles are {known}.")
    return Role(name)
