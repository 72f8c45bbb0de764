"""Live migration of QEMU guests: both sides of `ports.migration`. The transfer itself is in `transfer`.

Two marks in an instance's folder survive a crash: `awaited` on the target, until the guest has run there; and `sent` on
the source, from before anything is sent until the guest is resumed there.
"""

from __future__ import annotations

from typing import Final

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.hypervisors.qemu.command_line import Machine
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder, Phase
from interlock.hypervisors.qemu.launch import Launcher
from interlock.hypervisors.qemu.memory import guest_memory
from interlock.hypervisors.qemu.migration import transfer
from interlock.hypervisors.qemu.migration.connections import PeerTls
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.images.atomic_files import drafted, sync_folder
from interlock.ports import Permit, TransferReport
from interlock.ports.migration import IncomingState, MigrationEndpoint

_AWAITED: Final = "awaited"
_SENT: Final = "sent"
_RAN: Final = "ran"
_PAUSED: Final = "stood still"
"""The content of `sent`: the guest's state before it was sent."""


class LiveMigration:
    """Sends and receives guests. See `ports.MigrationPort` for the methods."""

    def __init__(self, registry: ProcessRegistry, launcher: Launcher, certificate: HostCertificate | None) -> None:
        self._registry = registry
        self._certificate = certificate
        self._launcher = launcher
        self._listeners: dict[str, transfer.IncomingListener] = {}

    async def machine_kind(self, instance_id: str) -> str:
        machine = await guest_memory.machine_of_guest(self._registry.require(instance_id))
        return msgspec.json.encode(machine).decode()

    async def receive_guest(self, permit: Permit, instance_id: str, spec: Spec, machine: str) -> MigrationEndpoint:
        self._require_unencrypted()
        return await self._receive(permit, instance_id, spec, machine, None)

    async def receive_guest_tls(
        self, permit: Permit, instance_id: str, spec: Spec, machine: str, source: str
    ) -> MigrationEndpoint:
        return await self._receive(permit, instance_id, spec, machine, self._tls(source))

    def _require_unencrypted(self) -> None:
        if not self._registry.settings.migration_unencrypted:
            raise OperationRejected(
                "This host does not send or receive VMs without encryption.",
                remedy="Upgrade both hosts and the server; or set qemu.migration_unencrypted on each of them.",
            )

    def _tls(self, peer: str) -> PeerTls:
        if self._certificate is None:
            raise OperationRejected("This host has no folder for certificates.")
        self._certificate.settings(server_side=True)  # raises what would otherwise fail later
        return PeerTls(self._certificate, peer)

    async def _receive(
        self, permit: Permit, instance_id: str, spec: Spec, machine: str, tls: PeerTls | None
    ) -> MigrationEndpoint:
        folder = self._registry.folder(instance_id)
        guest = self._registry.find(instance_id)
        if guest is not None:
            if guest.phase is not Phase.STARTING:
                raise OperationRejected(f"VM {instance_id} runs on this host already.")
            await guest.kill(permit)
        self._stop_listening(instance_id)
        _mark(permit, folder, _AWAITED, "")
        guest = await self._launcher.start(permit, instance_id, spec, msgspec.json.decode(machine, type=Machine))
        address = self._registry.settings.migration_address
        listener = await transfer.listen(permit, guest, address, tls, disk=_sends_root(spec))
        self._listeners[instance_id] = listener
        return listener.endpoint

    async def close(self) -> None:
        """Abort the transfers to this host."""
        listeners, self._listeners = tuple(self._listeners.values()), {}
        for listener in listeners:
            await listener.abort()

    def _stop_listening(self, instance_id: str) -> None:
        listener = self._listeners.pop(instance_id, None)
        if listener is not None:
            listener.close()

    async def send_guest(
        self, permit: Permit, instance_id: str, endpoint: MigrationEndpoint, converge_ms: int, report: TransferReport
    ) -> None:
        self._require_unencrypted()
        await self._send(permit, instance_id, endpoint, None, converge_ms, report)

    async def send_guest_tls(
        self,
        permit: Permit,
        instance_id: str,
        endpoint: MigrationEndpoint,
        target: str,
        converge_ms: int,
        report: TransferReport,
    ) -> None:
        await self._send(permit, instance_id, endpoint, self._tls(target), converge_ms, report)

    async def _send(
        self,
        permit: Permit,
        instance_id: str,
        endpoint: MigrationEndpoint,
        tls: PeerTls | None,
        converge_ms: int,
        report: TransferReport,
    ) -> None:
        guest = self._registry.require(instance_id)
        ran = await guest.require_running() is PowerState.RUNNING
        spec = guest.folder.spec()
        _mark(permit, guest.folder, _SENT, _RAN if ran else _PAUSED)
        await transfer.send(
            permit,
            guest,
            endpoint,
            tls,
            report,
            converge_ms=converge_ms,
            disk=spec is not None and _sends_root(spec),
            ran=ran,
        )

    async def force_converge(self, permit: Permit, instance_id: str) -> None:
        await self._registry.require(instance_id).execute(permit, "stop")

    async def arrival(self, instance_id: str) -> IncomingState:
        if not self.is_awaited(instance_id):
            return IncomingState.NONE
        guest = self._registry.find(instance_id)
        return IncomingState.LOST if guest is None or guest.process.ended.is_set() else IncomingState.AWAITED

    async def await_guest(self, instance_id: str) -> None:
        await transfer.wait_received(self._registry.require(instance_id))

    async def complete_incoming(self, permit: Permit, instance_id: str) -> None:
        guest = self._registry.require(instance_id)
        if not self.is_awaited(instance_id) and guest.phase is not Phase.STARTING:
            return
        await transfer.wait_received(guest)
        _unmark(permit, guest.folder, _AWAITED)
        await transfer.run_received(permit, guest)
        self._stop_listening(instance_id)

    async def resume_source(self, permit: Permit, instance_id: str) -> None:
        folder = self._registry.folder(instance_id)
        before = _read(folder, _SENT)
        if before is None:
            guest = self._registry.find(instance_id)
            if guest is not None:
                await guest_memory.resume_unsaved(permit, guest)
            return
        await transfer.resume(permit, self._registry.require(instance_id), ran=before == _RAN)
        _unmark(permit, folder, _SENT)

    def discard(self, permit: Permit, instance_id: str) -> None:
        """Forget what was received and sent: the guest is about to be started anew."""
        self._stop_listening(instance_id)
        folder = self._registry.folder(instance_id)
        for name in (_AWAITED, _SENT):
            if _read(folder, name) is not None:
                _unmark(permit, folder, name)

    def is_awaited(self, instance_id: str) -> bool:
        """Whether the guest is being received, or was and has not run."""
        return _read(self._registry.folder(instance_id), _AWAITED) is not None


def _sends_root(spec: Spec) -> bool:
    """Whether the root disk is sent: both hosts have one in a shared folder."""
    return spec.has_root and spec.shared is None


def _mark(permit: Permit, folder: InstanceFolder, name: str, text: str) -> None:
    with folder.os_errors_rejected():
        permit.check()
        with drafted(folder.path / name) as draft:
            draft.write_text(text)
        sync_folder(folder.path)


def _unmark(permit: Permit, folder: InstanceFolder, name: str) -> None:
    with folder.os_errors_rejected():
        permit.check()
        (folder.path / name).unlink(missing_ok=True)
        sync_folder(folder.path)


def _read(folder: InstanceFolder, name: str) -> str | None:
    try:
        return (folder.path / name).read_text()
    except OSError:
        return None
