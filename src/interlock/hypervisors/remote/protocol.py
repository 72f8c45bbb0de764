"""Messages between server and agent, as MessagePack, and the versions of the protocol.

One connection carries them in order: the events that a call caused arrive before the call's answer, and a fence before
the calls of its holder. Only messages about the lease overtake others. Large files travel beside it, see
`range_transfer`.

Server and agent agree on the newest version that both speak. What a version added:

* 4: the oldest that is supported. Files travel as messages.
* 5: files travel as HTTP ranges (`RangeCalls`), and the versions that an agent speaks are in its `Hello`.
* 6: live migration over TLS (`receive_guest_tls`, `send_guest_tls`), with certificates that the server issues.
* 7: networks (`update_interface`, `agent_interfaces`). An agent of an earlier version ignores those of a spec.

Structs may get fields with defaults within a version: the other side ignores unknown fields. A new method needs a new
version, and its entry in `methods._SINCE`; a method that exists keeps its name and arguments.
"""

from __future__ import annotations

from typing import Final

import msgspec

from interlock.core import errors
from interlock.core.errors import HostTaken, InterlockError, Unavailable
from interlock.ports import HypervisorEvent
from interlock.ports.hosts import HostIdentity, IssuedCertificate, Limits, NetworkAbility, Protection

VERSION: Final = 7
"""The newest version of the protocol."""
OLDEST_VERSION: Final = max(VERSION - 3, 4)
"""The oldest one that is spoken: three versions back, but never one before negotiation was possible."""
CHUNK_BYTES: Final = 1 << 20
"""The bytes of a file in one message."""
FRAME_BYTES_MAX: Final = 16 << 20
"""The longest message that either side accepts."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error of the core's tree."""

    kind: str
    message: str
    remedy: str | None = None
    retry_ms: int | None = None
    """After how many milliseconds a retry may succeed; None if unknown."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The agent's first message."""

    version: int = OLDEST_VERSION
    """The oldest version that it speaks. A server of version 4 accepts no other than its own here."""
    newest_version: int | None = None
    """The newest version that it speaks; None: `version`."""
    name: str
    identity: HostIdentity | None = None
    """Every agent has one since version 4."""
    log: str
    """Id of its event log, whose event numbers ascend. A lost log is replaced by one with another id."""
    address: str | None = None
    shared: str | None = None
    limits: Limits = Limits()
    """The host's capacity."""
    protections: tuple[Protection, ...] = ()
    """What confines the host's guests."""
    networks: tuple[NetworkAbility, ...] = ()
    """The kinds of network that the host has for its guests; since version 7."""
    certificate_request: str | None = None
    """A request for the host's certificate (PEM); since version 6."""


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome", omit_defaults=True):
    """The server accepts the agent."""

    lease_ms: int
    """For how long guests may run after a renewal, in milliseconds; 0: without leases."""
    version: int = 4
    """The version that both speak from now on. A server of version 4 does not send it."""
    certificate: IssuedCertificate | None = None
    """What was requested; None also if the server cannot issue one."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal"):
    """The server rejects the agent, and closes the connection."""

    failure: Failure


class GuestEventMessage(msgspec.Struct, frozen=True, kw_only=True, tag="told"):
    """An event of a guest."""

    number: int
    event: HypervisorEvent


class EventAck(msgspec.Struct, frozen=True, kw_only=True, tag="heard"):
    """Events up to this number have been received."""

    number: int


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """The server checks whether the agent responds."""

    number: int


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong"):
    """The response to a `Ping`."""

    number: int


class CaughtUp(msgspec.Struct, frozen=True, kw_only=True, tag="caught_up"):
    """All events from before the connection have been sent."""


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag="renew"):
    """The agent renews its lease, from when it sent this. Also its keepalive."""

    number: int
    disk_free_mib: int | None = None
    """Free space of its data folder's file system, in MiB."""


class LeaseGranted(msgspec.Struct, frozen=True, kw_only=True, tag="renewed"):
    """The renewal of that number is granted."""

    number: int


class CertificateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="certificate_request"):
    """The agent renews the host's certificate; since version 6."""

    request: str
    """As in `Hello`."""


class CertificateIssued(msgspec.Struct, frozen=True, kw_only=True, tag="certificate"):
    """The certificate for a `CertificateRequest`; there is no answer if it cannot be issued."""

    certificate: IssuedCertificate


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """The server calls a method, see `methods`."""

    number: int
    method: str
    instance_id: str = ""
    fence: int | None = None
    arguments: msgspec.Raw


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """The caller no longer waits. The agent stops the call, and answers it when it has stopped."""

    number: int


class CallResult(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """The result of a call."""

    number: int
    value: msgspec.Raw
    failure: Failure | None = None


class TransferMessage(msgspec.Struct, frozen=True, kw_only=True, tag="moved"):
    """The progress of a call."""

    number: int
    done: int
    total: int | None = None
    detail: str | None = None
    warning: str | None = None


class Superseded(msgspec.Struct, frozen=True, kw_only=True, tag="superseded"):
    """Calls with a smaller fence must be rejected for the instance."""

    instance_id: str
    fence: int


Message = (
    Hello
    | Welcome
    | Refusal
    | GuestEventMessage
    | EventAck
    | Ping
    | Pong
    | CaughtUp
    | Renew
    | LeaseGranted
    | CertificateRequest
    | CertificateIssued
    | Call
    | Cancel
    | CallResult
    | TransferMessage
    | Superseded
)

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)

_ERRORS: Final = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, InterlockError)
}
"""The errors that can be sent, by name."""


def encode(message: Message) -> bytes:
    return _ENCODER.encode(message)


def decode(frame: bytes) -> Message:
    """Raises `msgspec.DecodeError`."""
    return _DECODER.decode(frame)


def packed(value: object) -> msgspec.Raw:
    """Return arguments or an answer, encoded."""
    return msgspec.Raw(_ENCODER.encode(value))


def agreed_version(greeting: Hello, host: str) -> int:
    """Return the newest version that the agent of `host` and this server speak. Raises `Unavailable`."""
    oldest, newest = greeting.version, greeting.newest_version or greeting.version
    version = min(newest, VERSION)
    if version < max(oldest, OLDEST_VERSION):
        raise Unavailable(
            f"The agent of the host {host} speaks protocol {_span(oldest, newest)}, and this server "
            f"{_span(OLDEST_VERSION, VERSION)}.",
            remedy="Upgrade the agent." if newest < OLDEST_VERSION else "Upgrade the server.",
        )
    return version


def require_spoken(welcome: Welcome) -> None:
    """Raise `Unavailable` if this agent does not speak the version that the server chose."""
    if not OLDEST_VERSION <= welcome.version <= VERSION:
        raise Unavailable(
            f"The server chose protocol version {welcome.version}, and this agent speaks "
            f"{_span(OLDEST_VERSION, VERSION)}.",
            remedy="Upgrade the server." if welcome.version < OLDEST_VERSION else "Upgrade the agent.",
        )


def _span(oldest: int, newest: int) -> str:
    return f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"


def failure_of(error: InterlockError) -> Failure:
    """Describe an error, by the nearest kind of the core's tree."""
    kind = next(one.__name__ for one in type(error).__mro__ if one.__name__ in _ERRORS)
    retry_ms = error.retry_ms if isinstance(error, HostTaken) else None
    return Failure(kind=kind, message=error.message, remedy=error.remedy, retry_ms=retry_ms)


def error_of(failure: Failure) -> InterlockError:
    """Return the error that the other side raised; an unknown kind as an `InterlockError`."""
    kind = _ERRORS.get(failure.kind, InterlockError)
    if kind is HostTaken:
        return HostTaken(failure.message, remedy=failure.remedy, retry_ms=failure.retry_ms)
    return kind(failure.message, remedy=failure.remedy)
