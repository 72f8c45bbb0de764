"""The agent's side: the calls of the server carried out on the hypervisor of this host.

A call that the connection leaves behind is cancelled, as the end of a server cancels what it was doing: who comes next
performs it again from what is there. What a guest does is kept until the server has heard it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from interlock.core.errors import InterlockError, NotThere, Refused
from interlock.core.records import Disk, Spec
from interlock.hypervisors.remote.event_log import EventLog
from interlock.hypervisors.remote.fences import Fences, HeldPermit
from interlock.hypervisors.remote.files import Shelf, source_of, target_of
from interlock.hypervisors.remote.wire import (
    METHODS,
    Answer,
    Call,
    Cancel,
    CaughtUp,
    Exchange,
    Failure,
    Heard,
    Hello,
    Message,
    Moved,
    Refusal,
    Renewed,
    Superseded,
    Told,
    Welcome,
    error_of,
    failure_of,
    packed,
)
from interlock.ports import Hypervisor, HypervisorEvent, Permit, Stream
from interlock.ports.hosts import Limits, Link

_LOG = structlog.get_logger(__name__)
_NOTHING: Final = packed(None)


def _freely() -> None:
    """A host that holds its guests without a lease may always do so."""


class HostService:
    """Serves one server after the other with the guests of this host.

    Args:
        name: of this host.
        hypervisor: what holds the guests.
        folder: where the agent keeps what is its own.
        shared: a folder that this host has in common with the server, under the same name.
        limits: tells what may be promised of this host; asked each time a server is greeted.
        boots_from: finds the files of images that guests here need, in a thread; may raise as `images_in_use`.
        reaches: whether a volume's file can be used here; by default those in `shared`.
        may_hold: raises if this host may hold no guests now.
    """

    def __init__(
        self,
        name: str,
        hypervisor: Hypervisor,
        folder: Path,
        *,
        shared: Path | None = None,
        address: str | None = None,
        limits: Callable[[], Limits] = Limits,
        boots_from: Callable[[], Collection[str]] = frozenset,
        reaches: Callable[[str], bool] | None = None,
        may_hold: Callable[[], None] = _freely,
    ) -> None:
        self._name = name
        self._hypervisor = hypervisor
        self._shared = shared
        self._address = address
        self._limits = limits
        self._boots_from = boots_from
        self._shelf = Shelf(folder, shared)
        self._reaches = reaches or self._shelf.reaches
        self._may_hold = may_hold
        self._log = EventLog(folder / "events.jsonl")
        self._fences = Fences(folder / "fences")
        self._exchange: Exchange | None = None
        self._calls: dict[int, asyncio.Task[Answer]] = {}
        self._permits: dict[int, HeldPermit] = {}
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)

    async def open(self) -> None:
        """Take charge of the host's guests. Raises `Unavailable`."""
        self._shelf.open()
        self._fences.open()
        self._log.open()
        await self._hypervisor.open(self._hear)

    async def close(self) -> None:
        """Let go of the guests without disturbing them."""
        await self._hypervisor.close()

    def _hear(self, event: HypervisorEvent) -> None:
        told = self._log.add(Told(number=0, event=event))
        if self._exchange is not None:
            self._exchange.post(told)

    async def run(
        self, link: Link, welcomed: Callable[[Exchange, Welcome], None], renewed: Callable[[int], None]
    ) -> None:
        """Serve the server at the other end of the connection until that ends.

        Args:
            link: the connection.
            welcomed: told once the server has agreed; may post on the exchange from then on.
            renewed: told the number of each renewal that was granted.

        Raises:
            ConnectionError: it has ended.
            InterlockError: the server does not want this agent, and why.
        """
        exchange = Exchange(link)
        await link.send(
            msgspec.msgpack.encode(
                Hello(
                    name=self._name,
                    log=self._log.id,
                    address=self._address,
                    shared=None if self._shared is None else str(self._shared),
                    limits=self._limits(),
                )
            )
        )
        answer = await exchange.receive()
        if isinstance(answer, Refusal):
            raise error_of(answer.failure)
        if not isinstance(answer, Welcome):
            raise ConnectionError(f"the server sent a {type(answer).__name__}")
        for told in self._log.waiting():
            exchange.post(told)
        exchange.post(CaughtUp())
        self._exchange = exchange
        self._shelf.clear()  # a piece that was being written as the connection ended may have come later
        welcomed(exchange, answer)
        try:
            await exchange.run(lambda message: self._heed(exchange, message, renewed))
        finally:
            self._exchange = None
            await self._let_go()

    async def _let_go(self) -> None:
        """Have what the connection left behind come to rest."""
        for permit in self._permits.values():
            permit.revoke()
        tasks = tuple(self._calls.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for stream in tuple(self._streams.values()):
            await stream.close()
        self._streams.clear()
        self._shelf.clear()

    def _heed(self, exchange: Exchange, message: Message, renewed: Callable[[int], None]) -> None:
        match message:
            case Call():
                task = asyncio.create_task(self._answer(message, exchange), name=f"{message.method} for the server")
                self._calls[message.number] = task
                task.add_done_callback(lambda task: self._come_to_rest(exchange, message.number, task))
            case Cancel():
                if message.number in self._permits:
                    self._permits[message.number].revoke()
                if message.number in self._calls:
                    self._calls[message.number].cancel()
            case Heard():
                self._log.heard(message.number)
            case Renewed():
                renewed(message.number)
            case Superseded():
                self._fences.see(message.instance_id, message.fence)
            case _:
                raise ConnectionError(f"the server sent a {type(message).__name__}")

    # --------------------------------------------------------------------------------------------------- calls

    async def _answer(self, call: Call, exchange: Exchange) -> Answer:
        """Carry a call out; the answer, whatever became of it."""
        value, failure = _NOTHING, None
        try:
            value = packed(await self._carry_out(exchange, call))
        except InterlockError as error:
            failure = failure_of(error)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a call
            _LOG.exception("a call broke", method=call.method, instance=call.instance_id)
            message = f"Internal error on {self._name}: {type(error).__name__}: {error}"
            failure = Failure(kind="InterlockError", message=message)
        return Answer(number=call.number, value=value, failure=failure)

    def _come_to_rest(self, exchange: Exchange, number: int, task: asyncio.Task[Answer]) -> None:
        """Answer a call, also one that was cancelled before it had begun."""
        self._calls.pop(number, None)
        self._permits.pop(number, None)
        if task.cancelled():
            stopped = Failure(kind="Fenced", message="Nobody waits for it any more.")
            exchange.post(Answer(number=number, value=_NOTHING, failure=stopped))
        else:
            exchange.post(task.result())

    async def _carry_out(self, exchange: Exchange, call: Call) -> Any:
        if call.method in METHODS:
            return await self._on_guest(exchange, call)
        own = getattr(self, f"_do_{call.method}", None)
        if own is None:
            raise Refused(f"The agent of {self._name} cannot do {call.method}.", remedy="Update it.")
        return await own(call)

    async def _on_guest(self, exchange: Exchange, call: Call) -> Any:
        method = METHODS[call.method]
        if not hasattr(self._hypervisor, call.method):
            raise Refused(f"What holds the guests of {self._name} cannot do {call.method}.")
        words = self._at_home(msgspec.msgpack.decode(call.arguments, type=method.arguments))
        words = [*([self._permit(call)] if method.permitted else []), call.instance_id, *words]
        if method.file == "target":
            target = self._shelf.spooled(target_of(call.instance_id))
            target.unlink(missing_ok=True)
            words.append(target)
        elif method.file == "source":
            words.append(self._shelf.spooled(source_of(call.instance_id)))
        if method.reports:
            words.append(lambda done, total=None: exchange.post(Moved(number=call.number, done=done, total=total)))
        answer = await getattr(self._hypervisor, call.method)(*words)
        if call.method == "undefine":
            self._fences.forget(call.instance_id)
        return answer

    def _permit(self, call: Call) -> Permit:
        if call.fence is None:
            raise Refused("The call names no fence.")
        self._fences.see(call.instance_id, call.fence)
        permit = HeldPermit(self._fences, call.instance_id, call.fence, self._may_hold)
        self._permits[call.number] = permit
        permit.check()
        return permit

    def _at_home(self, words: tuple[Any, ...]) -> list[Any]:
        """What was sent, in terms of this host. Raises `Refused` for a volume or a root disk that it cannot reach."""
        found: list[Any] = []
        for word in words:
            if isinstance(word, Spec) and word.shared is not None and not self._shelf.shares(word.shared.path):
                raise Refused(
                    f"The host {self._name} does not have the shared folder {word.shared.path}.",
                    remedy="Start its agent with --shared, or use a host that has it.",
                )
            disks = word.disks if isinstance(word, Spec) else (word,) if isinstance(word, Disk) else ()
            for disk in disks:
                if not self._reaches(disk.path):
                    raise Refused(
                        f"The host {self._name} cannot reach the volume {disk.id}.",
                        remedy="Detach it, or let both hosts share the folder of volumes (--shared).",
                    )
            found.append(self._shelf.at_home(word) if isinstance(word, Spec) else word)
        return found

    async def _do_known(self, _call: Call) -> frozenset[str]:
        return await self._hypervisor.known()

    # ------------------------------------------------------------------------------------------------- streams

    async def _do_open_console(self, call: Call) -> int:
        return self._hold_stream(await self._hypervisor.open_console(call.instance_id))

    async def _do_open_display(self, call: Call) -> int:
        return self._hold_stream(await self._hypervisor.open_display(call.instance_id))

    def _hold_stream(self, stream: Stream) -> int:
        number = next(self._numbers)
        self._streams[number] = stream
        return number

    def _stream(self, number: int) -> Stream:
        try:
            return self._streams[number]
        except KeyError:
            raise NotThere("The connection with the guest was closed.") from None

    async def _do_stream_read(self, call: Call) -> bytes:
        (number,) = msgspec.msgpack.decode(call.arguments, type=tuple[int])
        return await self._stream(number).read()

    async def _do_stream_write(self, call: Call) -> None:
        number, data = msgspec.msgpack.decode(call.arguments, type=tuple[int, bytes])
        await self._stream(number).write(data)

    async def _do_stream_close(self, call: Call) -> None:
        (number,) = msgspec.msgpack.decode(call.arguments, type=tuple[int])
        stream = self._streams.pop(number, None)
        if stream is not None:
            await stream.close()

    # --------------------------------------------------------------------------------------------------- files

    async def _do_image_there(self, call: Call) -> bool:
        (path,) = msgspec.msgpack.decode(call.arguments, type=tuple[str])
        return self._shelf.image_there(path)

    async def _do_image_copies(self, _call: Call) -> dict[str, int]:
        return self._shelf.copies(await self._used())

    async def _do_drop_image_copies(self, call: Call) -> tuple[str, ...]:
        (names,) = msgspec.msgpack.decode(call.arguments, type=tuple[frozenset[str]])
        return self._shelf.drop_copies(names, await self._used())

    async def _used(self) -> Collection[str]:
        """The files of images that guests here need. Raises `Refused` where that cannot be told."""
        try:
            return await asyncio.to_thread(self._boots_from)
        except OSError as error:
            raise Refused(f"What the guests of {self._name} boot cannot be told: {error}.") from error

    async def _do_file_write(self, call: Call) -> None:
        await self._shelf.write(*msgspec.msgpack.decode(call.arguments, type=tuple[str, str, int, bytes]))

    async def _do_file_keep(self, call: Call) -> None:
        await self._shelf.keep(*msgspec.msgpack.decode(call.arguments, type=tuple[str, str, int, str]))

    async def _do_file_read(self, call: Call) -> bytes:
        return await self._shelf.read(*msgspec.msgpack.decode(call.arguments, type=tuple[str, int]))

    async def _do_file_drop(self, call: Call) -> None:
        (name,) = msgspec.msgpack.decode(call.arguments, type=tuple[str])
        self._shelf.drop(name)
