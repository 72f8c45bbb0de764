"""The logs of serial consoles: read from the end, and limited in size.

This file is also a program (`limit_sizes`), and therefore needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
from pathlib import Path
from typing import Final

_LIMITER_LOCK: Final = "console-logs.lock"
"""Locked by the process that limits the logs of a folder, for as long as it lives."""
_IDLE_MS: Final = 60_000
"""How long that process runs on without a running guest."""
_INODE: Final = 5
"""The field of a line of /proc/locks that has device and inode."""


def limiter_command(folder: Path, bytes_max: int, interval_ms: int) -> list[str] | None:
    """Return the command that limits the logs in `folder`; None if that process runs already."""
    lock = os.open(folder / _LIMITER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    finally:
        os.close(lock)
    return [sys.executable, "-I", "-S", __file__, str(folder), str(bytes_max), str(interval_ms)]


def tail(console: Path, length: int) -> bytes | None:
    """Return the last `length` bytes of the log; None if there is none."""
    try:
        with console.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - length))
            return log.read(length)
    except FileNotFoundError:
        return None


def truncate(console: Path, bytes_max: int) -> bool:
    """If the log is larger than `bytes_max`, move its newest half to `NAME.1` and truncate it.

    QEMU has the file open for appending, and continues in the empty file. What it writes meanwhile may be lost. Returns
    whether it was truncated.
    """
    try:
        with console.open("r+b") as log:
            size = os.fstat(log.fileno()).st_size
            if size <= bytes_max:
                return False
            log.seek(size - bytes_max // 2)
            with console.with_name(console.name + ".1").open("wb") as older:
                older.write(log.read(bytes_max // 2))  # without what is written meanwhile
            log.truncate(0)
    except FileNotFoundError:
        return False
    return True


def limit_sizes(folder: Path, bytes_max: int, interval_ms: int) -> None:
    """Limit the logs of the guests in `folder` until no guest runs there any more.

    Runs as a process of its own, which outlives the server: a guest writes while no server runs. There is one per
    folder; a second one ends at once.
    """
    lock = os.open(folder / _LIMITER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    idle_ms = 0
    while idle_ms < _IDLE_MS:
        select.poll().poll(interval_ms)
        try:
            instances = list((folder / "vms").iterdir())
        except FileNotFoundError:
            return
        running, locked = False, _locked_files()
        for instance in instances:
            with contextlib.suppress(OSError):
                running = running or (instance / "lock").stat().st_ino in locked
                truncate(instance / "console.log", bytes_max)
        idle_ms = 0 if running else idle_ms + interval_ms


def _locked_files() -> frozenset[int]:
    """Return the inodes of locked files. Trying the locks instead could prevent a guest from getting its own."""
    fields = (line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines())
    return frozenset(int(line[5].rpartition(":")[2]) for line in fields if len(line) > _INODE and line[1] == "FLOCK")


if __name__ == "__main__":
    limit_sizes(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
