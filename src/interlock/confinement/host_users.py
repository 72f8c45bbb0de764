"""Users of VMs: a range of user ids of the host, of which each running VM has one to itself.

A user is claimed by locking (flock) its file in a folder that all servers and agents of the machine share. The process
of the VM inherits the lock, so that the claim ends when the process does, whatever becomes of the server. A process
could unlock the file that it inherited: so a user with any process is not given away either. No file belongs to a VM's
user, so that nothing of a VM is left when its process has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from interlock.confinement.sandbox import Account, nobody
from interlock.core.errors import OperationRejected

CLAIMS: Final = Path("/run/interlock/users")
_MAP: Final = Path("/proc/self/uid_map")
_GROUP_MAP: Final = Path("/proc/self/gid_map")


class UserClaim(msgspec.Struct, frozen=True, kw_only=True):
    """A claimed user."""

    user_id: int
    """Also the id of its group."""
    descriptor: int
    """The lock: the claim lasts until the last copy of it is closed."""


class HostUsers:
    """The users of VMs on this machine.

    Args:
        first: the first user id.
        count: how many there are.
        claims: the folder of the locks.
    """

    def __init__(self, first: int, count: int, claims: Path = CLAIMS) -> None:
        self.first = first
        self.count = count
        self._claims = claims

    def unusable(self) -> str:
        """Return why these users cannot be used on this host, for people; empty if they can."""
        if not (_maps(_MAP, self.first, self.count) and _maps(_GROUP_MAP, self.first, self.count)):
            return f"user ids {self.first} to {self.first + self.count - 1} do not exist in this container"
        try:
            self._claims.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            return f"{self._claims} cannot be created: {error.strerror}"
        return ""

    def claim(self, instance_id: str) -> UserClaim:
        """Claim a user for an instance: the same as before, if it is free.

        Raises:
            OperationRejected: all users are in use.
            OSError: the claim cannot be written.
        """
        start = int.from_bytes(hashlib.sha256(instance_id.encode()).digest()[:8])
        for number in range(self.count):
            user_id = self.first + (start + number) % self.count
            descriptor = self._lock(user_id)
            if descriptor is not None:
                return UserClaim(user_id=user_id, descriptor=descriptor)
        raise OperationRejected(
            f"All {self.count} users of VMs are in use on this host, from {self.first} on.",
            remedy="Stop a VM, or raise qemu.users_max.",
        )

    def _lock(self, user_id: int) -> int | None:
        """Return the locked descriptor of a user, or None if the user is in use."""
        descriptor = os.open(self._claims / str(user_id), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _has_process(user_id):
                return descriptor
        os.close(descriptor)
        return None


@contextlib.contextmanager
def temporary_user(users: HostUsers | None, name: str) -> Iterator[Account | None]:
    """Claim a user for the block.

    Args:
        users: the users of this host; None: `nobody` is used.
        name: what it is for.

    Yields:
        An unprivileged account; None if this process is not root. Raises as `HostUsers.claim`.
    """
    if os.geteuid() != 0:
        yield None
    elif users is None or users.unusable():
        yield nobody()
    else:
        claim = users.claim(name)
        try:
            yield Account(user_id=claim.user_id, group_id=claim.user_id)
        finally:
            os.close(claim.descriptor)


def _has_process(user_id: int) -> bool:
    try:
        os.getpriority(os.PRIO_USER, user_id)
    except ProcessLookupError:
        return False
    return True


def _maps(path: Path, first: int, count: int) -> bool:
    """Whether ids exist in this process's user namespace."""
    for line in path.read_text(encoding="ascii").splitlines():
        start, _, length = map(int, line.split())
        if start <= first and first + count <= start + length:
            return True
    return False
