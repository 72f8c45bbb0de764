"""The transfer of a live migration: the root disk is mirrored over NBD, then the memory is sent.

Both use TCP connections between the hosts, which begin with the secret of the endpoint and are not encrypted. The
memory's connection is handed over to QEMU on both sides. The disk's is forwarded here between the network and the NBD
client and server of QEMU, which connect to Unix sockets only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Final

from interlock.core.errors import Fenced, GuestNotFound, HypervisorError, OperationRejected
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.command_line import ROOT, node_name
from interlock.hypervisors.qemu.disks import block_jobs
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.memory.guest_memory import BYTES_PER_S_MAX, cancel_migration
from interlock.hypervisors.qemu.migration.convergence import THROTTLE, ConvergenceLimit, memory_state
from interlock.hypervisors.qemu.stall_timeout import copy_stall
from interlock.ports import Permit, Report, TransferReport
from interlock.ports.migration import MigrationEndpoint

_SECRET_BYTES: Final = 32
_LINE_BYTES_MAX: Final = 200
_CHUNK_BYTES: Final = 1 << 20
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
    """Accepts the connections of one incoming guest that begin with its secret, until it is closed."""

    def __init__(self, guest: Guest, permit: Permit, address: str, *, disk: bool) -> None:
        self._guest = guest
        self._permit = permit
        self._listening = socket.create_server((address, 0))
        self._listening.setblocking(False)
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._disk = disk
        self._tasks: set[asyncio.Task[None]] = set()
        self.endpoint = MigrationEndpoint(host=address, port=self._listening.getsockname()[1], secret=self._secret)
        self._accepting = asyncio.create_task(self._accept(), name=f"accept the migration of {guest.instance_id}")

    def close(self) -> None:
        """Accept no more connections. Those that were accepted end with the processes at their ends."""
        self._accepting.cancel()
        self._listening.close()

    async def abort(self) -> None:
        """Close the accepted connections too: this process ends."""
        self.close()
        tasks = {self._accepting, *self._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listening)
            connection.setblocking(False)
            task = asyncio.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            # Also if it is cancelled before it has begun.
            task.add_done_callback(functools.partial(_close, connection))

    async def _serve(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._guest.settings.copy_silence_timeout_ms / 1000):
                secret, _, what = (await _read_line(connection)).partition(" ")
            if not secrets.compare_digest(secret, self._secret):
                return
            loop = asyncio.get_running_loop()
            if what == _MEMORY:
                await self._guest.execute(self._permit, "getfd", {"fdname": _MEMORY}, attach=connection.fileno())
                await loop.sock_sendall(connection, b"ok\n")
                await self._guest.execute(self._permit, "migrate-incoming", {"uri": f"fd:{_MEMORY}"})
            elif what == _DISK and self._disk:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner:
                    inner.setblocking(False)
                    with _inside(self._guest) as folder:
                        inner.connect(f"{folder}/{_SOCKET}")
                    await loop.sock_sendall(connection, b"ok\n")
                    await _forward(connection, inner)
        except (OSError, TimeoutError, HypervisorError, Fenced):
            return  # the source finds the connection closed


async def listen(permit: Permit, guest: Guest, address: str, *, disk: bool) -> IncomingListener:
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
    return IncomingListener(guest, permit, address, disk=disk)


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
    report: TransferReport,
    *,
    converge_ms: int,
    disk: bool,
    ran: bool,
) -> None:
    """Send a guest. Raises as `MigrationPort.send_guest`."""
    forwarding: asyncio.Task[None] | None = None
    try:
        if disk:
            forwarding = await _mirror(permit, guest, endpoint, _limited(guest, report, converge_ms))
        limit = ConvergenceLimit(converge_ms, f"Sending the memory of VM {guest.instance_id}")
        await _send_memory(permit, guest, endpoint, report, limit, disk=disk)
    except BaseException:
        with contextlib.suppress(HypervisorError, Fenced, OSError):
            await resume(permit, guest, ran=ran)
        raise
    finally:
        if forwarding is not None:
            forwarding.cancel()
            await asyncio.wait({forwarding})


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


async def _mirror(permit: Permit, guest: Guest, endpoint: MigrationEndpoint, report: Report) -> asyncio.Task[None]:
    """Mirror the root disk until both are the same; return the task that forwards later writes."""
    outer = await _connect(guest, endpoint, _DISK)
    path = guest.folder.inside / _SOCKET
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _inside(guest) as folder:
            path.unlink(missing_ok=True)
            listening.bind(f"{folder}/{_SOCKET}")
        path.chmod(0o666)  # QEMU's user connects to it; no other has the folder in view
        listening.listen(1)
        listening.setblocking(False)
        forwarding = asyncio.create_task(
            _forward_from(listening, outer), name=f"forward the disk of {guest.instance_id}"
        )
    except BaseException:
        outer.close()
        listening.close()
        raise
    try:
        server = {"type": "unix", "path": _SOCKET}
        node = {"driver": "nbd", "node-name": _MIRROR, "server": server, "export": _EXPORT}
        await guest.execute(permit, "blockdev-add", node)
        await block_jobs.start(
            guest, permit, "blockdev-mirror", _MIRROR, device=node_name(ROOT), target=_MIRROR, sync="top"
        )
        what = f"Sending the root disk of VM {guest.instance_id}"
        await block_jobs.follow(guest, _MIRROR, what, report, until=block_jobs.READY)
    except BaseException:
        forwarding.cancel()
        raise
    return forwarding


async def _send_memory(
    permit: Permit,
    guest: Guest,
    endpoint: MigrationEndpoint,
    report: TransferReport,
    limit: ConvergenceLimit,
    *,
    disk: bool,
) -> None:
    """Send the memory; the guest is paused when this returns."""
    with await _connect(guest, endpoint, _MEMORY) as connection:
        bandwidth = guest.settings.migration_bytes_per_s or BYTES_PER_S_MAX
        await guest.execute(permit, "migrate-set-capabilities", {"capabilities": [*_CAPABILITIES, _AUTO_CONVERGE]})
        await guest.execute(permit, "migrate-set-parameters", {"max-bandwidth": bandwidth, **THROTTLE})
        await guest.execute(permit, "getfd", {"fdname": _MEMORY}, attach=connection.fileno())
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


# ------------------------------------------------------------------------------------------------------- connections


async def _connect(guest: Guest, endpoint: MigrationEndpoint, what: str) -> socket.socket:
    """Return an authenticated connection to the target. Raises `OperationRejected`."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(guest.settings.copy_silence_timeout_ms / 1000):
            await loop.sock_connect(connection, (endpoint.host, endpoint.port))
            await loop.sock_sendall(connection, f"{endpoint.secret} {what}\n".encode())
            if await _read_line(connection) != "ok":
                raise ConnectionError("it was closed")  # noqa: TRY301 - handled like any other
    except (OSError, TimeoutError) as error:
        connection.close()
        raise OperationRejected(
            f"The target host does not accept VM {guest.instance_id} at {endpoint.host}:{endpoint.port}: {error}.",
            remedy="Check that the hosts can reach each other.",
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _close(connection: socket.socket, _task: asyncio.Task[None]) -> None:
    connection.close()


async def _read_line(connection: socket.socket) -> str:
    """Read one line and no more: QEMU reads what follows."""
    loop, line = asyncio.get_running_loop(), b""
    while not line.endswith(b"\n"):
        byte = await loop.sock_recv(connection, 1)
        if not byte or len(line) > _LINE_BYTES_MAX:
            raise ConnectionError("it was closed")
        line += byte
    return line[:-1].decode("ascii", "replace")


async def _forward_from(listening: socket.socket, outer: socket.socket) -> None:
    """Forward between the client that connects here and the network."""
    with listening, outer:
        inner, _ = await asyncio.get_running_loop().sock_accept(listening)
        inner.setblocking(False)
        with inner, contextlib.suppress(OSError):
            await _forward(inner, outer)


async def _forward(one: socket.socket, other: socket.socket) -> None:
    """Forward bytes both ways until one side ends."""
    directions = {asyncio.create_task(_forward_one_way(one, other)), asyncio.create_task(_forward_one_way(other, one))}
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for direction in directions:
            direction.cancel()
        await asyncio.wait(directions)


async def _forward_one_way(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while chunk := await loop.sock_recv(source, _CHUNK_BYTES):
            await loop.sock_sendall(sink, chunk)


@contextlib.contextmanager
def _inside(guest: Guest) -> Iterator[str]:
    """Return a path of the folder that QEMU runs in that fits into a socket address."""
    descriptor = os.open(guest.folder.inside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
