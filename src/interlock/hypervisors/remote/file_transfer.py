"""Files between the server and a host, server side: images that guests boot there, and disks, exports and dumps.

A file travels over HTTP ranges beside the connection, or in messages if the agent's protocol has no ranges. It is kept
if its SHA-256 is that of what was sent. Its content is not inspected.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from interlock.core.errors import InterlockError, NotFound, OperationRejected
from interlock.core.records import Spec
from interlock.hypervisors.qemu.files.sparse_copy import opened, uninterrupted
from interlock.hypervisors.remote.file_cache import cached_name, write_at
from interlock.hypervisors.remote.methods import Extents, FileCalls, RangeCalls
from interlock.hypervisors.remote.protocol import CHUNK_BYTES
from interlock.hypervisors.remote.server_session import ServerSession
from interlock.images.atomic_files import FETCHED, sync_folder
from interlock.ports import Permit, Report

_RANGES_SINCE: Final = 5
"""The first version of the protocol with `RangeCalls`."""
_HOLE_BYTES_MIN: Final = 1 << 20
"""The smallest hole that is not sent."""
_EXTENTS_MAX: Final = 10_000
_DIGEST_BYTES: Final = 8 << 20
"""How much is hashed at once, in a thread."""


def image_files(spec: Spec) -> tuple[str, ...]:
    """Return the paths of the server's files of the images of `spec`."""
    images = [spec.image, *([spec.rescue_image] if spec.rescue_image is not None else [])]
    return tuple(path for image in images for path in (image.path, image.initrd) if path is not None)


class _Incoming:
    """A file that the agent uploads."""

    def __init__(self, content: BinaryIO) -> None:
        self.descriptor = content.fileno()
        self.writing = asyncio.Lock()


