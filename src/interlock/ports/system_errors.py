"""Conversion of OSError to the error tree, with path, reason and remedy."""

from __future__ import annotations

import errno
import os
from typing import Final

from interlock.core.errors import NoSpace, SystemFailed

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_REMEDIES: Final = {
    errno.ENOSPC: "Free space on that file system, then retry.",
    errno.EDQUOT: "Raise the quota or free space, then retry.",
    errno.EIO: "Check the storage: see the kernel log (dmesg).",
    errno.EROFS: "Remount the file system read-write, then retry.",
    errno.EACCES: "Grant the user of the process read and write permission, then retry.",
    errno.EPERM: "Grant the user of the process read and write permission, then retry.",
    errno.EMFILE: "Raise the limit of open files of the process (`ulimit -n`, LimitNOFILE), then retry.",
    errno.ENFILE: "Raise the system's limit of open files (fs.file-max), then retry.",
    errno.ENOMEM: "Free memory on that machine, then retry.",
}


def system_failure(error: OSError, where: str) -> SystemFailed | None:
    """Return the error for people; None for an OSError without errno, which is a bug.

    `where` names the machine, such as `the host north`. The message has the path, if the error has one.
    """
    if error.errno is None:
        return None
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    reason = error.strerror or os.strerror(error.errno)
    of = f" ({', '.join(paths)})" if paths else ""
    kind = NoSpace if error.errno in _NO_SPACE else SystemFailed
    return kind(f"{reason} on {where}{of}.", remedy=_REMEDIES.get(error.errno))
