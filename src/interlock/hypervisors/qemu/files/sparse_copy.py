"""Sparse copies of files, in steps between which a worker can be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

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
    read_from, size = await uninterrupted(functools.partial(_open_source, source))
    try:
        permit.check()
        write_to = await uninterrupted(functools.partial(_open_target, target, size))
        try:
            position = 0
            while position < size:
                permit.check()
                position = await uninterrupted(functools.partial(_copy_step, read_from, write_to, position, size))
                report(position, size)
        finally:
            os.close(write_to)
    finally:
        os.close(read_from)


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


def _open_source(source: Path) -> tuple[int, int]:
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    return descriptor, os.fstat(descriptor).st_size


def _open_target(target: Path, size: int) -> int:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.truncate(descriptor, size)
    return descriptor


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
