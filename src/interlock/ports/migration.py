"""The live-migration port of a hypervisor: source and target side.

At every moment at most one of the two hosts runs the guest, and the record says which: a guest that was sent stays
paused on the source, and one that was received stays paused on the target until it is completed there.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol, runtime_checkable

import msgspec

from interlock.core.records import Spec
from interlock.core.specs import repr_hiding
from interlock.ports.hypervisor import Permit, TransferReport


class MigrationEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint of one incoming migration."""

    __repr__ = repr_hiding("secret")

    host: str
    """Address of the target host."""
    port: int
    secret: str
    """Authenticates the source."""


class IncomingState(StrEnum):
    """The state of an incoming migration."""

    NONE = "none"
    """There is none, or it was completed."""
    AWAITED = "awaited"
    """A QEMU process is waiting for it, or has received it and never run it."""
    LOST = "lost"
    """The QEMU process that was waiting for it has ended, and never ran it."""


@runtime_checkable
class MigrationPort(Protocol):
    """Live migration of guests."""

    async def machine_kind(self, instance_id: str) -> str:
        """Return the machine type that the target must create, in this hypervisor's format.

        Raises:
            GuestNotFound: the guest is not running.
        """
        ...

    async def receive_guest(self, permit: Permit, instance_id: str, spec: Spec, machine: str) -> MigrationEndpoint:
        """As `receive_guest_tls`, without encryption.

        Raises:
            OperationRejected: also if this host's configuration does not allow it.
        """
        ...

    async def receive_guest_tls(
        self, permit: Permit, instance_id: str, spec: Spec, machine: str, source: str
    ) -> MigrationEndpoint:
        """Start a QEMU process that waits for the incoming guest, paused until `complete_incoming`. It must be defined.

        The guest is received over TLS, from the host whose certificate names it `source`. The process of an earlier
        attempt that never ran the guest is ended first.

        Raises:
            OperationRejected: the guest runs here, QEMU cannot be started, or this host has no certificate.
        """
        ...

    async def send_guest(
        self, permit: Permit, instance_id: str, endpoint: MigrationEndpoint, converge_ms: int, report: TransferReport
    ) -> None:
        """As `send_guest_tls`, without encryption.

        Raises:
            OperationRejected: also if this host's configuration does not allow it.
        """
        ...

    async def send_guest_tls(
        self,
        permit: Permit,
        instance_id: str,
        endpoint: MigrationEndpoint,
        target: str,
        converge_ms: int,
        report: TransferReport,
    ) -> None:
        """Migrate the guest with its root disk, over TLS, to the host whose certificate names it `target`.

        It runs until almost everything is transferred, and is paused then.

        A guest that writes faster than it is sent is throttled (auto-converge). `converge_ms` limits the time for
        sending changed memory or disk again after the first pass, in milliseconds; 0: no limit.

        When this returns the guest is on the target, and never runs here again without `resume_source`. On failure or
        cancellation it continues here.

        Raises:
            GuestNotFound: the guest is not running.
            OperationRejected: the migration failed, or does not converge.
            NotResponding: no data was transferred for too long.
        """
        ...

    async def force_converge(self, permit: Permit, instance_id: str) -> None:
        """Pause the guest that is being sent, so that its migration converges."""
        ...

    async def arrival(self, instance_id: str) -> IncomingState:
        """Return the state of the incoming migration."""
        ...

    async def await_guest(self, instance_id: str) -> None:
        """Wait until the incoming guest is received completely.

        Raises:
            GuestNotFound: the QEMU process that waited for it has ended, or there was none.
            OperationRejected: it timed out.
        """
        ...

    async def complete_incoming(self, permit: Permit, instance_id: str) -> None:
        """Run the received guest, unless it runs already. Raises `GuestNotFound` if none was received."""
        ...

    async def resume_source(self, permit: Permit, instance_id: str) -> None:
        """Resume a guest that was sent and has not run on the target; does nothing if none was sent.

        A guest that an abandoned save of its memory left paused is resumed too.

        Raises:
            GuestNotFound: there is no guest.
        """
        ...
