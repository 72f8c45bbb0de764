"""The server's side of one connection with an agent: calls and their answers. Which calls there are is in `adapter`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec

from interlock.core.errors import Fenced, InterlockError, NotResponding
from interlock.hypervisors.remote.wire import (
    Answer,
    Call,
    Cancel,
    CaughtUp,
    Exchange,
    Heard,
    Message,
    Moved,
    Renew,
    Renewed,
    Superseded,
    Told,
    error_of,
    packed,
)
from interlock.ports import Permit, Report

_NOTHING: Final = packed(None)


class _Waiting:
    """A call that is not answered yet."""

    def __init__(self, report: Report | None) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.report = report
        self.lost: Fenced | None = None


class Session:
    """Speaks with an agent that has greeted, until the connection ends."""

    def __init__(
        self, host: str, exchange: Exchange, told: Callable[[Told], None], caught_up: Callable[[], None]
    ) -> None:
        self._host = host
        self._exchange = exchange
        self._told = told
        self._caught_up = caught_up
        self._numbers = 0
        self._waiting: dict[int, _Waiting] = {}
        self._ended = False
        self.alive = asyncio.Event()
        """Set whenever the agent gave a sign of life; whoever watches clears it."""
        self.disk_free_mib: int | None = None
        """What the host's file system had free when the agent last asked for its lease."""

    async def run(self) -> None:
        """Hear the agent until the connection ends; what is not answered by then is not responding."""
        try:
            await self._exchange.run(self._heed)
        finally:
            self._ended = True
            for waiting in self._waiting.values():
                if not waiting.answer.done():
                    waiting.answer.set_exception(self._gone())
                    waiting.answer.exception()
            self._waiting.clear()

    def _gone(self) -> NotResponding:
        return NotResponding(
            f"The connection with the host {self._host} broke before it answered.",
            remedy=f"See that `interlock agent` runs on {self._host} and reaches the server.",
        )

    def _heed(self, message: Message) -> None:
        self.alive.set()
        match message:
            case Answer():
                waiting = self._waiting.get(message.number)
                if waiting is not None and not waiting.answer.done():
                    waiting.answer.set_result(message)
            case Moved():
                self._move(message)
            case Told():
                self._told(message)
                self._exchange.post(Heard(number=message.number))
            case CaughtUp():
                self._caught_up()
            case Renew():
                self.disk_free_mib = message.disk_free_mib
                self._exchange.post(Renewed(number=message.number))
            case _:
                raise ConnectionError(f"the agent of {self._host} sent a {type(message).__name__}")

    def _move(self, message: Moved) -> None:
        waiting = self._waiting.get(message.number)
        if waiting is None or waiting.report is None or waiting.lost is not None:
            return
        try:
            waiting.report(message.done, message.total)
        except Fenced as lost:
            waiting.lost = lost
            self._exchange.post(Cancel(number=message.number))

    def superseded(self, instance_id: str, fence: int) -> None:
        self._exchange.post(Superseded(instance_id=instance_id, fence=fence))

    async def call(
        self,
        method: str,
        instance_id: str,
        arguments: tuple[Any, ...],
        answer: Any = None,
        *,
        permit: Permit | None = None,
        report: Report | None = None,
    ) -> Any:
        """Have a method carried out, and give its answer as the type `answer`.

        A worker that is cancelled, or fenced as it reports, returns when the agent has come to rest.

        Raises:
            NotResponding: the connection broke; whether it was carried out is not known.
            InterlockError: what the method raises.
        """
        if permit is not None:
            permit.check()
        if self._ended:
            # Whoever makes several calls may hold on to a connection that has broken between two of them.
            raise self._gone()
        self._numbers += 1
        number = self._numbers
        waiting = self._waiting[number] = _Waiting(report)
        fence = None if permit is None else permit.fence
        self._exchange.post(
            Call(number=number, method=method, instance_id=instance_id, fence=fence, arguments=packed(arguments))
        )
        try:
            await asyncio.wait({waiting.answer})
        except asyncio.CancelledError:
            self._exchange.post(Cancel(number=number))
            await asyncio.wait({waiting.answer})
            raise
        finally:
            self._waiting.pop(number, None)
        return _value(waiting, answer)


def _value(waiting: _Waiting, kind: Any) -> Any:
    if waiting.lost is not None:
        raise waiting.lost
    found = waiting.answer.result()
    if found.failure is not None:
        raise error_of(found.failure)
    try:
        return msgspec.msgpack.decode(found.value, type=kind)
    except msgspec.DecodeError as error:
        raise InterlockError(f"The host answered something else than was asked: {error}.") from error
