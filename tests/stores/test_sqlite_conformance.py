"""The SQLite store keeps every promise of the port."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from conformance.store import CHECKS, Check, run
from interlock.ports import Clock
from interlock.stores.sqlite import SqliteStore


class SqliteUnderTest:
    """A database file in a folder; a power cut is looked at on a copy of what the files hold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._copies = itertools.count()

    def make(self, clock: Clock) -> SqliteStore:
        return SqliteStore(self._folder / "store.db", clock)

    def make_after_power_cut(self, clock: Clock) -> SqliteStore:
        # The log goes first: it is not carried over into the database while this copies, for the databases are small.
        folder = self._folder / f"copy{next(self._copies)}"
        folder.mkdir()
        for name in ("store.db-wal", "store.db"):
            shutil.copyfile(self._folder / name, folder / name)
        return SqliteStore(folder / "store.db", clock)


@pytest.mark.parametrize("promise", CHECKS, ids=lambda promise: promise.__name__)
async def test_sqlite(promise: Check, tmp_path: Path) -> None:
    await run(promise, SqliteUnderTest(tmp_path))
