"""The error tree. Refusals by the policy are values (`records.Denied`, `records.StaleFence`), not errors.

    InterlockError
    ├── PolicyError              invalid policy, with file and line
    ├── BrokenInvariant          a bug: an invariant of the core does not hold
    ├── NotFound                 no such instance, request, image, volume, network, token or project (for this caller)
    ├── NameTaken                the name is in use in the project
    ├── KeyReused                an idempotency key was reused with a different body
    ├── GenerationMismatch       If-Match is not the instance's generation
    ├── PolicyMismatch           If-Match is not the digest of the active policy
    ├── Invalid                  invalid input: which field, its value, and what was expected
    ├── Forbidden                permission denied for the caller's role
    ├── InsufficientCapacity     it does not fit on the host: what it needs, and what is free
    ├── QuotaExceeded            the project may not use so much: what it needs, uses and may use
    ├── InUse                    something else uses it, so it cannot be removed or claimed
    │   └── HostTaken            another agent has the host's name
    ├── StoreError               the store cannot read or write
    │   ├── StoreCorrupt
    │   ├── StoreNewer           written by a newer Interlock
    │   ├── StoreBusy            locked by another server
    │   ├── StoreClosed          closed by this server
    │   └── StoreFull            no space left on device; nothing was written
    ├── HypervisorError          the hypervisor did not perform the call
    │   ├── OperationRejected    it rejected the call; nothing was changed
    │   ├── NotResponding        it timed out; the outcome is unknown
    │   ├── GuestNotFound        no such guest
    │   ├── SystemFailed         a system call failed: permission denied, I/O error, too many open files
    │   │   └── NoSpace          no space left on device, or quota exceeded
    │   └── Unavailable          it cannot be used on this host (not installed, permission denied)
    └── Fenced                   this worker has lost the right to act

Every message is one sentence for people that says what is wrong; `remedy`, where set, says what to do.
"""

from __future__ import annotations


class InterlockError(Exception):
    """Base of every error that Interlock raises on purpose."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class PolicyError(InterlockError):
    """A policy is invalid; the message starts with file and line where they are known."""


class BrokenInvariant(InterlockError):
    """An invariant of the core does not hold. Always a bug."""


class NotFound(InterlockError):
    """It does not exist, or is not visible to this caller."""


def not_found(kind: str, reference: str) -> NotFound:
    """Return the error for a resource that does not exist or is not visible to the caller: the two look the same.

    `kind` is VM, Image, Volume, Network, Security group, Token, Project or Host; the command line has a command of that
    name, with hyphens.
    """
    command = kind.lower().replace(" ", "-")
    return NotFound(f"{kind} not found: {reference[:80]}.", remedy=f"List them with `interlock {command} list`.")


class NameTaken(InterlockError):
    """The name is in use in the project."""


def name_taken(project: str, name: str) -> NameTaken:
    """Return the error for the name of an instance that another one has."""
    return NameTaken(
        f"A VM named {name} already exists in the project {project}.",
        remedy="Choose another name, or delete that one.",
    )


class KeyReused(InterlockError):
    """An idempotency key was reused with a different request."""


class GenerationMismatch(InterlockError):
    """The instance has changed since the generation in If-Match."""


class PolicyMismatch(InterlockError):
    """The active policy is not the one in If-Match."""


class Invalid(InterlockError):
    """The caller's input is invalid."""


class Forbidden(InterlockError):
    """Permission denied for the caller's role."""


class InUse(InterlockError):
    """Something else uses it, so it cannot be removed or claimed."""


class HostTaken(InUse):
    """Another agent has the host's name.

    Args:
        retry_ms: after how many milliseconds the name may be free; None if unknown.
    """

    def __init__(self, message: str, *, remedy: str | None = None, retry_ms: int | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_ms = retry_ms


class InsufficientCapacity(InterlockError):
    """It does not fit on the host. Nothing was created.

    Args:
        needed: the additional amount needed of each scarce resource: `memory_mib`, `vcpus`, `disk_mib`, `devices`
            (slots for disks and interfaces in a guest), `interfaces` or `addresses`.
        free: how much of each can still be allocated.
    """

    def __init__(
        self, message: str, *, needed: dict[str, int], free: dict[str, int], remedy: str | None = None
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.needed = needed
        self.free = free


class QuotaExceeded(InterlockError):
    """The project may not use so much. Nothing was changed.

    Args:
        needed: how much more is needed of each resource of which too little is left (`core.quotas.RESOURCES`).
        used: how much of each is used now.
        limit: how much of each may be used.
        free: how much of each is left.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: dict[str, int],
        used: dict[str, int],
        limit: dict[str, int],
        free: dict[str, int],
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.needed = needed
        self.used = used
        self.limit = limit
        self.free = free


class StoreError(InterlockError):
    """The store cannot read or write."""


class StoreCorrupt(StoreError):
    """The database file is corrupt."""


class StoreNewer(StoreError):
    """The database was written by a newer Interlock."""


class StoreBusy(StoreError):
    """Another server has the database locked."""


class StoreClosed(StoreError):
    """This server has closed the store."""


class StoreFull(StoreError):
    """No space left on device; nothing was written."""


class HypervisorError(InterlockError):
    """The hypervisor did not perform the call."""


class OperationRejected(HypervisorError):
    """The hypervisor rejected the call, and nothing was changed."""


class NotResponding(HypervisorError):
    """The hypervisor timed out: the outcome is unknown."""


class GuestNotFound(HypervisorError):
    """The hypervisor has no such guest."""


class SystemFailed(HypervisorError):
    """A system call failed."""


class NoSpace(SystemFailed):
    """No space left on device, or quota exceeded."""


class Unavailable(HypervisorError):
    """The hypervisor cannot be used on this host."""


class Fenced(InterlockError):
    """This worker has lost the right to act on the instance."""
