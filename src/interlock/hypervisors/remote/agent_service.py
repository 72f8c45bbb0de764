"""The agent's side of a connection: executes the server's calls on the hypervisor of this host.

A call whose connection breaks is cancelled, as the end of a server cancels its workers: the next caller performs it
again from what exists. Events of guests are kept until the server has acknowledged them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from interlock.core.errors import InterlockError, OperationRejected
from interlock.core.records import Disk, GuestEvent, Spec
from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.hypervisors.host_identity import identity_of
from interlock.hypervisors.remote.event_log import EventLog
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.fence_table import FenceTable, HeldPermit
from interlock.hypervisors.remote.file_cache import FileCache, source_name, target_name
from interlock.hypervisors.remote.guest_streams import GuestStreams
from interlock.hypervisors.remote.lease import EndedByLease
from interlock.hypervisors.remote.methods import (
    PROTOCOLS,
    FileCalls,
    RangeCalls,
    RemoteMethod,
    StreamCalls,
    is_instance_id,
)
from interlock.hypervisors.remote.protocol import (
    VERSION,
    Call,
    CallResult,
    Cancel,
    CaughtUp,
    CertificateIssued,
    CertificateRequest,
    EventAck,
    Failure,
    GuestEventMessage,
    Hello,
    LeaseGranted,
    Message,
    Ping,
    Pong,
    Refusal,
    Superseded,
    TransferMessage,
    Welcome,
    encode,
    error_of,
    failure_of,
    packed,
    require_spoken,
)
from interlock.hypervisors.remote.range_transfer import RangeServer, RangeTransfers
from interlock.ports import Hypervisor, HypervisorEvent, Permit, TransferReport
from interlock.ports.hosts import IssuedCertificate, Limits, Link, NetworkAbility, Protection
from interlock.ports.migration import MigrationPort
from interlock.ports.system_errors import system_failure

_LOG = structlog.get_logger(__name__)
_NOTHING: Final = packed(None)
_STARTING: Final = frozenset({"power_on", "restore_memory", "receive_guest", "receive_guest_tls", "undefine"})
_RENEW_AGAIN_S: Final = 60.0
"""How long to wait for a renewed certificate before it is requested again, in seconds."""


def _always() -> None:
    """The default of `may_hold`: a host without leases may always run guests."""


class AgentService:
    """Serves one server after the other with the guests of this host.

    Args:
        name: the host's name.
        hypervisor: runs the guests.
        folder: the agent's data folder.
        shared: a folder shared with the server, under the same path.
        ranges: the server's files over HTTP ranges; None: files travel as messages, in protocol version 4.
        limits: returns the host's capacity; called with each greeting.
        protections: returns what confines the guests here; called with each greeting.
        networks: returns the kinds of network for guests here; called with each greeting.
        images_in_use: returns the paths of image files that guests here need; called in a thread, may raise OSError.
        reaches: whether a volume's file can be used here; by default if it is in `shared`.
        may_hold: raises if this host may not run guests now.
        certificate: of this host, to be requested from the server; None: no TLS with other hosts.
    """

    def __init__(
        self,
        name: str,
        hypervisor: Hypervisor,
        folder: Path,
        *,
        shared: Path | None = None,
        address: str | None = None,
        ranges: RangeServer | None = None,
        limits: Callable[[], Limits] = Limits,
        protections: Callable[[], tuple[Protection, ...]] = tuple,
        networks: Callable[[], tuple[NetworkAbility, ...]] = tuple,
        images_in_use: Callable[[], Collection[str]] = frozenset,
        reaches: Callable[[str], bool] | None = None,
        may_hold: Callable[[], None] = _always,
        certificate: HostCertificate | None = None,
    ) -> None:
        self._name = name
        self._hypervisor = hypervisor
        self._shared = shared
        self._address = address
        self._limits = limits
        self._protections = protections
        self._networks = networks
        self._guests = folder / "guests"
        self._files = FileCache(folder, shared, images_in_use)
        self._newest_version = 4 if ranges is None else VERSION
        self._reaches = reaches or self._files.reaches
        self._may_hold = may_hold
        self._certificate = certificate
        self._renew_at_s = math.inf
        """When the certificate is to be renewed, on the clock of the event loop."""
        self._log = EventLog(folder / "events.jsonl")
        self._fences = FenceTable(folder / "fences")
        self._ended_by_lease = EndedByLease(folder)
        self._exchange: Exchange | None = None
        self._calls: dict[int, asyncio.Task[CallResult]] = {}
        self._permits: dict[int, HeldPermit] = {}
        self._streams = GuestStreams(hypervisor)
        self._methods = _methods(hypervisor, self._streams, self._files, ranges)

    async def open(self) -> None:
        """Adopt the host's guests. Raises `Unavailable`."""
        self._files.open()
        self._fences.open()
        self._ended_by_lease.open()
        self._log.open()
        await self._hypervisor.open(self._on_event)

    async def close(self) -> None:
        """Detach from the guests, which keep running."""
        await self._hypervisor.close()
        self._ended_by_lease.close()

    def _on_event(self, event: HypervisorEvent) -> None:
        if event.kind is GuestEvent.VANISHED and self._ended_by_lease.take(event.instance_id):
            event = msgspec.structs.replace(event, kind=GuestEvent.LEASE_ENDED)
        message = self._log.add(GuestEventMessage(number=0, event=event))
        if self._exchange is not None:
            self._exchange.post(message)

    async def run(
        self, link: Link, welcomed: Callable[[Exchange, Welcome], None], renewed: Callable[[int], None]
    ) -> None:
        """Serve the server at the other end of the connection until that ends.

        Args:
            link: the connection.
            welcomed: called once the server has accepted the agent; may post on the exchange from then on.
            renewed: called with the number of each renewal that was granted.

        Raises:
            ConnectionError: the connection ended.
            InterlockError: the server rejects this agent, or speaks none of its versions of the protocol.
        """
        exchange = Exchange(link)
        await link.send(encode(self._greeting()))
        answer = await exchange.receive()
        if isinstance(answer, Refusal):
            raise error_of(answer.failure)
        if not isinstance(answer, Welcome):
            raise ConnectionError(f"unexpected message of the server: {type(answer).__name__}")
        require_spoken(answer)
        self._install(answer.certificate)
        for event in self._log.waiting():
            exchange.post(event)
        exchange.post(CaughtUp())
        self._exchange = exchange
        self._files.clear()  # a piece may have been written after the last connection ended
        welcomed(exchange, answer)
        try:
            await exchange.run(lambda message: self._on_message(exchange, message, renewed))
        finally:
            self._exchange = None
            await self._cancel_calls()

    def _greeting(self) -> Hello:
        return Hello(
            newest_version=self._newest_version,
            name=self._name,
            identity=identity_of(self._guests),
            log=self._log.id,
            address=self._address,
            shared=None if self._shared is None else str(self._shared),
            limits=self._limits(),
            protections=self._protections(),
            networks=self._networks(),
            certificate_request=None if self._certificate is None else self._certificate.request(),
        )

    def renew_certificate(self, exchange: Exchange) -> None:
        """Request the next certificate if it is time to renew the present one."""
        now_s = asyncio.get_running_loop().time()
        if self._certificate is not None and now_s >= self._renew_at_s:
            self._renew_at_s = now_s + _RENEW_AGAIN_S
            exchange.post(CertificateRequest(request=self._certificate.request()))

    def _install(self, issued: IssuedCertificate | None) -> None:
        if issued is None or self._certificate is None:
            return
        try:
            self._certificate.install(issued)
        except OSError as error:
            _LOG.warning("host certificate not stored", why=error.strerror)
            return
        self._renew_at_s = asyncio.get_running_loop().time() + issued.renew_s

    async def _cancel_calls(self) -> None:
        """Cancel the calls of a connection that ended; return when they have stopped."""
        for permit in self._permits.values():
            permit.revoke()
        tasks = tuple(self._calls.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._streams.close()
        self._files.clear()

    def _cancel(self, number: int) -> None:
        if number in self._permits:
            self._permits[number].revoke()
        if number in self._calls:
            self._calls[number].cancel()

    def _on_message(self, exchange: Exchange, message: Message, renewed: Callable[[int], None]) -> None:
        match message:
            case Call():
                task = asyncio.create_task(self._result(message, exchange), name=f"call {message.method[:80]}")
                self._calls[message.number] = task
                task.add_done_callback(lambda task: self._send_result(exchange, message.number, task))
            case Cancel():
                self._cancel(message.number)
            case Ping():
                exchange.post(Pong(number=message.number))
            case EventAck():
                self._log.acknowledge(message.number)
            case CertificateIssued():
                self._install(message.certificate)
            case LeaseGranted():
                renewed(message.number)
            case Superseded():
                if is_instance_id(message.instance_id):
                    self._fences.see(message.instance_id, message.fence)
            case _:
                raise ConnectionError(f"unexpected message of the server: {type(message).__name__}")

    # --------------------------------------------------------------------------------------------------- calls

    async def _result(self, call: Call, exchange: Exchange) -> CallResult:
        """Execute a call, and return its result: an answer or a failure."""
        value, failure = _NOTHING, None
        try:
            value = packed(await self._execute(exchange, call))
        except InterlockError as error:
            failure = failure_of(error)
        except OSError as error:
            failure = self._system_failure(call, error)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a call
            failure = self._internal_error(call, error)
        return CallResult(number=call.number, value=value, failure=failure)

    def _system_failure(self, call: Call, error: OSError) -> Failure:
        failed = system_failure(error, f"the host {self._name}")
        if failed is None:
            return self._internal_error(call, error)
        _LOG.warning("call failed", method=call.method, instance=call.instance_id, why=failed.message)
        return failure_of(failed)

    def _internal_error(self, call: Call, error: Exception) -> Failure:
        _LOG.error("internal error", method=call.method, instance=call.instance_id, exc_info=error)
        message = f"Internal error on {self._name}: {type(error).__name__}: {error}"
        return Failure(kind="InterlockError", message=message)

    def _send_result(self, exchange: Exchange, number: int, task: asyncio.Task[CallResult]) -> None:
        """Answer a call that has ended, also one that was cancelled before it began."""
        self._calls.pop(number, None)
        self._permits.pop(number, None)
        if task.cancelled():
            stopped = Failure(kind="Fenced", message="The call was cancelled.")
            exchange.post(CallResult(number=number, value=_NOTHING, failure=stopped))
        else:
            exchange.post(task.result())

    async def _execute(self, exchange: Exchange, call: Call) -> Any:
        served = self._methods.get(call.method)
        if served is None:
            raise OperationRejected(
                f"The agent of {self._name} does not support {call.method[:80]!r}.", remedy="Upgrade it."
            )
        method, implementation = served
        arguments = [self._localize(one) for one in method.decode(call.instance_id, call.arguments)]
        permit = self._permit(call) if method.permitted else None
        file = self._file(method, call.instance_id)
        if call.method in _STARTING:
            self._ended_by_lease.take(call.instance_id)  # an end before this call no longer matters
        report = _reporter(exchange, call.number)
        function = getattr(implementation, method.name)  # a name that a protocol declares, see `_methods`
        answer = await function(*method.positional(arguments, call.instance_id, permit, report, file))
        if call.method == "undefine":
            self._fences.forget(call.instance_id)
        return answer

    def _permit(self, call: Call) -> Permit:
        if call.fence is None:
            raise OperationRejected(f"Invalid call of {call.method}: it has no fence.")
        self._fences.see(call.instance_id, call.fence)
        permit = HeldPermit(self._fences, call.instance_id, call.fence, self._may_hold)
        self._permits[call.number] = permit
        permit.check()
        return permit

    def _file(self, method: RemoteMethod, instance_id: str) -> Path | None:
        """Return the file in the spool that a method reads or writes."""
        if method.file is None:
            return None
        if method.file == "source":
            return self._files.spooled(source_name(instance_id))
        target = self._files.spooled(target_name(instance_id))
        target.unlink(missing_ok=True)
        return target

    def _localize(self, argument: Any) -> Any:
        """Return the argument with the paths of this host.

        Raises `OperationRejected` for a volume or root disk that this host cannot reach.
        """
        if isinstance(argument, Spec):
            if argument.shared is not None and not self._files.shares(argument.shared.path):
                raise OperationRejected(
                    f"The host {self._name} does not have the shared folder {argument.shared.path}.",
                    remedy="Start its agent with --shared, or use a host that has it.",
                )
            self._require_reached(*argument.disks)
            return self._files.localize(argument)
        if isinstance(argument, Disk):
            self._require_reached(argument)
        return argument

    def _require_reached(self, *disks: Disk) -> None:
        for disk in disks:
            if not self._reaches(disk.path):
                raise OperationRejected(
                    f"The host {self._name} cannot reach the volume {disk.id}.",
                    remedy="Detach it, or let both hosts share the folder of volumes (--shared).",
                )


def _methods(
    hypervisor: Hypervisor, streams: GuestStreams, files: FileCache, ranges: RangeServer | None
) -> Mapping[str, tuple[RemoteMethod, object]]:
    """Return what a server may call and its implementation, by name: only methods that a protocol declares."""
    served: list[tuple[type[Any], object]] = [(Hypervisor, hypervisor), (StreamCalls, streams), (FileCalls, files)]
    if isinstance(hypervisor, MigrationPort):
        served.append((MigrationPort, hypervisor))
    if ranges is not None:
        served.append((RangeCalls, RangeTransfers(files, ranges)))
    return {
        name: (method, implementation)
        for protocol, implementation in served
        for name, method in PROTOCOLS[protocol].items()
    }


def _reporter(exchange: Exchange, number: int) -> TransferReport:
    """Return a report that goes to the server, for the call of that number."""

    def report(done: int, total: int | None = None, *, detail: str | None = None, warning: str | None = None) -> None:
        exchange.post(TransferMessage(number=number, done=done, total=total, detail=detail, warning=warning))

    return report
