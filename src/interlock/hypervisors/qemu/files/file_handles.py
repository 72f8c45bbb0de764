"""Opens files for QEMU, which gets descriptors and no paths."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from interlock.core.errors import OperationRejected
from interlock.images.subprocess_runner import Account

_READ_BY_OTHERS: Final = 0o004
_READ_BY_GROUP: Final = 0o040


def open_disk(path: Path, *, read_only: bool) -> int:
    """Open a disk. Raises `OperationRejected`."""
    return _open(path, os.O_RDONLY if read_only else os.O_RDWR)


def open_kernel(path: Path, account: Account | None) -> int:
    """Open a kernel or initrd, and let QEMU's user read it, who opens it by its `/proc` path."""
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
        remedy = "Free some descriptors." if error.errno in {errno.EMFILE, errno.ENFILE} else "Restore the file."
        raise OperationRejected(f"{path} cannot be opened: {error.strerror}.", remedy=remedy) from error
