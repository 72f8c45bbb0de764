"""Where the text of a policy comes from: those that come with Interlock, the disk, or files that somebody has sent.

Only finding and fetching, within bounds: a name may lead to a device, a pipe that nobody writes to, or a loop of links,
and none of them may hold up who reads. What a text means is not here (see `reading`).
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from interlock.core.errors import PolicyError
from interlock.policies.language import FILE_SIZE_MAX_BYTES
from interlock.policies.places import Place, nearest, shown

_SUFFIX: Final = ".toml"


class PolicyFile(msgspec.Struct, frozen=True, kw_only=True):
    """The text of one file, not read yet."""

    name: str
    """As errors name it."""
    data: bytes
    identity: str
    """The same however the file is named."""
    path: Path | None = None
    """On this machine's disk; None where it is not there."""


class Shelf(Protocol):
    """Where the files stand that a policy may extend."""

    def extended(self, by: PolicyFile, extends: str, place: Place) -> PolicyFile:
        """The file that `by` names. Raises `PolicyError` at `place`."""
        ...


def is_file_name(name: str) -> bool:
    """Whether it names a file, and no built-in policy."""
    return "/" in name or name.endswith(_SUFFIX)


# -------------------------------------------------------------------------------------------------- with Interlock


def builtin_names() -> tuple[str, ...]:
    """The names of the policies that come with Interlock, sorted."""
    return tuple(sorted(_builtins()))


@cache
def _builtins() -> dict[str, Traversable]:
    folder = resources.files("interlock.policies") / "builtin"
    return {entry.name.removesuffix(_SUFFIX): entry for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)}


def builtin_file(name: str) -> PolicyFile:
    """The text of a built-in policy. Raises `KeyError`."""
    data = _builtins()[name].read_bytes()
    return PolicyFile(name=f"{name}{_SUFFIX}", data=data, identity=f"built-in {name}")


class NoShelf:
    """Built-in policies extend only one another."""

    def extended(self, by: PolicyFile, extends: str, place: Place) -> PolicyFile:  # noqa: ARG002 - as every shelf
        raise place.error(f"There is no built-in policy {shown(extends)}.", nearest(extends, builtin_names()))


# ------------------------------------------------------------------------------------------------------ on the disk


def file_on_disk(path: Path) -> PolicyFile:
    """A file with its text. Raises `PolicyError`."""
    name = str(path)
    try:
        data = _fetch(path)
        identity = str(path.resolve())
    except FileNotFoundError:
        raise PolicyError(
            f"{shown_path(name)}:1:1: There is no such file.", remedy="Name a policy file or a built-in policy."
        ) from None
    except _NoFile as found:
        raise PolicyError(
            f"{shown_path(name)}:1:1: There is no such file: that is {found}.",
            remedy="Name a policy file or a built-in policy.",
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{shown_path(name)}:1:1: The file cannot be read: {_why(error)}.") from None
    return sized(PolicyFile(name=shown_path(name), data=data, identity=identity, path=path))


def sized(file: PolicyFile) -> PolicyFile:
    """The file, if it is not too large. Raises `PolicyError`."""
    if len(file.data) > FILE_SIZE_MAX_BYTES:
        raise PolicyError(
            f"{file.name}:1:1: The file is larger than {FILE_SIZE_MAX_BYTES} bytes; no policy is that long."
        )
    return file


def shown_path(name: str) -> str:
    """A path as it can be written anywhere, also one whose name is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


class _NoFile(Exception):
    """It is something else than a file."""


_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _fetch(path: Path) -> bytes:
    """What is in the file, up to one byte more than is read. Never waits: a pipe without a writer is opened at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise _NoFile(next((kind for test, kind in _KINDS if test(mode)), "something else"))
        found = bytearray()
        while block := os.read(descriptor, FILE_SIZE_MAX_BYTES + 1 - len(found)):
            found += block
        return bytes(found)
    finally:
        os.close(descriptor)


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


class DiskShelf:
    """Files on this machine, named relative to who extends them."""

    def extended(self, by: PolicyFile, extends: str, place: Place) -> PolicyFile:
        if not is_file_name(extends):
            raise place.error(f"There is no built-in policy {shown(extends)}.", nearest(extends, builtin_names()))
        assert by.path is not None
        path = by.path.parent / extends
        try:
            there = path.is_file()
        except (OSError, ValueError) as error:
            raise place.error(f"extends names no file: {_why(error)}.") from None
        if not there:
            wrong = "which is no file" if os.path.lexists(path) else f"and there is no file {shown(str(path))}"
            raise place.error(f"extends names {shown(extends)}, {wrong}.")
        return file_on_disk(path)


# ------------------------------------------------------------------------------------------------------------- sent


class SentShelf:
    """Files that were sent together, by name. Nothing outside them can be reached."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = {posixpath.normpath(name): text for name, text in files.items()}

    def file(self, name: str) -> PolicyFile | None:
        """One of the files, or None. Raises `PolicyError` if it is too large, or no text."""
        key = posixpath.normpath(name)
        if key not in self._files:
            return None
        text = self._files[key]
        if len(text) > FILE_SIZE_MAX_BYTES:
            return sized(PolicyFile(name=shown_path(key), data=b" " * (FILE_SIZE_MAX_BYTES + 1), identity=key))
        data = text.encode("utf-8", "surrogatepass")
        return sized(PolicyFile(name=shown_path(key), data=data, identity=key))

    def extended(self, by: PolicyFile, extends: str, place: Place) -> PolicyFile:
        if not is_file_name(extends):
            raise place.error(f"There is no built-in policy {shown(extends)}.", nearest(extends, builtin_names()))
        found = self.file(named_beside(by.identity, extends))
        if found is None:
            raise place.error(
                f"extends names {shown(extends)}, and there is no such file among those that were sent.",
                nearest(extends, self._files),
            )
        return found


def named_beside(name: str, extends: str) -> str:
    """What a path that is written in the file `name` leads to, by names alone."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), extends))
