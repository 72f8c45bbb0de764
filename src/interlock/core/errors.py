"""The errors of the core. Refusals are values (`records.Denied`, `records.StaleFence`); these are not refusals.

    InterlockError
    ├── PolicyError          a policy that cannot be used, with the place where it is wrong
    ├── BrokenInvariant      a bug: something that the core promises does not hold
    ├── NotFound             no such instance, request, image, volume or token (for this caller)
    ├── NameTaken            the name is in use in the project
    ├── KeyReused            an idempotency key came back with a different body
    ├── GenerationMismatch   the caller's If-Match is not the instance's generation
    ├── PolicyMismatch       the caller's If-Match is not the digest of the policy in force
    ├── Invalid              the caller's input is wrong: what, where, and what was expected
    ├── Forbidden            the caller's role may not do this at all
    ├── NoRoom               it does not fit on the host: what it needs, and what is free
    ├── InUse                something else uses it, so it cannot be removed or taken
    ├── StoreError           the store cannot keep or give what was asked
    │   ├── StoreCorrupt
    │   ├── StoreNewer       written by a newer Interlock
    │   ├── StoreBusy        another server holds it
    │   ├── StoreClosed      this server has let go of it
    │   └── StoreFull        the disk is full; nothing was kept
    ├── HypervisorError      the hypervisor did not do what it was asked
    │   ├── Refused          it said no; nothing was changed
    │   ├── NotResponding    it gave no answer in time; the outcome is unknown
    │   ├── NotThere         it holds no such instance
    │   └── Unavailable      it cannot be used on this host at all (not installed, no permission)
    └── Fenced               this worker has lost the right to act

Every message is one sentence for people that says what is wrong; `remedy`, where there is one, says what to do.
"""

from __future__ import annotations


class InterlockError(Exception):
    """Base of every error that Interlock raises on purpose."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class PolicyError(InterlockError):
    """A policy cannot be used; the message opens with file and line where they are known."""


class BrokenInvariant(InterlockError):
    """Something that the core promises does not hold. Always a bug."""


class NotFound(InterlockError):
    """There is no such thing for this caller."""


class NameTaken(InterlockError):
    """The name is in use in the project."""


class KeyReused(InterlockError):
    """An idempotency key came back with a different request."""


class GenerationMismatch(InterlockError):
    """The instance has changed since the generation that the caller named."""


class PolicyMismatch(InterlockError):
    """Another policy is in force than the one that the caller named."""


class Invalid(InterlockError):
    """The caller's input is wrong."""


class Forbidden(InterlockError):
    """The caller's role may not do this at all."""


class InUse(InterlockError):
    """Something else uses it, so it cannot be removed or taken."""


class NoRoom(InterlockError):
    """It does not fit on the host. Nothing was made.

    Args:
        needed: how much more it needs of what there is too little of: `memory_mib`, `vcpus`, `disk_mib`, `devices`
            (places for disks and interfaces in a guest) or `interfaces`.
        free: how much of the same may still be promised.
    """

    def __init__(
        self, message: str, *, needed: dict[str, int], free: dict[str, int], remedy: str | None = None
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.needed = needed
        self.free = free


class StoreError(InterlockError):
    """The store cannot keep or give what was asked."""


class StoreCorrupt(StoreError):
    """What is in the file is not a whole database."""


class StoreNewer(StoreError):
    """The database was written by a newer Interlock."""


class StoreBusy(StoreError):
    """Another server holds the database."""


class StoreClosed(StoreError):
    """This server has let go of the store, and keeps nothing any more."""


class StoreFull(StoreError):
    """There is no room; nothing was kept."""


class HypervisorError(InterlockError):
    """The hypervisor did not do what it was asked."""


class Refused(HypervisorError):
    """The hypervisor said no, and nothing was changed."""


class NotResponding(HypervisorError):
    """The hypervisor gave no answer in time: the outcome is unknown."""


class NotThere(HypervisorError):
    """The hypervisor holds no such instance."""


class Unavailable(HypervisorError):
    """The hypervisor cannot be used on this host at all."""


class Fenced(InterlockError):
    """This worker has lost the right to act on the instance."""
