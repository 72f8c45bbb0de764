"""The transfer of a live migration: the root disk is mirrored over NBD, then the memory is sent.

Both use TCP connections between the hosts, with TLS, which begin with the secret of the endpoint. QEMU has sockets of
this machine only: a socket pair for the memory, and Unix sockets for its NBD client and server. A `Relay` forwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Any, Final

import structlog

from interlock.core.errors import Fenced, GuestNotFound, HypervisorError, OperationRejected
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.command_line import ROOT, node_name
from interlock.hypervisors.qemu.disks import block_jobs
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.memory.guest_memory import BYTES_PER_S_MAX, cancel_migration
from interlock.hypervisors.qemu.migration.connections import OK, PeerTls, connect, explain, read_line, send_line
from interlock.hypervisors.qemu.migration.convergence import THROTTLE, ConvergenceLimit, memory_state
from interlock.hypervisors.qemu.migration.relay import Relay
from interlock.hypervisors.qemu.stall_timeout import copy_stall
from interlock.ports import Permit, Report, TransferReport
from interlock.ports.migration import MigrationEndpoint

_LOG = structlog.get_logger(__name__)
_SECRET_BYTES: Final = 32
_PENDING_MAX: Final = 64
"""How many connections may be open at a time that have not named the secret yet."""
_MIRROR: Final = "away"
"""The block node and the job that mirror the root disk."""
_EXPORT: Final = "root"
_SOCKET: Final = "nbd"
_DISK: Final = "disk"
_MEMORY: Final = "memory"
_FAILED: Final = frozenset({"failed", "cancelled"})
_CAPABILITIES: Final = [
    {"capability": "events", "state": True},
    {"capability": "pause-before-switchover", "state": True},
]
_AUTO_CONVERGE: Final = {"capability": "auto-converge", "state": True}
"""QEMU throttles the vCPUs of a guest that writes faster than its memory is sent, more and more."""
_LATE_BLOCK_ACTIVATE: Final = {"capability": "late-block-activate", "state": True}
"""The target opens and locks shared disks when the guest is run there, and not when it is received: until then either
host may run it."""


# --------------------------------------------------------------------------------------------------------- receiving


class IncomingListener:
    """Accepts the connections of one incoming guest that begin with its secret, until it is closed.

    With `tls` they must come from the host that it names; without, they are not encrypted.
    """

    def __init__(self, guest: Guest, permit: Permit, address: str, tls: PeerTls | None) -> None:
        self._guest = guest
        self._permit = permit
        self._tls = tls
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.create_server((address, 0), family=family)
        self._listening.setblocking(False)
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._relays: list[Relay] = []
        self.endpoint = MigrationEndpoint(host=address, port=self._listening.getsockname()[1], secret=self._secret)
        self._accepting = asyncio.create_task(self._accept(), name=f"accept the migration of {guest.instance_id}")

    def close(self) -> None:
        """Accept no more connections. Those that were accepted end with the processes at their ends."""
        self._accepting.cancel()
        self._listening.close()

    async def abort(self) -> None:
        """Close the accepted connections too: this process ends."""
        self.close()
        for relay in self._relays:
            relay.close()
        tasks = {self._accepting, *self._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listening)
            if len(self._tasks) >= _PENDING_MAX:
                connection.close()
                continue
            connection.setblocking(False)
            task = asyncio.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            # Also if it is cancelled before it has begun; a connection with TLS or of a relay is detached.
            task.add_done_callback(functools.partial(_close, connection))

    async def _serve(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._guest.settings.copy_silence_timeout_ms / 1000):
                outer = await self._secured(connection)
                with contextlib.ExitStack() as held:
                    held.callback(outer.close)
                    secret, _, what = (await read_line(outer)).partition(" ")
                    if secrets.compare_digest(secret.encode(), self._secret.encode()) and what in {_MEMORY, _DISK}:
                        inner = await self._connected(held, what)
                        await send_line(outer, OK)
                        if what == _MEMORY:
                            await self._guest.execute(self._permit, "migrate-incoming", {"uri": f"fd:{_MEMORY}"})
                        held.pop_all()
                        self._relays.append(Relay(inner, outer, f"migrate {what}"))
        except (OSError, TimeoutError) as error:
            # The source finds the connection closed.
            _LOG.warning("migration connection refused", instance=self._guest.instance_id, why=explain(error)[0])
        except (HypervisorError, Fenced) as error:
            _LOG.warning("migration connection refused", instance=self._guest.instance_id, why=error.message)

    async def _secured(self, connection: socket.socket) -> socket.socket:
        if self._tls is not None:
            return await self._tls.secure(connection, server_side=True)
        return socket.socket(fileno=connection.detach())

    async def _connected(self, held: contextlib.ExitStack, what: str) -> socket.socket:
        """Return a socket whose other end QEMU has."""
        if what == _MEMORY:
            inner, theirs = socket.socketpair()
            held.enter_context(inner)
            with theirs:
                await self._guest.execute(self._permit, "getfd", {"fdname": _MEMORY}, attach=theirs.fileno())
        else:
            inner = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            with _inside(self._guest) as folder:
                inner.connect(f"{folder}/{_SOCKET}")
        return inner


async def listen(permit: Permit, guest: Guest, address: str, tls: PeerTls | None, *, disk: bool) -> IncomingListener:
    """Prepare a process that was started to receive a guest. Raises as `Guest.execute`."""
    await guest.execute(permit, "migrate-set-capabilities", {"capabilities": [*_CAPABILITIES, _LATE_BLOCK_ACTIVATE]})
    if disk:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            with _inside(guest) as folder:
                (guest.folder.inside / _SOCKET).unlink(missing_ok=True)
                listening.bind(f"{folder}/{_SOCKET}")
            listening.listen(1)
            await guest.execute(permit, "getfd", {"fdname": _SOCKET}, attach=listening.fileno())
        await guest.execute(permit, "nbd-server-start", {"addr": {"type": "fd", "data": {"str": _SOCKET}}})
        export = {"type": "nbd", "id": _EXPORT, "node-name": node_name(ROOT), "name": _EXPORT, "writable": True}
        await guest.execute(permit, "block-export-add", export)
    return IncomingListener(guest, permit, address, tls)


async def wait_received(guest: Guest) -> None:
    """Wait until the guest is received. Raises as `MigrationPort.await_guest`."""
    stall = copy_stall(guest.settings.memory_stall_timeout_ms, f"Receiving VM {guest.instance_id}")
    with guest.events("MIGRATION") as events:
        while True:
            seen = await guest.query("query-migrate")
            status = seen.get("status", "none")
            if status == "completed":
                return
            if status in _FAILED:
                raise GuestNotFound(f"VM {guest.instance_id} was not received: {status}.")
            stall.note(status)
            await events.next_within(guest.settings.memory_look_interval_ms)


async def run_received(permit: Permit, guest: Guest) -> None:
    """Run the guest that was received."""
    with contextlib.suppress(OperationRejected):
        await guest.execute(permit, "nbd-server-stop")
    await guest.execute(permit, "cont")


# ----------------------------------------------------------------------------------------------------------- sending


async def send(
    permit: Permit,
    guest: Guest,
    endpoint: MigrationEndpoint,
    tls: PeerTls | None,
    report: TransferReport,
    *,
    converge_ms: int,
    disk: bool,
    ran: bool,
) -> None:
    """Send a guest. Raises as `MigrationPort.send_guest`."""
    connections = _Connections(guest, endpoint, tls)
    try:
        if disk:
            await _mirror(permit, guest, connections, _limited(guest, report, converge_ms))
        limit = ConvergenceLimit(converge_ms, f"Sending the memory of VM {guest.instance_id}")
        await _send_memory(permit, guest, connections, report, limit, disk=disk)
    except BaseException as error:
        connections.close(_MEMORY)
        with contextlib.suppress(HypervisorError, Fenced, OSError):
            await resume(permit, guest, ran=ran)
        if isinstance(error, OperationRejected) and connections.failure is not None:
            raise OperationRejected(
                f"{error.message} The connection to {endpoint.host}:{endpoint.port} broke: {connections.failure}.",
                remedy="The VM continues on the source host. Check that the agent of the target host runs, then retry.",
            ) from error
        raise
    finally:
        connections.close(_DISK)


class _Connections:
    """The connections of a guest that is being sent, with their relays."""

    def __init__(self, guest: Guest, endpoint: MigrationEndpoint, tls: PeerTls | None) -> None:
        self._endpoint = endpoint
        self._tls = tls
        self._timeout_s = guest.settings.copy_silence_timeout_ms / 1000
        self._relays: dict[str, Relay] = {}

    async def open(self, what: str) -> socket.socket:
        """Raises as `connections.connect`."""
        return await connect(self._endpoint, what, self._tls, self._timeout_s)

    def relay(self, what: str, inner: socket.socket, outer: socket.socket) -> None:
        self._relays[what] = Relay(inner, outer, f"migrate {what}")

    def close(self, what: str) -> None:
        """Close the connection for that, if it is open. That for the memory ends by itself when all was sent."""
        if what in self._relays:
            self._relays[what].close()

    @property
    def failure(self) -> str | None:
        """Why a connection broke; None if none did."""
        return next((relay.failure for relay in self._relays.values() if relay.failure is not None), None)


def _limited(guest: Guest, report: Report, converge_ms: int) -> Report:
    """Return the report of the mirror of the root disk, which raises `OperationRejected` if it does not converge."""
    limit = ConvergenceLimit(converge_ms, f"Sending the root disk of VM {guest.instance_id}")
    first: list[int] = []

    def limited(done: int, total: int | None = None) -> None:
        if total is not None:
            first[:] = first or [total]
            limit.note(again=done >= first[0] and total > done, standing=f"{total - done} bytes are left")
        report(done, total)

    return limited


async def _mirror(permit: Permit, guest: Guest, connections: _Connections, report: Report) -> None:
    """Mirror the root disk until both are the same; later writes are forwarded until the connection is closed."""
    outer = await connections.open(_DISK)
    try:
        listening = _listen_for_client(guest)
    except BaseException:
        outer.close()
        raise

    def accepted(task: asyncio.Task[tuple[socket.socket, Any]]) -> None:
        listening.close()
        if task.cancelled() or task.exception() is not None:
            outer.close()
        else:
            connections.relay(_DISK, task.result()[0], outer)

    accepting = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listening))
    accepting.add_done_callback(accepted)
    try:
        node = {"driver": "nbd", "node-name": _MIRROR, "server": {"type": "unix", "path": _SOCKET}, "export": _EXPORT}
        await guest.execute(permit, "blockdev-add", node)
    finally:
        accepting.cancel()
    await block_jobs.start(
        guest, permit, "blockdev-mirror", _MIRROR, device=node_name(ROOT), target=_MIRROR, sync="top"
    )
    what = f"Sending the root disk of VM {guest.instance_id}"
    await block_jobs.follow(guest, _MIRROR, what, report, until=block_jobs.READY)


def _listen_for_client(guest: Guest) -> socket.socket:
    """Return the socket to which the NBD client of QEMU connects."""
    path = guest.folder.inside / _SOCKET
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _inside(guest) as folder:
            path.unlink(missing_ok=True)
            listening.bind(f"{folder}/{_SOCKET}")
        path.chmod(0o666)  # QEMU's user connects to it; no other has the folder in view
        listening.listen(1)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


async def _send_memory(
    permit: Permit,
    guest: Guest,
    connections: _Connections,
    report: TransferReport,
    limit: ConvergenceLimit,
    *,
    disk: bool,
) -> None:
    """Send the memory; the guest is paused when this returns."""
    bandwidth = guest.settings.migration_bytes_per_s or BYTES_PER_S_MAX
    await guest.execute(permit, "migrate-set-capabilities", {"capabilities": [*_CAPABILITIES, _AUTO_CONVERGE]})
    await guest.execute(permit, "migrate-set-parameters", {"max-bandwidth": bandwidth, **THROTTLE})
    outer = await connections.open(_MEMORY)
    inner, theirs = socket.socketpair()
    connections.relay(_MEMORY, inner, outer)
    with theirs:
        await guest.execute(permit, "getfd", {"fdname": _MEMORY}, attach=theirs.fileno())
    with guest.events("MIGRATION") as events:
        await guest.execute(permit, "migrate", {"uri": f"fd:{_MEMORY}"})
        stall = copy_stall(guest.settings.memory_stall_timeout_ms, f"Sending the memory of VM {guest.instance_id}")
        while True:
            await events.next_within(guest.settings.memory_look_interval_ms)
            seen = await guest.query("query-migrate")
            memory = memory_state(seen)
            if memory is not None:
                report(memory.done, memory.total, detail=memory.detail, warning=memory.warning)
                stall.note((seen["status"], seen["ram"]["transferred"]))
                runs = seen["status"] == "active" and guest.last_state is PowerState.RUNNING
                limit.note(again=runs and memory.again, standing=memory.standing)
            match seen.get("status"):
                case "pre-switchover":
                    if disk:
                        await _complete_mirror(permit, guest)
                    await guest.execute(permit, "migrate-continue", {"state": "pre-switchover"})
                case "completed":
                    return
                case status if status in _FAILED:
                    raise OperationRejected(
                        f"VM {guest.instance_id} could not be migrated: {seen.get('error-desc', status)}.",
                        remedy="Check that the target host runs and can be reached.",
                    )
                case _:
                    pass


async def _complete_mirror(permit: Permit, guest: Guest) -> None:
    """End the mirror of a paused guest: both disks are the same from now on."""
    job = (await block_jobs.jobs(guest)).get(_MIRROR)
    if job is None or job.error is not None or job.status not in {block_jobs.READY, block_jobs.STANDBY}:
        why = "the job is missing" if job is None else (job.error or f"the job is {job.status}")
        raise OperationRejected(f"The mirror of the root disk of VM {guest.instance_id} has failed: {why}.")
    await guest.execute(permit, "block-job-cancel", {"device": _MIRROR, "force": False})
    what = f"Sending the root disk of VM {guest.instance_id}"
    await block_jobs.follow(guest, _MIRROR, what, lambda _done, _total=None: None)
    await block_jobs.remove(guest, permit, _MIRROR)
    await guest.execute(permit, "blockdev-del", {"node-name": _MIRROR})


async def resume(permit: Permit, guest: Guest, *, ran: bool) -> None:
    """Resume a guest on the source that was being sent, or was sent and has not run on the target."""
    guest.require_process()
    await cancel_migration(permit, guest)
    await block_jobs.remove(guest, permit, _MIRROR)
    nodes = await guest.query("query-named-block-nodes", flat=True)
    if any(node["node-name"] == _MIRROR for node in nodes):
        await guest.execute(permit, "blockdev-del", {"node-name": _MIRROR})
    status = (await guest.query("query-status"))["status"]
    if status == "postmigrate" or (ran and status != "running"):
        await guest.execute(permit, "cont")
        if not ran:
            # QEMU reopens its disks only when the vCPUs run, for however short a time.
            await guest.execute(permit, "stop")


def _close(connection: socket.socket, _task: asyncio.Task[None]) -> None:
    connection.close()


@contextlib.contextmanager
def _inside(guest: Guest) -> Iterator[str]:
    """Return a path of the folder that QEMU runs in that fits into a socket address."""
    descriptor = os.open(guest.folder.inside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
