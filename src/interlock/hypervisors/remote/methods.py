"""The methods that a server calls on an agent: those of the hypervisor port, and the agent's own.

Names, arguments and answers on the wire are those that the protocols declare, so that mypy checks both sides.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Collection, Coroutine, Mapping
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, TypeVar

import msgspec

from interlock.core.errors import OperationRejected
from interlock.hypervisors.remote.protocol import OLDEST_VERSION
from interlock.ports import Hypervisor, Permit, Report, TransferReport
from interlock.ports.migration import MigrationPort

P = ParamSpec("P")
AnswerT = TypeVar("AnswerT")
Declared = Callable[Concatenate[Any, P], Coroutine[Any, Any, AnswerT]]
"""A method as a protocol declares it."""

Extents = tuple[tuple[int, int], ...]
"""Parts of a file, each by its first byte and the one after its last."""

_INSTANCE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_instance_id(text: str) -> bool:
    """Whether `text` can be an instance id, and so a file name that leads out of no folder."""
    return _INSTANCE_ID.fullmatch(text) is not None


class StreamCalls(Protocol):
    """Consoles and displays: streams by number."""

    async def open_console(self, instance_id: str) -> int: ...

    async def open_display(self, instance_id: str) -> int: ...

    async def stream_read(self, number: int) -> bytes: ...

    async def stream_write(self, number: int, data: bytes) -> None: ...

    async def stream_close(self, number: int) -> None: ...


class FileCalls(Protocol):
    """The files of the server that a host has a copy of (place `cache`) or is transferring (place `spool`)."""

    async def has_image(self, path: str) -> bool:
        """Whether the host has the server's file at `path`, in the shared folder or as a copy."""
        ...

    async def image_copies(self) -> dict[str, int]:
        """As `ports.RemoteHost.image_copies`."""
        ...

    async def drop_image_copies(self, names: frozenset[str]) -> tuple[str, ...]:
        """As `ports.RemoteHost.drop_image_copies`."""
        ...

    async def file_write(self, place: str, name: str, offset: int, piece: bytes) -> None:
        """Write a piece of a file that the server sends. Without `RangeCalls`."""
        ...

    async def file_keep(self, place: str, name: str, size: int, sha256: str) -> None:
        """Keep a file that was received. Raises `OperationRejected`, with the file removed, if it differs."""
        ...

    async def file_read(self, name: str, offset: int) -> bytes:
        """Return a piece of a file in the spool; empty at its end. Without `RangeCalls`."""
        ...

    async def file_drop(self, name: str) -> None:
        """Remove a file from the spool. Idempotent."""
        ...


class RangeCalls(Protocol):
    """Files over HTTP ranges. The agent makes the requests, for a transfer whose id the server has created."""

    async def file_download(
        self, place: str, name: str, transfer: str, content: str, size: int, extents: Extents, report: Report
    ) -> None:
        """Download a file, to be kept with `file_keep`. An earlier download with the same `content` is resumed.

        `extents` has the parts with data, ascending; the others are holes.

        Raises:
            OperationRejected: the server does not respond, or refuses it.
        """
        ...

    async def file_upload(self, name: str, transfer: str, report: Report) -> str:
        """Upload a file of the spool, and return its SHA-256. Raises as `file_download`."""
        ...


class _Kind(Enum):
    PERMIT = auto()
    INSTANCE = auto()
    REPORT = auto()
    FILE = auto()
    PLAIN = auto()


_KINDS: Final = {Permit: _Kind.PERMIT, Report: _Kind.REPORT, TransferReport: _Kind.REPORT, Path: _Kind.FILE}


