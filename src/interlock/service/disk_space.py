"""Disk space monitor of the data folder: free, low or full."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog

from interlock.core.errors import StoreError
from interlock.service.capacity import disk_free_mib

_LOG = structlog.get_logger(__name__)
_INTERVAL_S: Final = 1.0
_MIB: Final = 1 << 20


class MayBeFull(Protocol):
    """The part of a store that detects a full disk."""

    @property
    def full(self) -> bool:
        """Whether it accepts only writes that free space."""
        ...

    async def retry_full(self) -> None:
        """Check whether it is still full. Raises `StoreError` if so."""
        ...


class SpaceLeft(msgspec.Struct, frozen=True, kw_only=True):
    """Free space of the data folder's file system."""

    free_mib: int
    low: bool
    """Whether it is below the configured threshold."""
    full: bool
    """Whether the store accepts only writes that free space."""

    @property
    def free_bytes(self) -> int:
        return self.free_mib * _MIB


class DiskSpace:
    """Monitors the file system of the data folder.

    Args:
        folder: the data folder.
        low_mib: threshold of low free space, in MiB.
        store: the store in that folder.
        note: records an event of this host: kind, detail.
    """

    def __init__(
        self, folder: Path, low_mib: int, store: MayBeFull, note: Callable[[str, str], Awaitable[None]]
    ) -> None:
        self._folder = folder
        self._low_mib = low_mib
        self._store = store
        self._note = note
        self._full_sentence = f"No space left on the file system of {folder}: VMs can only be stopped and deleted."
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start to report when the disk becomes full and when it has space again."""
        self._task = asyncio.create_task(self._run(), name="disk space")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        reported = False
        while True:
            with contextlib.suppress(StoreError):
                if self._store.full and reported:
                    await self._store.retry_full()
                if self._store.full is not reported:
                    reported = self._store.full
                    await self._report(full=reported)
            await asyncio.sleep(_INTERVAL_S)

    async def _report(self, *, full: bool) -> None:
        if full:
            _LOG.warning("disk full", what=self._full_sentence)
            await self._note("disk_full", self._full_sentence)
        else:
            detail = f"The file system of {self._folder} has space again: {disk_free_mib(self._folder)} MiB free."
            _LOG.info("disk space recovered", what=detail)
            await self._note("disk_has_space", detail)

    async def look(self) -> SpaceLeft:
        if self._store.full:
            with contextlib.suppress(StoreError):
                await self._store.retry_full()
        free_mib = disk_free_mib(self._folder)
        return SpaceLeft(free_mib=free_mib, low=free_mib < self._low_mib, full=self._store.full)

    async def warnings(self) -> tuple[str, ...]:
        """Return warnings about low or missing space, one sentence each."""
        left = await self.look()
        if left.full:
            return (self._full_sentence,)
        return (f"Low disk space: {left.free_mib} MiB free on the file system of {self._folder}.",) if left.low else ()
