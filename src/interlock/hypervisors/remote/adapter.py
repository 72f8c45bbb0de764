"""The hypervisor port, over a connection that an agent makes: the server's side.

Every effect is the agent's (`serving`); this side checks the worker's permit before it sends a call, and the call
carries the fence. While no agent is connected every call is `NotResponding`, which is what it is (law 10).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.errors import Forbidden, InterlockError, NotResponding, NotThere, Unavailable
from interlock.core.records import Disk, Interface, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.remote import files
from interlock.hypervisors.remote.image_calls import ImageCalls
from interlock.hypervisors.remote.session import Session
from interlock.hypervisors.remote.wire import METHODS, VERSION, Exchange, Hello, Refusal, Told, Welcome, failure_of
from interlock.ports import HypervisorEvent, Observation, Permit, Report, Stream
from interlock.ports.hosts import Host, Link
from interlock.ports.travelling import Arrival, Passage


class RemoteHypervisor(ImageCalls):
    """Satisfies `ports.RemoteHost`.

    Args:
        name: the host's.
        lease_ms: for how long a renewal lets the host's guests run, in milliseconds; 0: they need none.
        silence_ms: after how long without a sign of life a connection counts as broken, in milliseconds.
        now_ms: the store's clock, for what is kept of the host.
    """

    def __init__(
        self, name: str, *, lease_ms: int, silence_ms: int, now_ms: Callable[[], int], renewed: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.name = name
        self._lease_ms = lease_ms
        self._silence_s = silence_ms / 1000
        self._now_ms = now_ms
        self._renewed = renewed
        self._listener: Callable[[HypervisorEvent], None] | None = None
        self._session: Session | None = None
        self._serving: asyncio.Task[None] | None = None
        self._linked = asyncio.Event()
        self._last: dict[str, Observation] = {}
        self._heard: tuple[str, int] = ("", 0)

    # ------------------------------------------------------------------------------------------ the connection

    @property
    def linked(self) -> bool:
        return self._linked.is_set()

    @property
    def disk_free_mib(self) -> int | None:
        return None if self._session is None else self._session.disk_free_mib

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

    async def serve(self, link: Link, heard: Callable[[Host], Awaitable[None]]) -> None:
        exchange = Exchange(link)
        greeting = await self._greet(exchange, link)
        if self._serving is not None:
            # Whoever comes later is the one that lives: the agent makes one connection at a time.
            self._serving.cancel()
            await asyncio.wait({self._serving})
        serving = asyncio.create_task(self._converse(exchange, greeting, heard), name=f"the host {self.name}")
        self._serving = serving
        try:
            await asyncio.wait({serving})
        finally:
            serving.cancel()
            await asyncio.wait({serving})
            if self._serving is serving:
                self._serving = None
        if not serving.cancelled() and isinstance(error := serving.exception(), Exception):
            raise error

    async def _greet(self, exchange: Exchange, link: Link) -> Hello:
        async with asyncio.timeout(self._silence_s):
            greeting = await exchange.receive()
        wrong: InterlockError | None = None
        if not isinstance(greeting, Hello) or greeting.version != VERSION:
            wrong = Unavailable(
                "The agent speaks another language than this server.", remedy="Run the same version of both."
            )
        elif greeting.name != self.name:
            wrong = Forbidden(f"The agent calls itself {greeting.name} at the place of {self.name}.")
        if wrong is not None:
            await link.send(msgspec.msgpack.encode(Refusal(failure=failure_of(wrong))))
            await link.close()
            raise wrong
        assert isinstance(greeting, Hello)
        return greeting

    async def _converse(self, exchange: Exchange, greeting: Hello, heard: Callable[[Host], Awaitable[None]]) -> None:
        if self._heard[0] != greeting.log:
            self._heard = (greeting.log, 0)
        exchange.post(Welcome(lease_ms=self._lease_ms))
        caught_up = asyncio.Event()
        session = Session(self.name, exchange, self._tell, caught_up.set)
        running = asyncio.create_task(session.run(), name=f"hear {self.name}")
        watching = asyncio.create_task(self._watch(session), name=f"watch {self.name}")
        beginning = asyncio.create_task(self._begin(session, caught_up, greeting, heard), name=f"meet {self.name}")
        try:
            done, _ = await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ConnectionError:
            pass
        finally:
            if self._session is session:
                self._session = None
                self._linked.clear()
            for task in (running, watching, beginning):
                task.cancel()
            await asyncio.wait({running, watching, beginning})

    async def _begin(
        self, session: Session, caught_up: asyncio.Event, greeting: Hello, heard: Callable[[Host], Awaitable[None]]
    ) -> None:
        await caught_up.wait()
        self._session = session
        self._linked.set()
        now_ms = self._now_ms()
        await heard(
            Host(
                name=self.name,
                joined_at_ms=now_ms,
                last_seen_at_ms=now_ms,
                lease_until_ms=now_ms + self._lease_ms if self._lease_ms else None,
                address=greeting.address,
                shared=greeting.shared,
                limits=greeting.limits,
            )
        )

    async def _watch(self, session: Session) -> None:
        """Return when the agent has been silent for too long."""
        while True:
            session.alive.clear()
            try:
                async with asyncio.timeout(self._silence_s):
                    await session.alive.wait()
            except TimeoutError:
                return
            self._renewed(self.name)

    def _tell(self, told: Told) -> None:
        log, last = self._heard
        if told.number <= last:
            return  # it was heard before the connection broke, and only the word of that was lost
        self._heard = (log, told.number)
        if self._listener is not None:
            self._listener(told.event)

    def superseded(self, instance_id: str, fence: int) -> None:
        if self._session is not None:
            self._session.superseded(instance_id, fence)

    def _there(self) -> Session:
        if self._session is None:
            raise NotResponding(
                f"The host {self.name} is not connected.",
                remedy=f"See that `interlock agent` runs on {self.name} and reaches the server.",
            )
        return self._session

    async def _call(
        self,
        method: str,
        permit: Permit | None,
        instance_id: str,
        *arguments: Any,
        report: Report | None = None,
    ) -> Any:
        answer = METHODS[method].answer
        return await self._there().call(method, instance_id, arguments, answer, permit=permit, report=report)

    # ------------------------------------------------------------------------------------------------- looking

    async def known(self) -> frozenset[str]:
        found: frozenset[str] = await self._there().call("known", "", (), frozenset[str])
        return found

    async def inspect(self, instance_id: str) -> Observation:
        try:
            seen: Observation = await self._call("inspect", None, instance_id)
        except NotResponding:
            last = self._last.get(instance_id, Observation(defined=True, power_state=PowerState.NONE))
            return msgspec.structs.replace(last, responsive=False)
        if seen.defined:
            self._last[instance_id] = seen
        else:
            self._last.pop(instance_id, None)
        return seen

    async def wait_powered_off(self, instance_id: str) -> None:
        await self._call("wait_powered_off", None, instance_id)

    async def agent_answers(self, instance_id: str) -> bool:
        answers: bool = await self._call("agent_answers", None, instance_id)
        return answers

    async def screenshot(self, instance_id: str) -> bytes:
        picture: bytes = await self._call("screenshot", None, instance_id)
        return picture

    async def open_console(self, instance_id: str) -> Stream:
        return await self._stream("open_console", instance_id)

    async def open_display(self, instance_id: str) -> Stream:
        return await self._stream("open_display", instance_id)

    async def _stream(self, method: str, instance_id: str) -> Stream:
        session = self._there()
        return RemoteStream(session, await session.call(method, instance_id, (), int))

    async def console_tail(self, instance_id: str, length: int) -> bytes | None:
        tail: bytes | None = await self._call("console_tail", None, instance_id, length)
        return tail

    # ------------------------------------------------------------------------------------- making and removing

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        await self._send_images(permit, spec)
        await self._call("define", permit, instance_id, spec)

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        await self._call("undefine", permit, instance_id)
        self._last.pop(instance_id, None)

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        await self._call("power_on", permit, instance_id, spec)

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        await self._call("power_off", permit, instance_id)

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        await self._call("press_power_button", permit, instance_id)

    async def reset(self, permit: Permit, instance_id: str) -> None:
        await self._call("reset", permit, instance_id)

    async def pause(self, permit: Permit, instance_id: str) -> None:
        await self._call("pause", permit, instance_id)

    async def unpause(self, permit: Permit, instance_id: str) -> None:
        await self._call("unpause", permit, instance_id)

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        await self._call("ask_shutdown", permit, instance_id)

    async def set_password(self, permit: Permit, instance_id: str, user: str, password: str) -> None:
        await self._call("set_password", permit, instance_id, user, password)

    # ------------------------------------------------------------------------------------ disks and interfaces

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        await self._call("attach_disk", permit, instance_id, disk)

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        await self._call("detach_disk", permit, instance_id, disk_id)

    async def swap_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        await self._call("swap_disk", permit, instance_id, old, new, report=report)

    async def copy_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        await self._call("copy_disk", permit, instance_id, old, new, report=report)

    async def attach_interface(self, permit: Permit, instance_id: str, interface: Interface) -> None:
        await self._call("attach_interface", permit, instance_id, interface)

    async def detach_interface(self, permit: Permit, instance_id: str, interface_id: str) -> None:
        await self._call("detach_interface", permit, instance_id, interface_id)

    # -------------------------------------------------------------------------------------------------- memory

    async def save_memory(self, permit: Permit, instance_id: str, report: Report) -> None:
        await self._call("save_memory", permit, instance_id, report=report)

    async def restore_memory(self, permit: Permit, instance_id: str, spec: Spec, report: Report) -> None:
        await self._call("restore_memory", permit, instance_id, spec, report=report)

    async def forget_memory(self, permit: Permit, instance_id: str) -> None:
        await self._call("forget_memory", permit, instance_id)

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        if await asyncio.to_thread(target.exists):
            return
        session = self._there()
        name = files.target_of(instance_id)
        async with files.spooled(session, permit, name):
            await session.call("dump_memory", instance_id, (), permit=permit, report=report)
            await files.fetch(session, permit, name, target, report)

    # -------------------------------------------------------------------------------------------- the root disk

    async def copy_root_disk(self, permit: Permit, instance_id: str, old: Spec, new: Spec, report: Report) -> None:
        await self._send_images(permit, new)
        await self._call("copy_root_disk", permit, instance_id, old, new, report=report)

    async def root_disk_from(self, permit: Permit, instance_id: str, spec: Spec, source: Path, report: Report) -> None:
        session = self._there()
        name = files.source_of(instance_id)
        async with files.spooled(session, permit, name):
            await files.send(session, permit, name, source, report=report)
            await session.call("root_disk_from", instance_id, (spec,), permit=permit, report=report)

    async def drop_root_disks(self, permit: Permit, instance_id: str, spec: Spec, kept: frozenset[int]) -> None:
        await self._call("drop_root_disks", permit, instance_id, spec, kept)

    async def export_root_disk(
        self, permit: Permit, instance_id: str, spec: Spec, target: Path, report: Report
    ) -> None:
        if await asyncio.to_thread(target.exists):
            return
        session = self._there()
        name = files.target_of(instance_id)
        async with files.spooled(session, permit, name):
            await session.call("export_root_disk", instance_id, (spec,), permit=permit, report=report)
            await files.fetch(session, permit, name, target, report)

    # --------------------------------------------------------------------------------------------- travelling

    async def machine_kind(self, instance_id: str) -> str:
        kind: str = await self._call("machine_kind", None, instance_id)
        return kind

    async def receive_guest(self, permit: Permit, instance_id: str, spec: Spec, machine: str) -> Passage:
        passage: Passage = await self._call("receive_guest", permit, instance_id, spec, machine)
        return passage

    async def send_guest(self, permit: Permit, instance_id: str, passage: Passage, report: Report) -> None:
        await self._call("send_guest", permit, instance_id, passage, report=report)

    async def hurry_guest(self, permit: Permit, instance_id: str) -> None:
        await self._call("hurry_guest", permit, instance_id)

    async def arrival(self, instance_id: str) -> Arrival:
        arrival: Arrival = await self._call("arrival", None, instance_id)
        return arrival

    async def await_guest(self, instance_id: str) -> None:
        await self._call("await_guest", None, instance_id)

    async def take_guest(self, permit: Permit, instance_id: str) -> None:
        await self._call("take_guest", permit, instance_id)

    async def keep_guest(self, permit: Permit, instance_id: str) -> None:
        await self._call("keep_guest", permit, instance_id)


class RemoteStream:
    """Satisfies `ports.Stream`: each read and write is a call."""

    def __init__(self, session: Session, number: int) -> None:
        self._session = session
        self._number = number

    async def read(self) -> bytes:
        try:
            data: bytes = await self._session.call("stream_read", "", (self._number,), bytes)
        except (NotResponding, NotThere):
            return b""
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._session.call("stream_write", "", (self._number, data), None)
        except NotResponding as gone:
            raise NotThere(gone.message, remedy=gone.remedy) from gone

    async def close(self) -> None:
        try:
            await self._session.call("stream_close", "", (self._number,), None)
        except InterlockError:
            return
