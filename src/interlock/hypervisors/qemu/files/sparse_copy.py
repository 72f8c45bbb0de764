"""Sparse copies of files, in steps between which a worker can be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from interlock.ports import Permit, Report

AnswerT = TypeVar("AnswerT")

_STEP_BYTES: Final = 32 << 20
_CHUNK_BYTES: Final = 1 << 20
_CANNOT: Final = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


async def copy_sparse(permit: Permit, source: Path, target: Path, report: Report) -> None:
    """Copy `source` to `target`, a new file, with its holes.

    Raises:
        OSError: it could not be read or written.
        Fenced: the permit was lost.
    """
    async with opened(lambda: source.open("rb")) as reader:
        size = os.fstat(reader.fileno()).st_size
        permit.check()
        async with opened(functools.partial(_create, target)) as writer:
            copy_step = functools.partial(_copy_step, reader.fileno(), writer.fileno(), size=size)
            await uninterrupted(functools.partial(os.truncate, writer.fileno(), size))
            position = 0
            while position < size:
                permit.check()
                position = await uninterrupted(functools.partial(copy_step, position))
                report(position, size)


async def uninterrupted(step: Callable[[], AnswerT]) -> AnswerT:
    """Run a step in a thread. A cancelled worker waits for its end, so that it has no effect afterwards.

    Also one that is cancelled again: what the step uses may be closed next.
    """
    task = asyncio.ensure_future(asyncio.to_thread(step))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        raise


@contextlib.asynccontextmanager
async def opened(open_file: Callable[[], BinaryIO]) -> AsyncIterator[BinaryIO]:
    """Open a file in a thread. It is closed at the end, also if the worker is cancelled while the thread opens it."""
    with contextlib.ExitStack() as closing:
        yield await uninterrupted(lambda: closing.enter_context(open_file()))


def _create(target: Path) -> BinaryIO:
    """Create a file that only its owner can read. Raises `FileExistsError`."""
    return os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _copy_step(source: int, target: int, position: int, size: int) -> int:
    """Copy the next data after `position`; return the new position."""
    try:
        begin = os.lseek(source, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size  # the rest is a hole
    end = min(os.lseek(source, begin, os.SEEK_HOLE), begin + _STEP_BYTES)
    while begin < end:
        copied = _copy(source, target, begin, end - begin)
        if copied == 0:
            raise OSError(errno.EIO, "the file was truncated while it was copied")
        begin += copied
    return begin


def _copy(source: int, target: int, position: int, count: int) -> int:
    try:
        return os.copy_file_range(source, target, count, position, position)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    return os.pwrite(target, os.pread(source, min(count, _CHUNK_BYTES), position), position)
