"""The server's side of one connection with an agent: calls and their results, events and lease renewals."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, cast

import msgspec

from interlock.core.errors import Fenced, InterlockError, NotResponding, OperationRejected
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.methods import AnswerT, Declared, P, method_of
from interlock.hypervisors.remote.protocol import (
    Call,
    CallResult,
    Cancel,
    CaughtUp,
    CertificateIssued,
    CertificateRequest,
    EventAck,
    GuestEventMessage,
    LeaseGranted,
    Message,
    Ping,
    Pong,
    Renew,
    Superseded,
    TransferMessage,
    error_of,
    packed,
)
from interlock.ports import Report, TransferReport
from interlock.ports.hosts import IssuedCertificate


class _PendingCall:
    """A call without a result yet."""

    def __init__(self, report: Report | None) -> None:
        self.result: asyncio.Future[CallResult] = asyncio.get_running_loop().create_future()
        self.report = report
        self.fenced: Fenced | None = None


class ServerSession:
    """The session of an agent that has greeted, until the connection ends.

    Args:
        host: the host's name, for error messages.
        exchange: the connection.
        version: of the protocol, as agreed.
        on_event: called with each event of a guest.
        on_caught_up: called when the agent has sent all earlier events.
        renew: called with each renewal; returns whether to grant it here.
        certify: returns the certificate for a request; None if it cannot be issued.
    """

    def __init__(
        self,
        host: str,
        exchange: Exchange,
        version: int,
        on_event: Callable[[GuestEventMessage], None],
        on_caught_up: Callable[[], None],
        renew: Callable[[], bool],
        certify: Callable[[str | None], IssuedCertificate | None],
    ) -> None:
        self._host = host
        self._exchange = exchange
        self.version = version
        self._on_event = on_event
        self._on_caught_up = on_caught_up
        self._renew = renew
        self._certify = certify
        self._numbers = itertools.count(1)
        self._pending: dict[int, _PendingCall] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._ping_numbers = itertools.count(1)
        self._ended = False
        self.alive = asyncio.Event()
        """Set with every message of the agent; cleared by who waits for the next."""
        self.disk_free_mib: int | None = None
        """Free space of the host's file system in MiB, as of the last renewal."""

    async def run(self) -> None:
        """Receive messages until the connection ends; calls without a result by then raise `NotResponding`."""
        try:
            await self._exchange.run(self._on_message)
        finally:
            self._ended = True
            for pending in self._pending.values():
                if not pending.result.done():
                    pending.result.set_exception(self._disconnected())
                    pending.result.exception()
            self._pending.clear()
            for ping in self._pings.values():
                if not ping.done():
                    ping.set_result(None)

    def _disconnected(self) -> NotResponding:
        return NotResponding(
            f"The connection with the host {self._host} broke before it answered.",
            remedy=f"See that `interlock agent` runs on {self._host} and reaches the server.",
        )

    def _on_message(self, message: Message) -> None:
        self.alive.set()
        match message:
            case CallResult():
                pending = self._pending.get(message.number)
                if pending is not None and not pending.result.done():
                    pending.result.set_result(message)
            case TransferMessage():
                self._on_progress(message)
            case GuestEventMessage():
                self._on_event(message)
                self._exchange.post(EventAck(number=message.number))
            case CaughtUp():
                self._on_caught_up()
            case Pong():
                ping = self._pings.pop(message.number, None)
                if ping is not None and not ping.done():
                    ping.set_result(None)
            case Renew() | CertificateRequest():
                self._on_renewal(message)
            case _:
                raise ConnectionError(f"unexpected message of the agent of {self._host}: {type(message).__name__}")

    def _on_renewal(self, message: Renew | CertificateRequest) -> None:
        match message:
            case Renew():
                self.disk_free_mib = message.disk_free_mib
                if self._renew():
                    self._exchange.post(LeaseGranted(number=message.number))
            case CertificateRequest():
                certificate = self._certify(message.request)
                if certificate is not None:
                    self._exchange.post(CertificateIssued(certificate=certificate))

    def _on_progress(self, message: TransferMessage) -> None:
        pending = self._pending.get(message.number)
        if pending is None or pending.report is None or pending.fenced is not None:
            return
        try:
            if message.detail is None and message.warning is None:
                pending.report(message.done, message.total)
            else:
                # Only a method that takes a `TransferReport` sends these.
                report = cast("TransferReport", pending.report)
                report(message.done, message.total, detail=message.detail, warning=message.warning)
        except Fenced as fenced:
            pending.fenced = fenced
            self._exchange.post(Cancel(number=message.number))

    async def answers(self, within_s: float) -> bool:
        """Whether the agent responds within that time, in seconds."""
        if self._ended:
            return False
        number = next(self._ping_numbers)
        answered = self._pings[number] = asyncio.get_running_loop().create_future()
        self._exchange.post(Ping(number=number))
        try:
            async with asyncio.timeout(within_s):
                await answered
        except TimeoutError:
            return False
        finally:
            self._pings.pop(number, None)
        return not self._ended

    def superseded(self, instance_id: str, fence: int) -> None:
        self._exchange.post(Superseded(instance_id=instance_id, fence=fence))

    async def call(self, declared: Declared[P, AnswerT], *args: P.args, **kwargs: P.kwargs) -> AnswerT:
        """Call a method of the agent as its protocol declares it; a file is not sent with it.

        A worker that is cancelled, or fenced as it reports, returns when the agent has stopped the call.

        Raises:
            NotResponding: the connection broke; whether it was carried out is unknown.
            OperationRejected: the agent's version of the protocol does not have it.
            InterlockError: what the method raises.
        """
        method = method_of(declared)
        bound = method.bind(args, kwargs)
        if bound.permit is not None:
            bound.permit.check()
        if self._ended:
            # Who makes several calls may keep a session whose connection broke between two of them.
            raise self._disconnected()
        if method.since > self.version:
            raise OperationRejected(
                f"The agent of the host {self._host} speaks protocol version {self.version}, and {method.name} needs "
                f"version {method.since}.",
                remedy="Upgrade the agent.",
            )
        number = next(self._numbers)
        pending = self._pending[number] = _PendingCall(bound.report)
        self._exchange.post(
            Call(
                number=number,
                method=method.name,
                instance_id=bound.instance_id,
                fence=None if bound.permit is None else bound.permit.fence,
                arguments=packed(bound.arguments),
            )
        )
        try:
            await asyncio.wait({pending.result})
        except asyncio.CancelledError:
            self._exchange.post(Cancel(number=number))
            await asyncio.wait({pending.result})
            raise
        finally:
            self._pending.pop(number, None)
        answer: AnswerT = _answer(pending, method.answer)
        return answer


def _answer(pending: _PendingCall, kind: Any) -> Any:
    if pending.fenced is not None:
        raise pending.fenced
    result = pending.result.result()
    if result.failure is not None:
        raise error_of(result.failure)
    try:
        return msgspec.msgpack.decode(result.value, type=kind)
    except msgspec.DecodeError as error:
        raise InterlockError(f"Invalid answer of the host: {error}.") from error
