"""What a hypervisor must be able to do besides, where guests go from it to another host, or come to it, as they run.

At every moment at most one of the two hosts lets the guest run, and which one is the record's to say: a guest that was
sent stands still from then on, and one that was received stands still until somebody lets it run.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol, runtime_checkable

import msgspec

from interlock.core.records import Spec
from interlock.ports.hypervisor import Permit, Report


class Passage(msgspec.Struct, frozen=True, kw_only=True):
    """Where a guest is awaited, once."""

    host: str
    """An address of the host that awaits it."""
    port: int
    secret: str
    """What whoever brings it has to show."""


class Arrival(StrEnum):
    """How it stands with a guest that a host awaited."""

    NONE = "none"
    """None was awaited, or it was let run."""
    AWAITED = "awaited"
    """A machine awaits it, or has it and never let it run."""
    LOST = "lost"
    """The machine that awaited it has ended, and never let it run."""


@runtime_checkable
class Travelling(Protocol):
    """Sends and receives guests."""

    async def machine_kind(self, instance_id: str) -> str:
        """What a machine must be like that takes the guest up, in this hypervisor's own words.

        Raises:
            NotThere: no guest runs.
        """
        ...

    async def receive_guest(self, permit: Permit, instance_id: str, spec: Spec, machine: str) -> Passage:
        """Await a guest: in a machine whose processors stand still until `take_guest`. It must be defined.

        A machine of an earlier attempt that never ran is ended first.

        Raises:
            Refused: a guest runs here, or a machine cannot be made.
        """
        ...

    async def send_guest(self, permit: Permit, instance_id: str, passage: Passage, report: Report) -> None:
        """Send the guest with the content of its root disk; it runs until almost all is there, and stands still then.

        When this returns all of it is there, and it never runs here again unless `keep_guest` says so. Where it fails,
        or its worker is cancelled, the guest goes on here as it was.

        Raises:
            NotThere: no guest runs.
            Refused: it could not be sent.
            NotResponding: nothing moved for too long.
        """
        ...

    async def hurry_guest(self, permit: Permit, instance_id: str) -> None:
        """Have the guest stand still that is being sent, so that it arrives whatever it does."""
        ...

    async def arrival(self, instance_id: str) -> Arrival:
        """How it stands with a guest that was to come here."""
        ...

    async def await_guest(self, instance_id: str) -> None:
        """Return when all of a guest that was sent is here.

        Raises:
            NotThere: the machine that awaited it has ended, or none did.
            Refused: it did not come in time.
        """
        ...

    async def take_guest(self, permit: Permit, instance_id: str) -> None:
        """Let the guest run that has arrived. Does nothing where it runs. Raises `NotThere` if none has arrived."""
        ...

    async def keep_guest(self, permit: Permit, instance_id: str) -> None:
        """Let a guest go on here after all that was sent and has not run elsewhere. Does nothing where none was sent.

        Raises:
            NotThere: no guest is here.
        """
        ...
