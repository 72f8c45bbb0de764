"""Files that go from the server to a host or back: images that guests boot there, disks and dumps that are kept here.

They go over the same connection, in pieces, each answered before the next, so that nothing else waits long behind
them; what arrived is kept only if its SHA-256 is that of what was sent. What is in them is not looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

from interlock.core.errors import InterlockError, Refused
from interlock.core.records import Image, Spec
from interlock.hypervisors.durable_files import FETCHED, sync_file, sync_folder
from interlock.hypervisors.remote.session import Session
from interlock.hypervisors.remote.wire import CHUNK_BYTES
from interlock.ports import Permit, Report

_DRAFT: Final = ".part"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


def image_files(spec: Spec) -> tuple[str, ...]:
    """The files that the server has of the images of `spec`."""
    images = [spec.image, *([spec.rescue_image] if spec.rescue_image is not None else [])]
    return tuple(path for image in images for path in (image.path, image.initrd) if path is not None)


def source_of(instance_id: str) -> str:
    """What the file is called on the host from which a method reads."""
    return f"{instance_id}.source"


def target_of(instance_id: str) -> str:
    """What the file is called on the host to which a method writes."""
    return f"{instance_id}.target"


# ------------------------------------------------------------------------------------------------ the server's side


async def send_image(session: Session, permit: Permit, path: str) -> None:
    """Send an image's file that the host has not. One that is not here either is for the host to refuse."""
    source = Path(path)
    if not await asyncio.to_thread(source.is_file) or await session.call("image_there", "", (path,), bool):
        return
    await send(session, permit, cached_name(path), source, place="cache")


async def send(
    session: Session, permit: Permit, name: str, source: Path, *, place: str = "spool", report: Report | None = None
) -> None:
    """Send a file, which is there whole when this returns.

    Raises:
        Refused: it cannot be read here, or kept there.
    """
    digest, offset = hashlib.sha256(), 0
    try:
        content = await asyncio.to_thread(source.open, "rb")
        total = os.fstat(content.fileno()).st_size
    except OSError as error:
        raise Refused(f"{source} cannot be read: {error.strerror}.", remedy="Put the file back.") from error
    with content:
        while piece := await asyncio.to_thread(content.read, CHUNK_BYTES):
            permit.check()
            await session.call("file_write", "", (place, name, offset, piece), None)
            digest.update(piece)
            offset += len(piece)
            if report is not None:
                report(offset, total)
    await session.call("file_keep", "", (place, name, offset, digest.hexdigest()), None)


@contextlib.asynccontextmanager
async def spooled(session: Session, permit: Permit, name: str) -> AsyncIterator[None]:
    """Have the host's file of that name removed in the end, whole or not.

    One that cannot be told removes it when it is connected again. Whoever has lost the permit leaves it to who has it
    now, and may have another file under that name already.
    """
    try:
        yield
    finally:
        with contextlib.suppress(InterlockError):
            permit.check()
            await session.call("file_drop", "", (name,), None)


async def fetch(session: Session, permit: Permit, name: str, target: Path, report: Report) -> None:
    """Fetch a file to `target`, which is there whole or not at all."""
    draft = target.with_suffix(FETCHED)
    try:
        with draft.open("wb") as content:
            offset = 0
            while piece := await session.call("file_read", "", (name, offset), bytes):
                permit.check()
                await asyncio.to_thread(content.write, piece)
                offset += len(piece)
                report(offset)
            report(offset, offset)
            await asyncio.to_thread(_sync, content.fileno())
        permit.check()
        draft.rename(target)
        await asyncio.to_thread(sync_folder, target.parent)
    except OSError as error:
        raise Refused(f"{target} cannot be written: {error.strerror}.", remedy="Make room there.") from error
    finally:
        draft.unlink(missing_ok=True)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


# ------------------------------------------------------------------------------------------------- the host's side


def cached_name(path: str) -> str:
    """What the host calls the copy of a file that the server has under `path`."""
    return f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{Path(path).name[-100:]}"


