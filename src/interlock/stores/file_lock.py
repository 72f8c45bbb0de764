"""The lock file of a database: ensures that one process uses it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final, Self

from interlock.core.errors import StoreBusy, StoreError


class FileLock:
    """A lock held by at most one process, and released by the kernel when that ends."""

    def __init__(self, database: Path) -> None:
        self._database: Final = database
        self._path: Final = database.with_name(f"{database.name}.lock")
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def take(self) -> None:
        """Lock the database for this process.

        Raises:
            StoreBusy: another process holds it; the message names its id.
            StoreError: the folder or file cannot be used.
        """
        self._check_paths()
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
            return  # disk full: the lock holds, only without the process id

    def unlock(self) -> None:
        """Release the lock and delete its file. Idempotent."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be created: {error.strerror}.",
                remedy="Give the server's user write access to the folder.",
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
        """Whether the locked file still exists: its former holder may have deleted it before it was locked here."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _check_paths(self) -> None:
        folder = self._database.parent
        if not folder.is_dir():
            raise StoreError(f"The folder {folder} does not exist.", remedy=f"Create it: mkdir -p {folder}")
        if self._database.exists() and not self._database.is_file():
            raise StoreError(f"{self._database} is not a file.", remedy="Name another file for the database.")
        for path in (folder, *([self._database] if self._database.exists() else [])):
            if not os.access(path, os.W_OK | os.R_OK):
                raise StoreError(
                    f"Permission denied: {path} cannot be written.",
                    remedy=f"Give the server's user read and write access to {path}.",
                )
