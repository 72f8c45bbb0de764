"""Atomic and durable file writes, and safe opening of files that callers name."""

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
"""Suffix of a file that is being copied from another host."""
CHUNK_BYTES = 1 << 20
_MIB = 1 << 20
_ZEROS = bytes(CHUNK_BYTES)
DRAFT_PREFIX = ".half-made-"
"""Prefix of temporary files, which are deleted at the next start after a crash."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def checked_id(identity: str) -> str:
    """Return `identity`, for use in a file name. Raises `Invalid` if it could lead out of the folder."""
    if not _ID.fullmatch(identity):
        raise Invalid(f"Invalid id {identity!r}: expected 1 to 64 letters, digits, `_` and `-`.")
    return identity


@contextmanager
def opened_source(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a caller's file for reading; yield it and its size in bytes. Does not follow a symbolic link.

    Raises:
        Invalid: the file does not exist, cannot be read, or is not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would block until it has a writer.
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
    """Yield the `size` bytes of an open file. Raises `Invalid` if its size has changed meanwhile."""
    left = size
    while chunk := source.read(min(CHUNK_BYTES, left + 1)):
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left != 0:
        raise Invalid(f"{path.name}: the file was changed while it was read.", remedy="Try again when it is complete.")


class DraftFile:
    """A temporary file in `folder`, deleted at the end of the block unless `keep` is called."""

    def __init__(self, folder: Path, *, mode: int) -> None:
        self._folder = folder
        self._mode = mode

    def __enter__(self) -> Self:
        with disk_errors_raised(self._folder):
            descriptor, name = tempfile.mkstemp(prefix=DRAFT_PREFIX, dir=self._folder)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self.path = Path(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def append(self, chunk: bytes) -> None:
        """Append a chunk; a chunk of zeros becomes a hole."""
        with disk_errors_raised(self._folder):
            if chunk == _ZEROS[: len(chunk)]:
                self._file.truncate(self._file.seek(len(chunk), os.SEEK_CUR))
                return
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) :]

    def shorten(self, size: int) -> None:
        """Truncate the file by `size` bytes."""
        with disk_errors_raised(self._folder):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - size)

    def keep(self, name: str) -> Path:
        """Give the file its final name, durably. Raises `Invalid` if the name exists: files are never overwritten."""
        kept = self._folder / name
        with disk_errors_raised(self._folder):
            self._file.flush()
            os.fchmod(self._file.fileno(), self._mode)
            os.fsync(self._file.fileno())
            try:
                kept.hardlink_to(self.path)
            except FileExistsError as error:
                raise Invalid(f"The file {name} already exists in {self._folder}.") from error
            self.path.unlink()
            sync_folder(self._folder)
        return kept


@contextmanager
def disk_errors_raised(folder: Path) -> Iterator[None]:
    """Convert an OSError in the block to `StoreFull` or `StoreError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise full(folder) from error
        raise StoreError(f"The server's folder {folder} cannot be written: {error.strerror}.") from error


def full(folder: Path) -> StoreFull:
    return StoreFull(f"No space left in {folder}; nothing was written.", remedy="Free some space, then retry.")


def free_mib(folder: Path) -> int:
    """Return the free space of the folder's file system in MiB. Raises OSError."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize // _MIB


def make_folder(folder: Path) -> None:
    """Create a folder in which a guest's process can open files by name, but not list them."""
    with disk_errors_raised(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)


def remove_drafts(folder: Path) -> None:
    """Delete the temporary files that a crash left. No write may be in progress."""
    for path in folder.glob(f"{DRAFT_PREFIX}*"):
        path.unlink(missing_ok=True)


def remove_unknown(folder: Path, known: Collection[str], suffixes: Collection[str]) -> tuple[str, ...]:
    """Delete the files with one of `suffixes` whose stem is not in `known`; return their names."""
    unknown = [path for path in folder.iterdir() if path.suffix in suffixes and path.stem not in known]
    for path in unknown:
        path.unlink(missing_ok=True)
    return tuple(sorted(path.name for path in unknown))


def sync_folder(folder: Path) -> None:
    """Fsync a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Fsync a file."""
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


def write_atomically(path: Path, content: str | bytes, *, mode: int) -> None:
    """Write a file atomically and durably, with permissions of at most `mode` at any time.

    The folder is not synced: after a power failure the file may be the former one.
    """
    data = content.encode() if isinstance(content, str) else content
    with drafted(path) as draft:
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end of the block, or is deleted on an error."""
    draft = path.with_name(path.name + ".new")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_or_overwrite(path: Path, text: str, *, mode: int) -> None:
    """As `write_atomically`; on a full disk overwrite the file in place, padded with spaces.

    Raises OSError: it could not be written, and the file is deleted.
    """
    try:
        write_atomically(path, text, mode=mode)
    except OSError:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, text.encode().ljust(os.fstat(descriptor).st_size), 0)
            finally:
                os.close(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def make_data_folder(folder: Path) -> None:
    """Create the data folder of a server or agent; other users (QEMU's) may traverse it, but not list it."""
    try:
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The data folder {folder} cannot be created: {error.strerror}.",
            remedy="Choose another with INTERLOCK_DATA_DIR, or make it writable.",
        ) from None
