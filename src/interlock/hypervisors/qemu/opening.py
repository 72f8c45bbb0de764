"""Files opened for QEMU, which is given no path of its own. What they are handed over to is elsewhere."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from interlock.core.errors import Refused
from interlock.hypervisors.qemu.process import Account

_READ_BY_OTHERS: Final = 0o004
_READ_BY_GROUP: Final = 0o040


def open_disk(path: Path, *, read_only: bool) -> int:
    """Open a disk for QEMU. Raises `Refused` with what is wrong with it."""
    return _open(path, os.O_RDONLY if read_only else os.O_RDWR)


def open_kernel(path: Path, account: Account | None) -> int:
    """Open a kernel or initial file system so that QEMU's user, who opens it once more, may read it too."""
    descriptor = _open(path, os.O_RDONLY)
    mode = os.fstat(descriptor).st_mode
    if account is not None and not mode & _READ_BY_OTHERS:
        os.fchown(descriptor, -1, account.group_id)
        os.fchmod(descriptor, mode | _READ_BY_GROUP)
    return descriptor


def _open(path: Path, access: int) -> int:
    try:
        return os.open(path, access | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        remedy = "Free some descriptors." if error.errno in {errno.EMFILE, errno.ENFILE} else "Put the file back."
        raise Refused(f"{path} cannot be opened: {error.strerror}.", remedy=remedy) from error
