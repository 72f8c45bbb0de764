"""Files over HTTP ranges, agent side: downloads that resume after a break, and uploads range by range."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final, Protocol

from interlock.core.errors import OperationRejected
from interlock.hypervisors.qemu.files.sparse_copy import opened, uninterrupted
from interlock.hypervisors.remote.file_cache import FileCache, write_at
from interlock.hypervisors.remote.methods import Extents
from interlock.hypervisors.remote.protocol import CHUNK_BYTES
from interlock.ports import Report

RANGE_BYTES: Final = 8 << 20
"""The bytes of one upload request."""
_ATTEMPTS_MAX: Final = 7
"""Maximum number of consecutive attempts without progress."""
_BACKOFF_S: Final = 0.2
"""The pause before the second attempt; doubled before each further one."""


class RangeServer(Protocol):
    """The server's files, by the id of a transfer.

    Both raise `ConnectionError` if a retry may succeed, and `OperationRejected` if not.
    """

    def download(self, transfer: str, start: int, end: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Open the bytes of the file from `start` to before `end`."""
        ...

    async def upload(self, transfer: str, offset: int, piece: bytes) -> None:
        """Write a range of the file. Idempotent."""
        ...


class RangeTransfers:
    """Implements `methods.RangeCalls`.

    Args:
        cache: where the files are.
        server: has them, or receives them.
        backoff_s: the pause before the second attempt, in seconds.
    """

    def __init__(self, cache: FileCache, server: RangeServer, backoff_s: float = _BACKOFF_S) -> None:
        self._cache = cache
        self._server = server
        self._backoff_s = backoff_s

    async def file_download(
        self, place: str, name: str, transfer: str, content: str, size: int, extents: Extents, report: Report
    ) -> None:
        with self._cache.downloading(place, name, content) as descriptor:
            if _size(descriptor) > size:
                os.ftruncate(descriptor, 0)

            def on_progress(done: int) -> None:
                report(done, size)

            async def download() -> None:
                for start, end in extents:
                    while (offset := max(start, _size(descriptor))) < end:
                        async with self._server.download(transfer, offset, end) as chunks:
                            await _append(descriptor, chunks, offset, min(end, size), on_progress)

            await self._retried(f"download {name}", download, lambda: _size(descriptor))
            os.ftruncate(descriptor, size)
        report(size, size)

    async def file_upload(self, name: str, transfer: str, report: Report) -> str:
        digest, offset = hashlib.sha256(), 0
        path = self._cache.spooled(name)
        async with opened(lambda: path.open("rb")) as content:
            size = os.fstat(content.fileno()).st_size
            while piece := await uninterrupted(partial(content.read, RANGE_BYTES)):
                digest.update(piece)

                async def upload(offset: int = offset, piece: bytes = piece) -> None:
                    await self._server.upload(transfer, offset, piece)

                await self._retried(f"upload {name}", upload, lambda: 0)
                offset += len(piece)
                report(offset, size)
        report(offset, size)
        return digest.hexdigest()

    async def _retried(self, what: str, attempt: Callable[[], Awaitable[None]], done: Callable[[], int]) -> None:
        """Retry while connections break. Raises `OperationRejected` after too many attempts without progress."""
        failures = 0
        while True:
            before = done()
            try:
                return await attempt()
            except ConnectionError as error:
                failures = 1 if done() > before else failures + 1
                if failures >= _ATTEMPTS_MAX:
                    raise OperationRejected(
                        f"Cannot {what}: {str(error) or type(error).__name__}.",
                        remedy="See that the agent reaches the server.",
                    ) from error
            await asyncio.sleep(self._backoff_s * 2 ** (failures - 1))


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


async def _append(
    descriptor: int, chunks: AsyncIterator[bytes], offset: int, end: int, report: Callable[[int], None]
) -> None:
    """Write the bytes from `offset` to `end`, as far as they come. Raises `ConnectionError` if none come."""
    buffer, received = bytearray(), offset
    try:
        async for chunk in chunks:
            buffer += chunk[: end - received]
            received = min(end, received + len(chunk))
            if len(buffer) >= CHUNK_BYTES:
                await uninterrupted(partial(_write, descriptor, bytes(buffer), offset))
                offset += len(buffer)
                buffer.clear()
                report(offset)
    finally:
        if buffer:
            await uninterrupted(partial(_write, descriptor, bytes(buffer), offset))
    if received < end:
        raise ConnectionError(f"the response ended after {received} of {end} bytes")
    report(end)


def _write(descriptor: int, piece: bytes, offset: int) -> None:
    """Write a piece; a piece of zeros becomes a hole. Raises OSError."""
    if piece.strip(b"\0"):
        write_at(descriptor, piece, offset)
    else:
        os.ftruncate(descriptor, max(_size(descriptor), offset + len(piece)))