class Shelf:
    """The files that the server has sent, and those that it is to fetch."""

    def __init__(self, folder: Path, shared: Path | None) -> None:
        self._places = {"cache": folder / "images", "spool": folder / "spool"}
        self._listed = folder / "images.listed"
        self._shared = shared
        self._asked_for: set[str] = set()
        """The copies of images that were asked for or arrived since they were last listed."""

    def open(self) -> None:
        """Make the folders, and remove what an agent before this one left on its way."""
        for place in self._places.values():
            place.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.clear()

    def clear(self) -> None:
        """Remove what was only on its way when the connection ended."""
        for left in (*self._places["cache"].glob(f"*{_DRAFT}"), *self._places["spool"].iterdir()):
            left.unlink(missing_ok=True)

    def reaches(self, path: str) -> bool:
        """Whether a file of the server is the same file here."""
        if self._shared is None:
            return False
        place = Path(os.path.normpath(path))
        return place.is_relative_to(self._shared) and place.exists()

    def shares(self, folder: str) -> bool:
        """Whether a folder is in the one that this host was told that it shares."""
        return self._shared is not None and Path(os.path.normpath(folder)).is_relative_to(self._shared)

    def here(self, path: str) -> str:
        """Under which name a file of the server is found here; its own if it is not here."""
        cached = self._places["cache"] / cached_name(path)
        return str(cached) if not self.reaches(path) and cached.exists() else path

    def image_there(self, path: str) -> bool:
        if self.reaches(path):
            return True
        copy = self._places["cache"] / cached_name(path)
        self._asked_for.add(copy.name)
        if not copy.exists():
            return False
        copy.touch()
        return True

    def at_home(self, spec: Spec) -> Spec:
        """The spec, with its images under the names that they have here."""
        rescue = spec.rescue_image
        return msgspec.structs.replace(
            spec, image=self._image(spec.image), rescue_image=None if rescue is None else self._image(rescue)
        )

    def _image(self, image: Image) -> Image:
        initrd = None if image.initrd is None else self.here(image.initrd)
        return msgspec.structs.replace(image, path=self.here(image.path), initrd=initrd)

    def spooled(self, name: str) -> Path:
        return self._file("spool", name)

    def copies(self, used: Collection[str]) -> dict[str, int]:
        """How long ago each copy of an image was last used, in ms, by its name, without those among `used`: the paths
        that guests here need, which count as used now.
        """
        self._asked_for.clear()
        self._listed.touch()
        now_s = self._listed.stat().st_mtime  # what has its clock's time must be compared with that
        unused = {}
        for copy in self._copies():
            if str(copy) in used:
                copy.touch()
            else:
                unused[copy.name] = max(0, int((now_s - copy.stat().st_mtime) * 1000))
        return unused

    def drop_copies(self, names: Collection[str], used: Collection[str]) -> tuple[str, ...]:
        """Remove those copies of images, but none among `used` and none that was asked for since they were listed; the
        names of those that are gone.
        """
        gone = []
        for copy in self._copies():
            if copy.name in names and copy.name not in self._asked_for and str(copy) not in used:
                copy.unlink()
                gone.append(copy.name)
        return tuple(sorted(gone))

    def _copies(self) -> list[Path]:
        return [copy for copy in self._places["cache"].iterdir() if copy.suffix != _DRAFT]

    def _file(self, place: str, name: str) -> Path:
        if _NAME.fullmatch(name) is None or place not in self._places:
            raise Refused(f"The file {name[:80]!r} cannot be kept here.")
        return self._places[place] / name

    async def write(self, place: str, name: str, offset: int, piece: bytes) -> None:
        await asyncio.to_thread(self._write, _draft(self._file(place, name)), offset, piece)

    def _write(self, path: Path, offset: int, piece: bytes) -> None:
        with _telling():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if offset else os.O_TRUNC), 0o644)
            try:
                os.pwrite(descriptor, piece, offset)
            finally:
                os.close(descriptor)

    async def keep(self, place: str, name: str, size: int, sha256: str) -> None:
        """Keep what was written, if it is whole. Raises `Refused`."""
        await asyncio.to_thread(self._keep, self._file(place, name), size, sha256)

    def _keep(self, path: Path, size: int, sha256: str) -> None:
        draft = _draft(path)
        with _telling():
            if not draft.exists():
                draft.touch(mode=0o644)
            with draft.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if found != sha256 or draft.stat().st_size != size:
                draft.unlink()
                raise Refused(f"{path.name} did not arrive as it was sent.", remedy="Ask again.")
            sync_file(draft)
            draft.rename(path)
            sync_folder(path.parent)

    async def read(self, name: str, offset: int) -> bytes:
        return await asyncio.to_thread(self._read, self.spooled(name), offset)

    def _read(self, path: Path, offset: int) -> bytes:
        with _telling(), path.open("rb") as content:
            return os.pread(content.fileno(), CHUNK_BYTES, offset)

    def drop(self, name: str) -> None:
        path = self.spooled(name)
        for one in (path, _draft(path)):
            one.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(path.name + _DRAFT)


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(f"{error.filename}: {error.strerror}.", remedy="See that there is room on the host.") from error
