"""The hypervisor port, over a connection that an agent makes: the server's side.

Every effect is the agent's (`agent_service`); this side checks the worker's permit before it sends a call, and the call
has the fence. While no agent is connected every call raises `NotResponding` (law 10).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog

from interlock.core.errors import Forbidden, GuestNotFound, InterlockError, NotResponding, Unavailable
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.file_cache import cached_name, source_name, target_name
from interlock.hypervisors.remote.file_transfer import FileTransfers
from interlock.hypervisors.remote.methods import AnswerT, Declared, Forwarded, P, StreamCalls
from interlock.hypervisors.remote.protocol import (
    GuestEventMessage,
    Hello,
    Refusal,
    Welcome,
    agreed_version,
    encode,
    failure_of,
)
from interlock.hypervisors.remote.server_session import ServerSession
from interlock.hypervisors.remote.session_lease import SessionLease
from interlock.ports import Hypervisor, HypervisorEvent, Observation, Permit, Report, Stream
from interlock.ports.hosts import STALL_S, Host, IssuedCertificate, Link, ThreadedLink
from interlock.ports.migration import MigrationPort

_LOG = structlog.get_logger(__name__)
_ANSWER_S: Final = 2.0
"""How long a connected agent may take to respond before another connection of it is accepted instead."""


class RemoteHypervisor:
    """Implements `ports.RemoteHost`.

    Args:
        name: the host's name.
        lease_ms: how long the host's guests may run after a renewal, in milliseconds; 0: no leases.
        silence_ms: after how long without a message a connection counts as broken, in milliseconds.
        now_ms: the store's clock.
        renewed: called with the host's name when its agent has renewed its lease.
        certify: issues a certificate for a host's name and a request; may raise InterlockError, OSError.
    """

    def __init__(
        self,
        name: str,
        *,
        lease_ms: int,
        silence_ms: int,
        now_ms: Callable[[], int],
        renewed: Callable[[str], None],
        certify: Callable[[str, str], IssuedCertificate] | None = None,
    ) -> None:
        self.name = name
        self.certificate_name: str | None = None
        self._certify = certify
        self._former: frozenset[str] = frozenset()
        self._lease_ms = lease_ms
        self._silence_s = silence_ms / 1000
        self._now_ms = now_ms
        self._renewed = renewed
        self._listener: Callable[[HypervisorEvent], None] | None = None
        self._files = FileTransfers(self._connected)
        self._session: ServerSession | None = None
        """The session that accepts calls: the agent has delivered its earlier events."""
        self._admitted: ServerSession | None = None
        """The session of the admitted agent, from its admission on."""
        self._lease = SessionLease()
        """Of the last session. It is kept after the end of that, as its last renewal still counts."""
        self._admitting = asyncio.Lock()
        self._serving: asyncio.Task[None] | None = None
        self._linked = asyncio.Event()
        self._last: dict[str, Observation] = {}
        self._last_event: tuple[str, int] = ("", 0)
        """Id of the agent's event log, and the number of its last event that was received."""

    # ------------------------------------------------------------------------------------------ the connection

    @property
    def linked(self) -> bool:
        return self._linked.is_set()

    @property
    def disk_free_mib(self) -> int | None:
        return None if self._session is None else self._session.disk_free_mib

    @property
    def renewed_s(self) -> float:
        return self._lease.renewed_s

    def end_lease(self, unless_after_s: float | None = None) -> bool:
        return self._lease.end(unless_after_s)

    def resume_lease(self) -> None:
        if self._serving is not None:
            self._lease.resume()

    async def until_linked(self) -> None:
        """Return as soon as the agent is connected."""
        await self._linked.wait()

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        self._listener = listener

    async def close(self) -> None:
        self._listener = None
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait({self._serving})

    async def serve(
        self, link: Link, admit: Callable[[Host], Awaitable[None]], on_connected: Callable[[Host], Awaitable[None]]
    ) -> None:
        exchange = Exchange(link)
        greeting, version = await self._greet(exchange, link)
        async with self._admitting:
            try:
                await admit(self._host_of(greeting))
            except InterlockError as refusal:
                await self._refuse(link, refusal)
                raise
            if self._serving is not None:
                # Only what the same agent has left behind: `admit` refuses another one while this one answers.
                self._serving.cancel()
                await asyncio.wait({self._serving})
            if self._last_event[0] != greeting.log:
                self._last_event = (greeting.log, 0)
                self._last.clear()
            lease = self._lease = SessionLease()
            if isinstance(link, ThreadedLink):
                link.reply_at_once(lease.reply)
            renew = partial(_renewed_here, lease, threaded=isinstance(link, ThreadedLink))
            certify = partial(self._certificate, greeting.name)
            certificate = certify(greeting.certificate_request)
            self.certificate_name = None if certificate is None else greeting.name
            exchange.post(Welcome(lease_ms=self._lease_ms, version=version, certificate=certificate))
            caught_up = asyncio.Event()
            # Already here, so that the next agent to be admitted finds this one.
            session = ServerSession(self.name, exchange, version, self._on_event, caught_up.set, renew, certify)
            self._admitted = session
            conversing = self._converse(session, caught_up, greeting, on_connected)
            serving = self._serving = asyncio.create_task(conversing, name=f"the host {self.name}")
        try:
            await asyncio.wait({serving})
        finally:
            lease.end()
            serving.cancel()
            await asyncio.wait({serving})
            if self._serving is serving:
                self._serving = None
            if self._admitted is session:
                self._admitted = None
            with contextlib.suppress(ConnectionError):
                await link.close()  # also where it was replaced before it had begun
        if not serving.cancelled() and isinstance(error := serving.exception(), Exception):
            raise error

    async def _greet(self, exchange: Exchange, link: Link) -> tuple[Hello, int]:
        """Return the agent's greeting and the version of the protocol that both speak."""
        async with asyncio.timeout(self._silence_s):
            greeting = await exchange.receive()
        if not isinstance(greeting, Hello):
            raise ConnectionError(f"unexpected message: {type(greeting).__name__}")
        try:
            version = agreed_version(greeting, self.name)
            if greeting.identity is None:
                raise Unavailable(f"The agent of the host {self.name} has no identity.", remedy="Upgrade the agent.")
            if greeting.name not in {self.name, *self._former}:
                raise Forbidden(f"The agent's host name is {greeting.name}, and the connection is for {self.name}.")
        except InterlockError as error:
            await self._refuse(link, error)
            raise
        return greeting, version

    async def _refuse(self, link: Link, error: InterlockError) -> None:
        with contextlib.suppress(ConnectionError):
            await link.send(encode(Refusal(failure=failure_of(error))))
            await link.close()

    def _certificate(self, name: str, request: str | None) -> IssuedCertificate | None:
        """Return the certificate for the name under which the agent runs, which may be a former one of the host."""
        if request is None or self._certify is None:
            return None
        try:
            issued = self._certify(name, request)
        except (InterlockError, OSError) as error:
            _LOG.warning("host certificate not issued", host=name, why=str(error))
            return None
        _LOG.info("host certificate issued", host=name)
        return issued

    def _host_of(self, greeting: Hello) -> Host:
        now_ms = self._now_ms()
        return Host(
            name=self.name,
            identity=greeting.identity,
            former=greeting.name if greeting.name != self.name else None,
            joined_at_ms=now_ms,
            last_seen_at_ms=now_ms,
            lease_until_ms=now_ms + self._lease_ms if self._lease_ms else None,
            address=greeting.address,
            shared=greeting.shared,
            limits=greeting.limits,
            protections=greeting.protections,
            networks=greeting.networks,
        )

    def rename(self, name: str, former: frozenset[str]) -> None:
        self.name, self._former = name, former

    async def answers(self) -> bool:
        return self._admitted is not None and await self._admitted.answers(_ANSWER_S)

    def disconnect(self) -> None:
        if self._serving is not None:
            self._serving.cancel()

    async def _converse(
        self,
        session: ServerSession,
        caught_up: asyncio.Event,
        greeting: Hello,
        on_connected: Callable[[Host], Awaitable[None]],
    ) -> None:
        running = asyncio.create_task(session.run(), name=f"session with {self.name}")
        watching = asyncio.create_task(self._watch(session), name=f"watch {self.name}")
        begin = self._begin(session, caught_up, greeting, on_connected)
        beginning = asyncio.create_task(begin, name=f"begin with {self.name}")
        try:
            done, _ = await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ConnectionError as error:
            _LOG.info("agent disconnected", host=self.name, why=str(error))
        finally:
            if self._session is session:
                self._session = None
                self._linked.clear()
            for task in (running, watching, beginning):
                task.cancel()
            await asyncio.wait({running, watching, beginning})

    async def _begin(
        self,
        session: ServerSession,
        caught_up: asyncio.Event,
        greeting: Hello,
        on_connected: Callable[[Host], Awaitable[None]],
    ) -> None:
        await caught_up.wait()
        self._session = session
        self._linked.set()
        _LOG.info("agent accepts calls", host=self.name, protocol=session.version)
        await on_connected(self._host_of(greeting))

    async def _watch(self, session: ServerSession) -> None:
        """Return when the agent has sent nothing for too long."""
        loop = asyncio.get_running_loop()
        while True:
            session.alive.clear()
            deadline_s = loop.time() + self._silence_s
            try:
                async with asyncio.timeout_at(deadline_s):
                    await session.alive.wait()
            except TimeoutError:
                if loop.time() - deadline_s < STALL_S and loop.time() - self.renewed_s > self._silence_s:
                    return
                # The server was busy: what the agent has sent meanwhile is received next.
                continue
            self._renewed(self.name)

    def _on_event(self, message: GuestEventMessage) -> None:
        log, last = self._last_event
        if message.number <= last:
            return  # received before the connection broke, and only its acknowledgement was lost
        self._last_event = (log, message.number)
        if self._listener is not None:
            self._listener(message.event)

    def superseded(self, instance_id: str, fence: int) -> None:
        if self._session is not None:
            self._session.superseded(instance_id, fence)

    def _connected(self) -> ServerSession:
        if self._session is None:
            raise NotResponding(
                f"The host {self.name} is not connected.",
                remedy=f"See that `interlock agent` runs on {self.name} and reaches the server.",
            )
        return self._session

    async def call(self, declared: Declared[P, AnswerT], *args: P.args, **kwargs: P.kwargs) -> AnswerT:
        """As `ServerSession.call`, on the session of the connected agent."""
        return await self._connected().call(declared, *args, **kwargs)

    # ------------------------------------------------------------------------------------------- one call each

    known = Forwarded(Hypervisor.known)
    wait_powered_off = Forwarded(Hypervisor.wait_powered_off)
    power_on = Forwarded(Hypervisor.power_on)
    power_off = Forwarded(Hypervisor.power_off)
    press_power_button = Forwarded(Hypervisor.press_power_button)
    reset = Forwarded(Hypervisor.reset)
    pause = Forwarded(Hypervisor.pause)
    unpause = Forwarded(Hypervisor.unpause)
    attach_disk = Forwarded(Hypervisor.attach_disk)
    detach_disk = Forwarded(Hypervisor.detach_disk)
    swap_disk = Forwarded(Hypervisor.swap_disk)
    copy_disk = Forwarded(Hypervisor.copy_disk)
    attach_interface = Forwarded(Hypervisor.attach_interface)
    update_interface = Forwarded(Hypervisor.update_interface)
    detach_interface = Forwarded(Hypervisor.detach_interface)
    save_memory = Forwarded(Hypervisor.save_memory)
    restore_memory = Forwarded(Hypervisor.restore_memory)
    forget_memory = Forwarded(Hypervisor.forget_memory)
    drop_root_disks = Forwarded(Hypervisor.drop_root_disks)
    agent_answers = Forwarded(Hypervisor.agent_answers)
    agent_interfaces = Forwarded(Hypervisor.agent_interfaces)
    ask_shutdown = Forwarded(Hypervisor.ask_shutdown)
    set_password = Forwarded(Hypervisor.set_password)
    screenshot = Forwarded(Hypervisor.screenshot)
    console_tail = Forwarded(Hypervisor.console_tail)
    machine_kind = Forwarded(MigrationPort.machine_kind)
    receive_guest = Forwarded(MigrationPort.receive_guest)
    receive_guest_tls = Forwarded(MigrationPort.receive_guest_tls)
    send_guest = Forwarded(MigrationPort.send_guest)
    send_guest_tls = Forwarded(MigrationPort.send_guest_tls)
    force_converge = Forwarded(MigrationPort.force_converge)
    arrival = Forwarded(MigrationPort.arrival)
    await_guest = Forwarded(MigrationPort.await_guest)
    complete_incoming = Forwarded(MigrationPort.complete_incoming)
    resume_source = Forwarded(MigrationPort.resume_source)

    # ------------------------------------------------------------------------------------------------- others

    async def inspect(self, instance_id: str) -> Observation:
        try:
            seen = await self.call(Hypervisor.inspect, instance_id)
        except NotResponding:
            last = self._last.get(instance_id, Observation(defined=True, power_state=PowerState.NONE))
            return msgspec.structs.replace(last, responsive=False)
        if seen.defined:
            self._last[instance_id] = seen
        else:
            self._last.pop(instance_id, None)
        return seen

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        await self._files.send_images(permit, spec)
        await self.call(Hypervisor.define, permit, instance_id, spec)

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        await self.call(Hypervisor.undefine, permit, instance_id)
        self._last.pop(instance_id, None)

    async def open_console(self, instance_id: str) -> Stream:
        session = self._connected()
        return RemoteStream(session, await session.call(StreamCalls.open_console, instance_id))

    async def open_display(self, instance_id: str) -> Stream:
        session = self._connected()
        return RemoteStream(session, await session.call(StreamCalls.open_display, instance_id))

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        if await asyncio.to_thread(target.exists):
            return
        name = target_name(instance_id)
        async with self._files.spooled(permit, name) as session:
            await session.call(Hypervisor.dump_memory, permit, instance_id, target, report)
            await self._files.fetch(session, permit, name, target, report)

    async def copy_root_disk(self, permit: Permit, instance_id: str, old: Spec, new: Spec, report: Report) -> None:
        await self._files.send_images(permit, new)
        await self.call(Hypervisor.copy_root_disk, permit, instance_id, old, new, report)

    async def root_disk_from(self, permit: Permit, instance_id: str, spec: Spec, source: Path, report: Report) -> None:
        name = source_name(instance_id)
        async with self._files.spooled(permit, name) as session:
            await self._files.send(session, permit, name, source, report=report)
            await session.call(Hypervisor.root_disk_from, permit, instance_id, spec, source, report)

    async def export_root_disk(
        self, permit: Permit, instance_id: str, spec: Spec, target: Path, report: Report
    ) -> None:
        if await asyncio.to_thread(target.exists):
            return
        name = target_name(instance_id)
        async with self._files.spooled(permit, name) as session:
            await session.call(Hypervisor.export_root_disk, permit, instance_id, spec, target, report)
            await self._files.fetch(session, permit, name, target, report)

    # -------------------------------------------------------------------------------------------------- files

    def copy_name(self, path: str) -> str:
        return cached_name(path)

    async def image_copies(self) -> dict[str, int]:
        return await self._files.image_copies()

    async def drop_image_copies(self, names: Collection[str]) -> tuple[str, ...]:
        return await self._files.drop_image_copies(names)

    def outgoing_file(self, transfer: str) -> Path:
        return self._files.outgoing(transfer)

    async def receive_range(self, transfer: str, offset: int, chunks: AsyncIterator[bytes]) -> None:
        await self._files.receive(transfer, offset, chunks)


def _renewed_here(lease: SessionLease, *, threaded: bool) -> bool:
    """Grant a renewal that was received by the event loop, unless the thread of its connection has done so."""
    return not threaded and lease.renew(asyncio.get_running_loop().time())


class RemoteStream:
    """Implements `ports.Stream`: each read and write is a call."""

    def __init__(self, session: ServerSession, number: int) -> None:
        self._session = session
        self._number = number

    async def read(self) -> bytes:
        try:
            return await self._session.call(StreamCalls.stream_read, self._number)
        except (NotResponding, GuestNotFound):
            return b""

    async def write(self, data: bytes) -> None:
        try:
            await self._session.call(StreamCalls.stream_write, self._number, data)
        except NotResponding as gone:
            raise GuestNotFound(gone.message, remedy=gone.remedy) from gone

    async def close(self) -> None:
        with contextlib.suppress(InterlockError):
            await self._session.call(StreamCalls.stream_close, self._number)
