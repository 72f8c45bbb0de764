"""Files that are there whole or not at all: opened without being led astray, written aside, kept by one last step.

For adapters here that own a folder. What may enter the folder is theirs to say.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from interlock.core.errors import Invalid, StoreError, StoreFull

FETCHED = ".fetched"
"""What a file is called, after its id, while it is on its way here from another host."""
CHUNK_BYTES = 1 << 20
_ZEROS = bytes(CHUNK_BYTES)
_HALF_MADE = ".half-made-"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def checked_id(identity: str) -> str:
    """`identity`, which becomes part of a file's name. Raises `Invalid` if it could lead out of the folder."""
    if not _ID.fullmatch(identity):
        raise Invalid(f"The id {identity!r} is not 1 to 64 letters, digits, `_` and `-`.")
    return identity


@contextmanager
def opened_source(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A caller's file, open for reading, and its size in bytes. The path is followed once and not through a last link.

    Raises:
        Invalid: there is no such file, it cannot be read, or it is something else than a file.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise Invalid(f"{path.name}: {_why_not_opened(error)}.") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise Invalid(f"{path.name}: this is {_kind(found.st_mode)}, not a file.")
    with os.fdopen(descriptor, "rb", buffering=0) as source:
        if found.st_size == 0:
            raise Invalid(f"{path.name}: the file is empty.")
        yield source, found.st_size


def chunks(source: IO[bytes], size: int, path: Path) -> Iterator[bytes]:
    """The `size` bytes of an open file. Raises `Invalid` when they have become more or fewer meanwhile."""
    left = size
    while chunk := source.read(min(CHUNK_BYTES, left + 1)):
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left != 0:
        raise Invalid(f"{path.name}: the file was changed while it was read.", remedy="Try again when it is complete.")


class HalfMade:
    """A new file in `folder` under a name that `remove_half_made` knows; gone at the end of the block unless kept."""

    def __init__(self, folder: Path, *, mode: int) -> None:
        self._folder = folder
        self._mode = mode

    def __enter__(self) -> Self:
        with telling_of_full_disk(self._folder):
            descriptor, name = tempfile.mkstemp(prefix=_HALF_MADE, dir=self._folder)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self.path = Path(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def append(self, chunk: bytes) -> None:
        """Write at the end; a run of zeros takes no room."""
        with telling_of_full_disk(self._folder):
            if chunk == _ZEROS[: len(chunk)]:
                self._file.truncate(self._file.seek(len(chunk), os.SEEK_CUR))
                return
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) :]

    def shorten(self, size: int) -> None:
        """Take so many bytes off the end."""
        with telling_of_full_disk(self._folder):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - size)

    def take_back(self) -> None:
        """Make the file ours again after it was given to another user to write."""
        with telling_of_full_disk(self._folder):
            os.fchown(self._file.fileno(), os.geteuid(), os.getegid())

    def keep(self, name: str) -> Path:
        """Give the file its name, durably. Raises `Invalid` if the name is taken: nothing is ever written over."""
        kept = self._folder / name
        with telling_of_full_disk(self._folder):
            self._file.flush()
            os.fchmod(self._file.fileno(), self._mode)
            os.fsync(self._file.fileno())
            try:
                kept.hardlink_to(self.path)
            except FileExistsError as error:
                raise Invalid(f"There is a file {name} in {self._folder} already.") from error
            self.path.unlink()
            sync_folder(self._folder)
        return kept


@contextmanager
def telling_of_full_disk(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with the server's own files inside the block into `StoreFull` or `StoreError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise full(folder) from error
        raise StoreError(f"The server's folder {folder} cannot be written: {error.strerror}.") from error


def full(folder: Path) -> StoreFull:
    return StoreFull(f"There is no room in {folder}; nothing was kept.", remedy="Free some space, then try again.")


def make_folder(folder: Path) -> None:
    """Make the folder so that a guest's process can open a file in it by name, and list nothing."""
    with telling_of_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)


def remove_half_made(folder: Path) -> None:
    """Remove what a crash left of files that were being written. Nothing may be being written now."""
    for path in folder.glob(f"{_HALF_MADE}*"):
        path.unlink(missing_ok=True)


def remove_unknown(folder: Path, known: Collection[str], suffixes: Collection[str]) -> tuple[str, ...]:
    """Remove the files with one of `suffixes` whose stem is not in `known`; the names of those removed."""
    strangers = [path for path in folder.iterdir() if path.suffix in suffixes and path.stem not in known]
    for path in strangers:
        path.unlink(missing_ok=True)
    return tuple(sorted(path.name for path in strangers))


def sync_folder(folder: Path) -> None:
    """Make durable which names the folder has."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make durable what is in the file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not_opened(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        known = {
            errno.ENOENT: "there is no such file",
            errno.ELOOP: "this is a symbolic link, and links are not followed; name the file itself",
            errno.EACCES: "the server may not read it",
            errno.ENXIO: "this is not a file",
            errno.ENAMETOOLONG: "the path is too long",
        }
        return known.get(error.errno or 0, f"it cannot be opened ({error.strerror})")
    return "this is not a path"


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISCHR, "a device"),
    )
    return next((name for test, name in kinds if test(mode)), "something else")


def write_whole(path: Path, text: str, *, mode: int) -> None:
    """Write a file so that it is there whole or not at all, and never readable by more than `mode` says."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
