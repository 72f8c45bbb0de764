"""A guest's way to another host as it runs: its root disk mirrored there, then its memory, then nothing but its word.

Both go over TCP connections between the hosts, each begun by showing the secret of the passage; what follows is not
encrypted. The memory's connection is handed over to QEMU on both sides. The disk's is carried here, between QEMU's own
NBD on both sides and the network, since QEMU gives no other socket than one it listens on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Final

from interlock.core.errors import Fenced, HypervisorError, NotResponding, NotThere, Refused
from interlock.hypervisors.qemu import block_jobs
from interlock.hypervisors.qemu.command_line import ROOT, node_name
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.process import Account
from interlock.hypervisors.qemu.silence import Silence
from interlock.ports import Permit, Report
from interlock.ports.travelling import Passage

_SECRET_BYTES: Final = 32
_LINE_BYTES_MAX: Final = 200
_PIECE_BYTES: Final = 1 << 20
_AWAY: Final = "away"
"""The node and the job that mirror the root disk."""
_EXPORT: Final = "root"
_SOCKET: Final = "nbd"
_DISK: Final = "disk"
_MEMORY: Final = "memory"
_BYTES_PER_S_MAX: Final = 1 << 40
_BAD_ENDS: Final = frozenset({"failed", "cancelled"})
_CAPABILITIES: Final = [
    {"capability": "events", "state": True},
    {"capability": "pause-before-switchover", "state": True},
]
_DISKS_WHEN_IT_RUNS: Final = {"capability": "late-block-activate", "state": True}
"""Disks that both hosts have are opened for writing, and locked, by who lets the guest run, and not by who awaits it:
while it stands still on both, either may."""


# --------------------------------------------------------------------------------------------------------- receiving


class Awaited:
    """One guest that is awaited: takes the connections that show the secret, until it is closed."""

    def __init__(self, guest: Guest, permit: Permit, address: str, *, disk: bool) -> None:
        self._guest = guest
        self._permit = permit
        self._listening = socket.create_server((address, 0))
        self._listening.setblocking(False)
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._disk = disk
        self._tasks: set[asyncio.Task[None]] = set()
        self.passage = Passage(host=address, port=self._listening.getsockname()[1], secret=self._secret)
        self._accepting = asyncio.create_task(self._accept(), name=f"await {guest.instance_id}")

    def close(self) -> None:
        """Take no more connections; what is carried ends with the processes at its ends."""
        self._accepting.cancel()
        self._listening.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listening)
            connection.setblocking(False)
            task = asyncio.create_task(self._take(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._guest.settings.copy_silence_timeout_ms / 1000):
                secret, _, what = (await _line(connection)).partition(" ")
            if not secrets.compare_digest(secret, self._secret):
                return
            loop = asyncio.get_running_loop()
            if what == _MEMORY:
                await self._guest.tell(self._permit, "getfd", {"fdname": _MEMORY}, attach=connection.fileno())
                await loop.sock_sendall(connection, b"ok\n")
                await self._guest.tell(self._permit, "migrate-incoming", {"uri": f"fd:{_MEMORY}"})
            elif what == _DISK and self._disk:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner:
                    inner.setblocking(False)
                    with _short(self._guest) as folder:
                        inner.connect(f"{folder}/{_SOCKET}")
                    await loop.sock_sendall(connection, b"ok\n")
                    await _carry(connection, inner)
        except (OSError, TimeoutError, HypervisorError, Fenced):
            return  # whoever brings it finds the connection closed
        finally:
            connection.close()


async def prepare(permit: Permit, guest: Guest, address: str, *, disk: bool) -> Awaited:
    """Have a machine that was started to take a guest open its doors. Raises as `Guest.tell`."""
    await guest.tell(permit, "migrate-set-capabilities", {"capabilities": [*_CAPABILITIES, _DISKS_WHEN_IT_RUNS]})
    if disk:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            with _short(guest) as folder:
                (guest.folder.inside / _SOCKET).unlink(missing_ok=True)
                listening.bind(f"{folder}/{_SOCKET}")
            listening.listen(1)
            await guest.tell(permit, "getfd", {"fdname": _SOCKET}, attach=listening.fileno())
        await guest.tell(permit, "nbd-server-start", {"addr": {"type": "fd", "data": {"str": _SOCKET}}})
        export = {"type": "nbd", "id": _EXPORT, "node-name": node_name(ROOT), "name": _EXPORT, "writable": True}
        await guest.tell(permit, "block-export-add", export)
    return Awaited(guest, permit, address, disk=disk)


async def until_whole(guest: Guest) -> None:
    """Return when the guest has arrived. Raises as `Travelling.await_guest`."""
    silence = Silence(guest.settings.memory_stall_timeout_ms, f"Taking up the guest of instance {guest.instance_id}")
    with guest.events("MIGRATION") as told:
        while True:
            seen = await guest.ask("query-migrate")
            status = seen.get("status", "none")
            if status == "completed":
                return
            if status in _BAD_ENDS:
                raise NotThere(f"The guest of instance {guest.instance_id} did not arrive: {status}.")
            silence.note(status)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(guest.settings.memory_look_interval_ms / 1000):
                    if await told.get() is None:
                        raise NotThere(f"What awaited the guest of instance {guest.instance_id} has ended.")


async def let_run(permit: Permit, guest: Guest) -> None:
    """Let the guest run that has arrived."""
    with contextlib.suppress(Refused):
        await guest.tell(permit, "nbd-server-stop")
    await guest.tell(permit, "cont")


# ----------------------------------------------------------------------------------------------------------- sending


async def send(
    permit: Permit, guest: Guest, passage: Passage, report: Report, account: Account | None, *, disk: bool, ran: bool
) -> None:
    """Send a guest. Raises as `Travelling.send_guest`."""
    carrying: asyncio.Task[None] | None = None
    try:
        if disk:
            carrying = await _mirror(permit, guest, passage, report, account)
        await _move(permit, guest, passage, report, disk=disk)
    except BaseException:
        with contextlib.suppress(HypervisorError, Fenced, OSError):
            await go_on(permit, guest, ran=ran)
        raise
    finally:
        if carrying is not None:
            carrying.cancel()
            await asyncio.wait({carrying})


async def _mirror(
    permit: Permit, guest: Guest, passage: Passage, report: Report, account: Account | None
) -> asyncio.Task[None]:
    """Have the root disk mirrored until both are the same; the answer carries what is written from then on."""
    outer = await _call(guest, passage, _DISK)
    place = guest.folder.inside / _SOCKET
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(guest) as folder:
            place.unlink(missing_ok=True)
            listening.bind(f"{folder}/{_SOCKET}")
        if account is not None:
            os.chown(place, account.user_id, account.group_id)
        listening.listen(1)
        listening.setblocking(False)
        carrying = asyncio.create_task(_carry_from(listening, outer), name=f"carry {guest.instance_id}")
    except BaseException:
        outer.close()
        listening.close()
        raise
    try:
        server = {"type": "unix", "path": _SOCKET}
        node = {"driver": "nbd", "node-name": _AWAY, "server": server, "export": _EXPORT}
        await guest.tell(permit, "blockdev-add", node)
        await block_jobs.begin(
            guest, permit, "blockdev-mirror", _AWAY, device=node_name(ROOT), target=_AWAY, sync="top"
        )
        what = f"Sending the root disk of instance {guest.instance_id}"
        await block_jobs.follow(guest, _AWAY, what, report, until=block_jobs.READY)
    except BaseException:
        carrying.cancel()
        raise
    return carrying


async def _move(permit: Permit, guest: Guest, passage: Passage, report: Report, *, disk: bool) -> None:
    """Send the memory; the guest stands still when this returns."""
    with await _call(guest, passage, _MEMORY) as connection:
        await guest.tell(permit, "migrate-set-capabilities", {"capabilities": _CAPABILITIES})
        await guest.tell(permit, "migrate-set-parameters", {"max-bandwidth": _BYTES_PER_S_MAX})
        await guest.tell(permit, "getfd", {"fdname": _MEMORY}, attach=connection.fileno())
    with guest.events("MIGRATION") as told:
        await guest.tell(permit, "migrate", {"uri": f"fd:{_MEMORY}"})
        silence = Silence(guest.settings.memory_stall_timeout_ms, f"Sending the memory of instance {guest.instance_id}")
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(guest.settings.memory_look_interval_ms / 1000):
                    if await told.get() is None:
                        raise NotThere(f"What held instance {guest.instance_id} has ended.")
            seen = await guest.ask("query-migrate")
            memory = seen.get("ram")
            if memory is not None:
                report(memory["total"] - memory["remaining"], memory["total"])
                silence.note((seen["status"], memory["transferred"]))
            match seen.get("status"):
                case "pre-switchover":
                    if disk:
                        await _end_mirror(permit, guest)
                    await guest.tell(permit, "migrate-continue", {"state": "pre-switchover"})
                case "completed":
                    return
                case status if status in _BAD_ENDS:
                    raise Refused(
                        f"The guest of instance {guest.instance_id} could not be sent: "
                        f"{seen.get('error-desc', status)}.",
                        remedy="See that the other host runs and can be reached.",
                    )
                case _:
                    pass


async def _end_mirror(permit: Permit, guest: Guest) -> None:
    """End the mirroring of a guest that stands still: both disks are the same from now on."""
    job = (await block_jobs.jobs(guest)).get(_AWAY)
    if job is None or job.error is not None or job.status != block_jobs.READY:
        raise Refused(f"The root disk of instance {guest.instance_id} is not mirrored any more.")
    await guest.tell(permit, "block-job-cancel", {"device": _AWAY, "force": False})
    what = f"Sending the root disk of instance {guest.instance_id}"
    await block_jobs.follow(guest, _AWAY, what, lambda _done, _total=None: None)
    await block_jobs.end(guest, permit, _AWAY)
    await guest.tell(permit, "blockdev-del", {"node-name": _AWAY})


async def go_on(permit: Permit, guest: Guest, *, ran: bool) -> None:
    """Let a guest go on here that was being sent, or was sent and has not run elsewhere."""
    if guest.process.ended.is_set():
        raise NotThere(f"What held instance {guest.instance_id} has ended.")
    await _end_migration(permit, guest)
    await block_jobs.end(guest, permit, _AWAY)
    nodes = await guest.ask("query-named-block-nodes", flat=True)
    if any(node["node-name"] == _AWAY for node in nodes):
        await guest.tell(permit, "blockdev-del", {"node-name": _AWAY})
    status = (await guest.ask("query-status"))["status"]
    if status == "postmigrate" or (ran and status != "running"):
        await guest.tell(permit, "cont")
        if not ran:
            # QEMU gives its disks back only to a machine that runs, for however short a time.
            await guest.tell(permit, "stop")


async def _end_migration(permit: Permit, guest: Guest) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + guest.settings.memory_stall_timeout_ms / 1000
    with guest.events("MIGRATION") as told:
        while True:
            status = (await guest.ask("query-migrate")).get("status", "none")
            if status in {"none", "completed", *_BAD_ENDS}:
                return
            if status != "cancelling":
                await guest.tell(permit, "migrate_cancel")
            if loop.time() > deadline:
                raise NotResponding(f"QEMU goes on sending the guest of instance {guest.instance_id}.")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(guest.settings.memory_look_interval_ms / 1000):
                    await told.get()


# ------------------------------------------------------------------------------------------------------- connections


async def _call(guest: Guest, passage: Passage, what: str) -> socket.socket:
    """A connection to where the guest is awaited, past the showing of the secret. Raises `Refused`."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in passage.host else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(guest.settings.copy_silence_timeout_ms / 1000):
            await loop.sock_connect(connection, (passage.host, passage.port))
            await loop.sock_sendall(connection, f"{passage.secret} {what}\n".encode())
            if await _line(connection) != "ok":
                raise ConnectionError("it was closed")  # noqa: TRY301 - told like any other
    except (OSError, TimeoutError) as error:
        connection.close()
        raise Refused(
            f"The guest of instance {guest.instance_id} is not awaited at {passage.host}:{passage.port}: {error}.",
            remedy="See that the hosts can reach each other.",
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


async def _line(connection: socket.socket) -> str:
    """One line and not a byte more: what follows is not ours to read."""
    loop, line = asyncio.get_running_loop(), b""
    while not line.endswith(b"\n"):
        byte = await loop.sock_recv(connection, 1)
        if not byte or len(line) > _LINE_BYTES_MAX:
            raise ConnectionError("it was closed")
        line += byte
    return line[:-1].decode("ascii", "replace")


async def _carry_from(listening: socket.socket, outer: socket.socket) -> None:
    """Carry what the one that calls here says, and what it is answered."""
    with listening, outer:
        inner, _ = await asyncio.get_running_loop().sock_accept(listening)
        inner.setblocking(False)
        with inner, contextlib.suppress(OSError):
            await _carry(inner, outer)


async def _carry(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until one side ends."""
    ways = {asyncio.create_task(_carry_one_way(one, other)), asyncio.create_task(_carry_one_way(other, one))}
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)


async def _carry_one_way(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while piece := await loop.sock_recv(source, _PIECE_BYTES):
            await loop.sock_sendall(sink, piece)


@contextlib.contextmanager
def _short(guest: Guest) -> Iterator[str]:
    """A name for the folder that QEMU runs in that fits into the address of a socket."""
    descriptor = os.open(guest.folder.inside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
