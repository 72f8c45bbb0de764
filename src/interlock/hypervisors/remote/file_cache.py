"""The files of the server that a host has: copies of images, and the spool of files in transfer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.records import Image, Spec
from interlock.hypervisors.remote.protocol import CHUNK_BYTES
from interlock.images.atomic_files import sync_file, sync_folder

PART: Final = ".part"
"""Suffix of a file that is not complete."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_CONTENT: Final = re.compile(r"[0-9a-f]{1,20}-[0-9a-f]{1,20}-[0-9a-f]{1,20}")
RESUMABLE: Final = re.compile(rf".+\.{_CONTENT.pattern}\{PART}")
"""The names of downloads that were broken off and can be resumed."""
_RESUMABLE_S: Final = 3600.0
"""How long a download that was broken off is kept, to be resumed."""


def source_name(instance_id: str) -> str:
    """Return the name in the spool of the file that a method reads."""
    return f"{instance_id}.source"


def target_name(instance_id: str) -> str:
    """Return the name in the spool of the file that a method writes."""
    return f"{instance_id}.target"


def cached_name(path: str) -> str:
    """Return the name of a host's copy of the server's file at `path`."""
    return f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{Path(path).name[-100:]}"


class FileCache:
    """The copies of images and the spool of one host. Implements `methods.FileCalls`.

    Args:
        folder: the agent's data folder.
        shared: a folder shared with the server, under the same path.
        images_in_use: returns the paths of image files that guests of this host need; blocks, may raise OSError.
    """

    def __init__(
        self, folder: Path, shared: Path | None, images_in_use: Callable[[], Collection[str]] = frozenset
    ) -> None:
        self._places = {"cache": folder / "images", "spool": folder / "spool"}
        self._listed = folder / "images.listed"
        self._shared = shared
        self._images_in_use = images_in_use
        self._requested: set[str] = set()
        """The copies of images that were requested or received since they were last listed."""

    def open(self) -> None:
        """Create the folders, and remove what an earlier agent left of transfers."""
        for place in self._places.values():
            place.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.clear()

    def clear(self) -> None:
        """Remove what was in transfer when the connection ended, except downloads that can be resumed."""
        for left in (*self._places["cache"].glob(f"*{PART}"), *self._places["spool"].iterdir()):
            if RESUMABLE.fullmatch(left.name) is None:
                left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._remove_expired(self._now_s())

    def _remove_expired(self, now_s: float) -> None:
        """Remove the downloads that nobody has resumed in time. Raises OSError."""
        for place in self._places.values():
            for part in place.glob(f"*{PART}"):
                if RESUMABLE.fullmatch(part.name) and now_s - part.stat().st_mtime > _RESUMABLE_S:
                    part.unlink(missing_ok=True)

    def _now_s(self) -> float:
        """Return the time of the file system, which sets the times of its files. Raises OSError."""
        self._listed.touch()
        return self._listed.stat().st_mtime

    def reaches(self, path: str) -> bool:
        """Whether a file of the server is the same file here."""
        if self._shared is None:
            return False
        place = Path(os.path.normpath(path))
        return place.is_relative_to(self._shared) and place.exists()

    def shares(self, folder: str) -> bool:
        """Whether a folder is in the shared one."""
        return self._shared is not None and Path(os.path.normpath(folder)).is_relative_to(self._shared)

    def localize(self, spec: Spec) -> Spec:
        """Return the spec, with the paths that its images have on this host."""
        rescue = spec.rescue_image
        return msgspec.structs.replace(
            spec, image=self._image(spec.image), rescue_image=None if rescue is None else self._image(rescue)
        )

    def _image(self, image: Image) -> Image:
        initrd = None if image.initrd is None else self._local(image.initrd)
        return msgspec.structs.replace(image, path=self._local(image.path), initrd=initrd)

    def _local(self, path: str) -> str:
        """Return the path here of a file of the server. Nothing but copies and the shared folder is opened."""
        return path if self.reaches(path) else str(self._places["cache"] / cached_name(path))

    def spooled(self, name: str) -> Path:
        """Return the path of a file in the spool. Raises `OperationRejected` for an invalid name."""
        return self._file("spool", name)

    def _file(self, place: str, name: str) -> Path:
        if _NAME.fullmatch(name) is None or place not in self._places:
            raise OperationRejected(f"Invalid file name {name[:80]!r} or place {place[:80]!r}.")
        return self._places[place] / name

    # --------------------------------------------------------------------------------------------- copies of images

    async def has_image(self, path: str) -> bool:
        if self.reaches(path):
            return True
        copy = self._places["cache"] / cached_name(path)
        self._requested.add(copy.name)
        if not copy.exists():
            return False
        copy.touch()
        return True

    async def image_copies(self) -> dict[str, int]:
        used = await self._used()
        self._requested.clear()
        now_s = self._now_s()
        self._remove_expired(now_s)
        unused = {}
        for copy in self._copies():
            if str(copy) in used:
                copy.touch()
            else:
                unused[copy.name] = max(0, int((now_s - copy.stat().st_mtime) * 1000))
        return unused

    async def drop_image_copies(self, names: frozenset[str]) -> tuple[str, ...]:
        used = await self._used()
        gone = []
        for copy in self._copies():
            if copy.name in names and copy.name not in self._requested and str(copy) not in used:
                copy.unlink()
                gone.append(copy.name)
        return tuple(sorted(gone))

    async def _used(self) -> Collection[str]:
        """Return the paths of image files that guests need. Raises `OperationRejected` if that cannot be read."""
        try:
            return await asyncio.to_thread(self._images_in_use)
        except OSError as error:
            raise OperationRejected(f"Cannot read which images the guests of this host use: {error}.") from error

    def _copies(self) -> list[Path]:
        return [copy for copy in self._places["cache"].iterdir() if copy.suffix != PART]

    # ------------------------------------------------------------------------------------------------------- files

    async def file_write(self, place: str, name: str, offset: int, piece: bytes) -> None:
        """Raises OSError, with nothing left of the file."""
        await asyncio.to_thread(self._write, _draft(self._file(place, name)), offset, piece)

    def _write(self, path: Path, offset: int, piece: bytes) -> None:
        with _named(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if offset else os.O_TRUNC), 0o640)
            try:
                write_at(descriptor, piece, offset)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    async def file_keep(self, place: str, name: str, size: int, sha256: str) -> None:
        """Raises `OperationRejected`, OSError."""
        await asyncio.to_thread(self._keep, self._file(place, name), size, sha256)

    def _keep(self, path: Path, size: int, sha256: str) -> None:
        draft = _draft(path)
        with _named(draft):
            if not draft.exists():
                draft.touch(mode=0o640)
            with draft.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if found != sha256 or draft.stat().st_size != size:
                draft.unlink()
                raise OperationRejected(f"{path.name} was not received as it was sent.", remedy="Retry.")
            sync_file(draft)
            draft.rename(path)
            sync_folder(path.parent)

    async def file_read(self, name: str, offset: int) -> bytes:
        return await asyncio.to_thread(self._read, self.spooled(name), offset)

    def _read(self, path: Path, offset: int) -> bytes:
        with _named(path), path.open("rb") as content:
            return os.pread(content.fileno(), CHUNK_BYTES, offset)

    async def file_drop(self, name: str) -> None:
        path = self.spooled(name)
        for one in (path, _draft(path), *path.parent.glob(f"{name}.*{PART}")):
            one.unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------------------- downloads

    @contextlib.contextmanager
    def downloading(self, place: str, name: str, content: str) -> Iterator[int]:
        """Yield a descriptor of the partial file of that content, to be appended to; it becomes the draft afterwards.

        It stays after an error, so that it can be resumed; not after one of the file system.
        """
        path = self._file(place, name)
        if _CONTENT.fullmatch(content) is None:
            raise OperationRejected(f"Invalid content id {content[:80]!r}.")
        part = path.with_name(f"{name}.{content}{PART}")
        with _named(part):
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                yield descriptor
            except OSError:
                part.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
            part.rename(_draft(path))


def write_at(descriptor: int, piece: bytes, offset: int) -> None:
    """Write all of `piece`. A disk that is nearly full writes a part. Raises OSError."""
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _draft(path: Path) -> Path:
    return path.with_name(path.name + PART)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an OSError without a file name have this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
