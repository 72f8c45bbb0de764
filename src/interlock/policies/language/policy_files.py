"""Sources of policy text: built-in policies, files on disk, and bundles.

Reading is bounded and never blocks: a path may name a device, a pipe without a writer, or a symlink loop.
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
from interlock.policies.language.schema import FILE_SIZE_MAX_BYTES
from interlock.policies.language.source_location import Place, nearest, shown

_SUFFIX: Final = ".toml"


class PolicyFile(msgspec.Struct, frozen=True, kw_only=True):
    """The content of one file, not parsed yet."""

    name: str
    """The name in errors."""
    data: bytes
    identity: str
    """The same for every name of the file."""
    path: Path | None = None
    """The path on disk; None if it is not on disk."""


class Shelf(Protocol):
    """A source of the files that a policy may extend."""

    def extended(self, by: PolicyFile, extends: str, place: Place) -> PolicyFile:
        """Return the file that `by` extends. Raises `PolicyError` at `place`."""
        ...


def is_file_name(name: str) -> bool:
    """Return whether it names a file rather than a built-in policy."""
    return "/" in name or name.endswith(_SUFFIX)


# -------------------------------------------------------------------------------------------------- with Interlock


def builtin_names() -> tuple[str, ...]:
    """Return the names of the built-in policies, sorted."""
    return tuple(sorted(_builtins()))


@cache
def _builtins() -> dict[str, Traversable]:
    folder = resources.files("interlock.policies") / "builtin"
    return {entry.name.removesuffix(_SUFFIX): entry for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)}


def builtin_file(name: str) -> PolicyFile:
    """Return a built-in policy. Raises `KeyError`."""
    data = _builtins()[name].read_bytes()
    return PolicyFile(name=f"{name}{_SUFFIX}", data=data, identity=f"built-in {name}")


class NoShelf:
    """No files: built-in policies extend only each other."""

    def extended(self, by: PolicyFile, extends: str, place: Place) -> PolicyFile:  # noqa: ARG002 - of the protocol
        raise place.error(f"Built-in policy {shown(extends)} not found.", nearest(extends, builtin_names()))


# ------------------------------------------------------------------------------------------------------ on the disk


def file_on_disk(path: Path) -> PolicyFile:
    """Read a file. Raises `PolicyError`."""
    name = str(path)
    try:
        data = _fetch(path)
        identity = str(path.resolve())
    except FileNotFoundError:
        raise PolicyError(
            f"{shown_path(name)}:1:1: File not found.", remedy="Name a policy file or a built-in policy."
        ) from None
    except _NoFile as found:
        raise PolicyError(
            f"{shown_path(name)}:1:1: Not a regular file: {found}.",
            remedy="Name a policy file or a built-in policy.",
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{shown_path(name)}:1:1: The file cannot be read: {_why(error)}.") from None
    return sized(PolicyFile(name=shown_path(name), data=data, identity=identity, path=path))


def sized(file: PolicyFile) -> PolicyFile:
    """Return the file if it is not too large. Raises `PolicyError`."""
    if len(file.data) > FILE_SIZE_MAX_BYTES:
        raise PolicyError(f"{file.name}:1:1: The file is larger than {FILE_SIZE_MAX_BYTES} bytes, the limit.")
    return file


def shown_path(name: str) -> str:
    """Return a path with bytes that are not UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


class _NoFile(Exception):
    """Not a regular file."""


_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _fetch(path: Path) -> bytes:
    """Return the content, up to one byte past the limit. Does not block on a pipe without a writer."""
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
    """Files on disk, named relative to the file that extends them."""

    def extended(self, by: PolicyFile, extends: str, place: Place) -> PolicyFile:
        if not is_file_name(extends):
            raise place.error(f"Built-in policy {shown(extends)} not found.", nearest(extends, builtin_names()))
        assert by.path is not None
        path = by.path.parent / extends
        try:
            there = path.is_file()
        except (OSError, ValueError) as error:
            raise place.error(f"The extended file cannot be read: {_why(error)}.") from None
        if not there:
            why = "not a regular file" if os.path.lexists(path) else "not found"
            raise place.error(f"The extended file {shown(str(path))} is {why}.")
        return file_on_disk(path)


# ------------------------------------------------------------------------------------------------------------- sent


class SentShelf:
    """The files of a bundle, by name; nothing else can be read."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = {posixpath.normpath(name): text for name, text in files.items()}

    def file(self, name: str) -> PolicyFile | None:
        """Return one of the files, or None. Raises `PolicyError` if it is too large."""
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
            raise place.error(f"Built-in policy {shown(extends)} not found.", nearest(extends, builtin_names()))
        found = self.file(named_beside(by.identity, extends))
        if found is None:
            raise place.error(
                f"The extended file {shown(extends)} is not found in the bundle.",
                nearest(extends, self._files),
            )
        return found


def named_beside(name: str, extends: str) -> str:
    """Resolve a path written in the file `name`, without the file system."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), extends))
