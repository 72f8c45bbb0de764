"""The lock that says which process has a database: a file beside it. The database itself is not opened here."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final, Self

from interlock.core.errors import StoreBusy, StoreError


class FileLock:
    """Held by at most one process at a time; gone with the process that holds it, however that ends."""

    def __init__(self, database: Path) -> None:
        self._database: Final = database
        self._path: Final = database.with_name(f"{database.name}.lock")
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()

    def take(self) -> None:
        """Lock the database for this process.

        Raises:
            StoreBusy: another process has it; the message names its id.
            StoreError: the place cannot be used.
        """
        self._check_place()
        while self._descriptor is None:
            descriptor = self._lock()
            if self._is_there(descriptor):
                self._descriptor = descriptor
            else:
                os.close(descriptor)
        os.ftruncate(self._descriptor, 0)
        try:
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        except OSError:
            return  # a full disk: the lock holds all the same, only without telling whose it is

    def let_go(self) -> None:
        """Give the lock up and remove its file. Does nothing a second time."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be made: {error.strerror}.", remedy="Let the server's user write the folder."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StoreBusy(
                f"Process {holder or 'of unknown id'} holds {self._database}.",
                remedy=f"Stop that server{f' (kill {holder})' if holder else ''}, or name another database file.",
            ) from error
        return descriptor

    def _is_there(self, descriptor: int) -> bool:
        """Whether what was locked is the file still, and was not removed by its holder before it was locked here."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _check_place(self) -> None:
        folder = self._database.parent
        if not folder.is_dir():
            raise StoreError(f"The folder {folder} does not exist.", remedy=f"Make it: mkdir -p {folder}")
        if self._database.exists() and not self._database.is_file():
            raise StoreError(f"{self._database} is not a file.", remedy="Name another file for the database.")
        wanted = [folder, *([self._database] if self._database.exists() else [])]
        for place in wanted:
            if not os.access(place, os.W_OK | os.R_OK):
                raise StoreError(f"{place} cannot be written.", remedy=f"Let the server's user read and write {place}.")