class FileTransfers:
    """The files of one host.

    Args:
        session: returns the agent's session, or raises `NotResponding`.
    """

    def __init__(self, session: Callable[[], ServerSession]) -> None:
        self._session = session
        self._sending: dict[str, asyncio.Lock] = {}
        """By path: an image is sent once to a host that needs it twice."""
        self._outgoing: dict[str, Path] = {}
        self._incoming: dict[str, _Incoming] = {}
        """The transfers over HTTP by id, which exist only during the call for which they were created."""

    async def send_images(self, permit: Permit, spec: Spec) -> None:
        """Send the files of the images of `spec` that the host does not have."""
        for path in image_files(spec):
            async with self._sending.setdefault(path, asyncio.Lock()):
                # A file that the server does not have either is rejected by the host.
                if await asyncio.to_thread(Path(path).is_file):
                    session = self._session()
                    if not await session.call(FileCalls.has_image, path):
                        await self.send(session, permit, cached_name(path), Path(path), place="cache")

    async def image_copies(self) -> dict[str, int]:
        return await self._session().call(FileCalls.image_copies)

    async def drop_image_copies(self, names: Collection[str]) -> tuple[str, ...]:
        return await self._session().call(FileCalls.drop_image_copies, frozenset(names))

    @contextlib.asynccontextmanager
    async def spooled(self, permit: Permit, name: str) -> AsyncIterator[ServerSession]:
        """Yield the session, and remove the host's file of that name at the end, complete or not.

        A disconnected host removes it by itself. A caller that has lost the permit leaves it to the permit's present
        holder, who may use the same name already.
        """
        session = self._session()
        try:
            yield session
        finally:
            with contextlib.suppress(InterlockError):
                permit.check()
                await session.call(FileCalls.file_drop, name)

    async def send(
        self,
        session: ServerSession,
        permit: Permit,
        name: str,
        source: Path,
        *,
        place: str = "spool",
        report: Report | None = None,
    ) -> None:
        """Send a file; the host has it completely when this returns.

        Raises:
            OperationRejected: it cannot be read here, or written there.
        """

        def on_progress(done: int, total: int | None = None) -> None:
            permit.check()
            if report is not None:
                report(done, total)

        send = self._send_ranges if session.version >= _RANGES_SINCE else self._send_messages
        try:
            size, sha256 = await send(session, place, name, source, on_progress)
        except OSError as error:
            raise OperationRejected(
                f"{source} cannot be read: {error.strerror}.", remedy="Put the file back."
            ) from error
        await session.call(FileCalls.file_keep, place, name, size, sha256)

    async def _send_ranges(
        self, session: ServerSession, place: str, name: str, source: Path, report: Report
    ) -> tuple[int, str]:
        found = await asyncio.to_thread(source.stat)
        extents = await asyncio.to_thread(_extents, source, found.st_size)
        content = f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"
        transfer = secrets.token_urlsafe(24)
        self._outgoing[transfer] = source
        hashing = asyncio.create_task(_sha256(source), name=f"hash {source.name}")
        try:
            await session.call(RangeCalls.file_download, place, name, transfer, content, found.st_size, extents, report)
            return await hashing
        finally:
            del self._outgoing[transfer]
            hashing.cancel()
            await asyncio.gather(hashing, return_exceptions=True)

    async def _send_messages(
        self, session: ServerSession, place: str, name: str, source: Path, report: Report
    ) -> tuple[int, str]:
        digest, offset = hashlib.sha256(), 0
        async with opened(lambda: source.open("rb")) as content:
            total = os.fstat(content.fileno()).st_size
            while piece := await asyncio.to_thread(content.read, CHUNK_BYTES):
                await session.call(FileCalls.file_write, place, name, offset, piece)
                digest.update(piece)
                offset += len(piece)
                report(offset, total)
        return offset, digest.hexdigest()

    async def fetch(self, session: ServerSession, permit: Permit, name: str, target: Path, report: Report) -> None:
        """Fetch a file of the host's spool to `target`, atomically. Raises as `send`."""
        draft = target.with_suffix(FETCHED)
        fetch = self._fetch_ranges if session.version >= _RANGES_SINCE else self._fetch_messages

        def on_progress(done: int, total: int | None = None) -> None:
            permit.check()
            report(done, total)

        try:
            with draft.open("w+b") as content:
                await fetch(session, name, draft, content, on_progress)
                await asyncio.to_thread(os.fsync, content.fileno())
            permit.check()
            draft.rename(target)
            await asyncio.to_thread(sync_folder, target.parent)
        except OSError as error:
            raise OperationRejected(
                f"{target} cannot be written: {error.strerror}.", remedy="Make room there."
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    async def _fetch_ranges(
        self, session: ServerSession, name: str, draft: Path, content: BinaryIO, report: Report
    ) -> None:
        transfer = secrets.token_urlsafe(24)
        incoming = self._incoming[transfer] = _Incoming(content)
        try:
            sha256 = await session.call(RangeCalls.file_upload, name, transfer, report)
        finally:
            del self._incoming[transfer]
            async with incoming.writing:
                pass  # the last write ends before the descriptor is closed or the file hashed
        _, found = await _sha256(draft)
        if found != sha256:
            raise OperationRejected(f"{name} was not received as it was sent.", remedy="Retry.")

    async def _fetch_messages(
        self, session: ServerSession, name: str, _draft: Path, content: BinaryIO, report: Report
    ) -> None:
        offset = 0
        while piece := await session.call(FileCalls.file_read, name, offset):
            await asyncio.to_thread(content.write, piece)
            offset += len(piece)
            report(offset)
        await asyncio.to_thread(content.flush)
        report(offset, offset)

    # ------------------------------------------------------------------------------------- requests of the agent

    def outgoing(self, transfer: str) -> Path:
        """Return the file that is sent in that transfer. Raises `NotFound`."""
        path = self._outgoing.get(transfer)
        if path is None or not path.is_file():
            raise _no_transfer()
        return path

    async def receive(self, transfer: str, offset: int, chunks: AsyncIterator[bytes]) -> None:
        """Write chunks of a file that is fetched in that transfer. Raises `NotFound`, OSError."""
        async for chunk in chunks:
            incoming = self._incoming.get(transfer)
            if incoming is None:
                raise _no_transfer()
            async with incoming.writing:
                if transfer not in self._incoming:
                    raise _no_transfer()
                # A descriptor of its own: the file may be closed meanwhile, and its number be that of another.
                await uninterrupted(partial(_write_and_close, os.dup(incoming.descriptor), chunk, offset))
            offset += len(chunk)


def _write_and_close(descriptor: int, chunk: bytes, offset: int) -> None:
    try:
        write_at(descriptor, chunk, offset)
    finally:
        os.close(descriptor)


def _extents(path: Path, size: int) -> Extents:
    """Return the parts of a file that are no holes; small and late holes count as data. Raises OSError."""
    found: list[tuple[int, int]] = []
    with path.open("rb") as content:
        end = 0
        while end < size:
            try:
                start = os.lseek(content.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # a hole up to the end
            end = os.lseek(content.fileno(), start, os.SEEK_HOLE)
            if found and start - found[-1][1] < _HOLE_BYTES_MIN:
                start, _ = found.pop()
            if len(found) == _EXTENTS_MAX:
                return (*found, (start, size))
            found.append((start, min(end, size)))
    return tuple(found)


def _no_transfer() -> NotFound:
    return NotFound("Transfer not found: it has ended.", remedy="Retry the operation.")


async def _sha256(path: Path) -> tuple[int, str]:
    """Return size and SHA-256 of a file. It can be cancelled between two parts. Raises OSError."""
    digest, size = hashlib.sha256(), 0

    def read(content: BinaryIO) -> int:
        part = content.read(_DIGEST_BYTES)
        digest.update(part)
        return len(part)

    async with opened(lambda: path.open("rb")) as content:
        while length := await uninterrupted(partial(read, content)):
            size += length
    return size, digest.hexdigest()
