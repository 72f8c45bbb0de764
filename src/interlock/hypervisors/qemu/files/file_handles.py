"""Opens files for QEMU, which gets descriptors and no paths."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import OrderedDict
from pathlib import Path
from typing import Final

from interlock.core.errors import OperationRejected

_COPIES_MAX: Final = 8
"""How many kernels and initrds are kept in memory for the next VM that boots them."""
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def open_disk(path: Path, *, read_only: bool) -> int:
    """Open a disk. Raises `OperationRejected`."""
    return _open(path, os.O_RDONLY if read_only else os.O_RDWR)


class BootFiles:
    """Kernels and initrds, as copies in memory that cannot be changed.

    QEMU opens them again by their `/proc` path, for which its user needs permission. Such a copy may be opened by
    whoever has its descriptor, so that the file itself need not be readable to any VM's user. VMs share the copies.
    """

    def __init__(self) -> None:
        self._copies: OrderedDict[tuple[int, ...], int] = OrderedDict()

    def open(self, path: Path) -> int:
        """Return a new descriptor of the copy of a file. Blocks while it is made. Raises `OperationRejected`."""
        source = _open(path, os.O_RDONLY)
        try:
            found = os.fstat(source)
            identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if identity not in self._copies:
                self._copies[identity] = _sealed_copy(source, found.st_size)
                if len(self._copies) > _COPIES_MAX:
                    os.close(self._copies.popitem(last=False)[1])
            self._copies.move_to_end(identity)
            return fcntl.fcntl(self._copies[identity], fcntl.F_DUPFD_CLOEXEC, 0)
        finally:
            os.close(source)

    def close(self) -> None:
        """Forget the copies; those of running VMs stay."""
        while self._copies:
            os.close(self._copies.popitem()[1])


def _sealed_copy(source: int, size: int) -> int:
    copy = os.memfd_create("boot file", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        offset = 0
        while offset < size and (sent := os.sendfile(copy, source, offset, size - offset)):
            offset += sent
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(copy)
        raise
    return copy


def _open(path: Path, access: int) -> int:
    try:
        return os.open(path, access | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        remedy = "Free some descriptors." if error.errno in {errno.EMFILE, errno.ENFILE} else "Restore the file."
        raise OperationRejected(f"{path} cannot be opened: {error.strerror}.", remedy=remedy) from error
