"""What server and agent say to each other: the messages, as MessagePack, and the errors that travel in them.

One connection carries everything, in order: an event that a call caused is there before the call's answer, and news of
a fence before the calls of who holds the new one. Who says what when is in `adapter` and `serving`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.core import errors
from interlock.core.errors import InterlockError
from interlock.ports import Hypervisor, HypervisorEvent, Permit, Report
from interlock.ports.hosts import Limits, Link
from interlock.ports.travelling import Travelling

VERSION: Final = 2
"""Of this language. Server and agent of different versions do not speak to each other."""
CHUNK_BYTES: Final = 1 << 20
"""How much of a file goes in one message."""
FRAME_BYTES_MAX: Final = 16 << 20
"""The longest message that either side takes: a piece of a file and what is said of it, or a picture of a screen."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error of the core's tree."""

    kind: str
    message: str
    remedy: str | None = None


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The agent's first message."""

    version: int = VERSION
    name: str
    log: str
    """Which run of event numbers its events have: another one after its log was lost."""
    address: str | None = None
    shared: str | None = None
    limits: Limits = Limits()
    """What may be promised of this host."""


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The server's answer."""

    lease_ms: int
    """For how long a renewal lets guests run; 0: they run without."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal"):
    """The server does not want this agent; the connection ends."""

    failure: Failure


class Told(msgspec.Struct, frozen=True, kw_only=True, tag="told"):
    """A guest did something."""

    number: int
    event: HypervisorEvent


class Heard(msgspec.Struct, frozen=True, kw_only=True, tag="heard"):
    """Events up to this number have arrived."""

    number: int


class CaughtUp(msgspec.Struct, frozen=True, kw_only=True, tag="caught_up"):
    """Everything that was kept while there was no connection has been told."""


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag="renew"):
    """The agent wants its lease to begin anew with the sending of this; also its sign of life."""

    number: int
    disk_free_mib: int | None = None
    """What the file system of its folder has free for real."""


class Renewed(msgspec.Struct, frozen=True, kw_only=True, tag="renewed"):
    """Granted."""

    number: int


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """The server wants a method of the port carried out."""

    number: int
    method: str
    instance_id: str = ""
    fence: int | None = None
    arguments: msgspec.Raw


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Who made the call waits no more. It is answered all the same, when it has come to rest."""

    number: int


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """How a call came out."""

    number: int
    value: msgspec.Raw
    failure: Failure | None = None


class Moved(msgspec.Struct, frozen=True, kw_only=True, tag="moved"):
    """How far a call is."""

    number: int
    done: int
    total: int | None = None


class Superseded(msgspec.Struct, frozen=True, kw_only=True, tag="superseded"):
    """Nobody with a smaller fence may act on the instance any more."""

    instance_id: str
    fence: int


Message = (
    Hello | Welcome | Refusal | Told | Heard | CaughtUp | Renew | Renewed | Call | Cancel | Answer | Moved | Superseded
)

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)


def packed(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(value))


def failure_of(error: InterlockError) -> Failure:
    return Failure(kind=type(error).__name__, message=error.message, remedy=error.remedy)


def error_of(failure: Failure) -> InterlockError:
    """The error as it was raised on the other side; one that is not known here is the base of them all."""
    kind = getattr(errors, failure.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, InterlockError)):
        kind = InterlockError
    return kind(failure.message, remedy=failure.remedy)


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One method of the port, as it travels."""

    permitted: bool
    """Whether it takes a permit."""
    reports: bool
    """Whether it says how far it is."""
    arguments: type[Any]
    """A tuple type: its arguments after the instance, without permit, report and file."""
    file: str | None
    """`source` or `target`, where it reads or writes a file that the server has."""
    answer: Any


def _method(function: Any) -> Method:
    hints = typing.get_type_hints(function)
    names = [name for name in inspect.signature(function).parameters if name not in {"self", "instance_id"}]
    kinds = {name: hints[name] for name in names}
    plain = tuple(kind for kind in kinds.values() if kind not in {Permit, Report, Path})
    return Method(
        permitted=Permit in kinds.values(),
        reports=Report in kinds.values(),
        arguments=tuple[plain] if plain else tuple[()],  # type: ignore[valid-type]
        file=next((name for name, kind in kinds.items() if kind is Path), None),
        answer=hints["return"],
    )


_NOT_CALLED: Final = frozenset({"open", "close", "open_console", "open_display", "known"})

METHODS: Final[dict[str, Method]] = {
    name: _method(function)
    for name, function in (*vars(Hypervisor).items(), *vars(Travelling).items())
    if inspect.iscoroutinefunction(function) and name not in _NOT_CALLED
}
"""Every method of the port that is one call, by name; drawn from the port itself."""


class Exchange:
    """One connection in use: what is posted goes out in order, what comes in is handed on in order."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()

    def post(self, message: Message) -> None:
        """Have a message sent, without waiting."""
        self._outgoing.put_nowait(_encoder.encode(message))

    async def receive(self) -> Message:
        """The next message. Raises `ConnectionError`."""
        try:
            return _decoder.decode(await self._link.receive())
        except msgspec.DecodeError as error:
            raise ConnectionError(f"a message that is none: {error}") from error

    async def run(self, heed: Callable[[Message], None]) -> None:
        """Send and hand on until the connection ends, and end it. Raises `ConnectionError`."""
        sending = asyncio.create_task(self._send(), name="send to the other side")
        receiving = asyncio.create_task(self._receive(heed), name="hear the other side")
        try:
            done, _ = await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (sending, receiving):
                task.cancel()
            await asyncio.wait({sending, receiving})
            with contextlib.suppress(ConnectionError):
                await self._link.close()

    async def _receive(self, heed: Callable[[Message], None]) -> None:
        while True:
            heed(await self.receive())

    async def _send(self) -> None:
        while True:
            await self._link.send(await self._outgoing.get())