class BoundCall(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of one call."""

    instance_id: str = ""
    permit: Permit | None = None
    report: Report | None = None
    arguments: tuple[Any, ...]
    """All others but files, which travel by themselves."""


class RemoteMethod:
    """One method as it travels."""

    def __init__(self, declared: Callable[..., Any], since: int) -> None:
        self.name = declared.__name__
        self.since = since
        """The first version of the protocol that has it."""
        self._signature = inspect.signature(declared)
        hints = typing.get_type_hints(declared)
        names = [name for name in self._signature.parameters if name != "self"]
        self._kinds = tuple(
            _Kind.INSTANCE if name == "instance_id" else _KINDS.get(hints[name], _Kind.PLAIN) for name in names
        )
        paired = list(zip(names, self._kinds, strict=True))
        self.file = next((name for name, kind in paired if kind is _Kind.FILE), None)
        """`source` or `target`, if it reads or writes a file that the server has."""
        plain = tuple(hints[name] for name, kind in paired if kind is _Kind.PLAIN)
        self.arguments: Any = tuple[plain] if plain else tuple[()]  # type: ignore[valid-type]
        self.answer: Any = hints["return"]

    @property
    def permitted(self) -> bool:
        """Whether it takes a permit."""
        return _Kind.PERMIT in self._kinds

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundCall:
        """Return the arguments of a call by what they are."""
        if kwargs:
            args = self._signature.bind(None, *args, **kwargs).args[1:]
        found: dict[_Kind, Any] = dict(zip(self._kinds, args, strict=True))
        plain = tuple(word for word, kind in zip(args, self._kinds, strict=True) if kind is _Kind.PLAIN)
        return BoundCall(
            instance_id=found.get(_Kind.INSTANCE, ""),
            permit=found.get(_Kind.PERMIT),
            report=found.get(_Kind.REPORT),
            arguments=plain,
        )

    def decode(self, instance_id: str, raw: msgspec.Raw) -> tuple[Any, ...]:
        """Return the plain arguments of a call. Raises `OperationRejected` if they are not what is declared."""
        has_instance = _Kind.INSTANCE in self._kinds
        if is_instance_id(instance_id) is not has_instance:
            raise OperationRejected(f"Invalid instance id {instance_id[:80]!r} in a call of {self.name}.")
        try:
            decoded: tuple[Any, ...] = msgspec.msgpack.decode(raw, type=self.arguments)
        except msgspec.DecodeError as error:
            raise OperationRejected(
                f"Invalid arguments of {self.name}: {error}.", remedy="Run the same version of server and agent."
            ) from error
        return decoded

    def positional(
        self, arguments: Collection[Any], instance_id: str, permit: Permit | None, report: Report, file: Path | None
    ) -> list[Any]:
        """Return all arguments in the declared order."""
        plain = iter(arguments)
        given = {_Kind.INSTANCE: instance_id, _Kind.PERMIT: permit, _Kind.REPORT: report, _Kind.FILE: file}
        return [next(plain) if kind is _Kind.PLAIN else given[kind] for kind in self._kinds]


_LOCAL: Final = frozenset({Hypervisor.open, Hypervisor.close, Hypervisor.open_console, Hypervisor.open_display})
"""Methods of the port that are not one call: `StreamCalls` has the streams."""


_SINCE: Final = {
    "file_download": 5,
    "file_upload": 5,
    "receive_guest_tls": 6,
    "send_guest_tls": 6,
    "update_interface": 7,
    "agent_interfaces": 7,
}
"""The version that added a method, for those that the oldest version does not have."""


def _methods_of(protocol: type[Any]) -> dict[str, RemoteMethod]:
    """Return every method of a protocol that is one call, by name."""
    found = [one for one in vars(protocol).values() if inspect.iscoroutinefunction(one) and one not in _LOCAL]
    return {one.__name__: RemoteMethod(one, _SINCE.get(one.__name__, OLDEST_VERSION)) for one in found}


PROTOCOLS: Final[Mapping[type[Any], Mapping[str, RemoteMethod]]] = {
    protocol: _methods_of(protocol) for protocol in (Hypervisor, MigrationPort, StreamCalls, FileCalls, RangeCalls)
}
"""The methods of each protocol, by name."""
_METHODS: Final = {
    getattr(protocol, name): method for protocol, methods in PROTOCOLS.items() for name, method in methods.items()
}


def method_of(declared: Callable[..., Any]) -> RemoteMethod:
    """Return the description of a method that a protocol declares."""
    return _METHODS[declared]


class Caller(Protocol):
    """Calls an agent."""

    async def call(self, declared: Declared[P, AnswerT], *args: P.args, **kwargs: P.kwargs) -> AnswerT:
        """Call a method of the agent as it is declared. Raises `NotResponding` while that is disconnected."""
        ...


class Forwarded(Generic[P, AnswerT]):
    """A method that is one call of the agent, with the signature that the port declares."""

    def __init__(self, declared: Declared[P, AnswerT]) -> None:
        self._declared = declared

    def __get__(self, caller: Caller, owner: type[Any]) -> Callable[P, Coroutine[Any, Any, AnswerT]]:
        return partial(caller.call, self._declared)
