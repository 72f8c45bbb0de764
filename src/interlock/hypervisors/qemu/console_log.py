"""The serial console's logs: their end is read, and they are kept from filling the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def end_of(console: Path, length: int) -> bytes | None:
    """The last so many bytes of the log; None where there is none."""
    try:
        with console.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - length))
            return log.read(length)
    except FileNotFoundError:
        return None


def cut(console: Path, bytes_max: int) -> bool:
    """If the log has grown beyond `bytes_max`, move its newest half to `NAME.1` and go on with an empty one.

    QEMU keeps the file open and always writes at its end, so that it goes on by itself. What it writes while this
    happens may be lost. Returns whether it was cut.
    """
    try:
        with console.open("r+b") as log:
            size = os.fstat(log.fileno()).st_size
            if size <= bytes_max:
                return False
            log.seek(size - bytes_max // 2)
            with console.with_name(console.name + ".1").open("wb") as older:
                shutil.copyfileobj(log, older)
            log.truncate(0)
    except FileNotFoundError:
        return False
    return True
