"""The identity of a host: an id that is created once, in its VM folder.

To a server, a host is its VM folder: another folder has other guests, whatever the name of the host.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from pathlib import Path
from typing import Final

from interlock.core.errors import Unavailable
from interlock.images.atomic_files import sync_folder, write_atomically
from interlock.ports.hosts import HostIdentity

FILE: Final = "host-id"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_MACHINE_ID: Final = Path("/etc/machine-id")
_RUN: Final = secrets.token_hex(16)


def host_id(folder: Path) -> str:
    """Return the id in a VM folder; create both if missing. Durable when this returns.

    Raises:
        Unavailable: the id is invalid, or cannot be written.
    """
    path = folder / FILE
    try:
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, f"{uuid.UUID(bytes=secrets.token_bytes(16), version=4)}\n", mode=0o600)
            sync_folder(folder)
        text = path.read_text(encoding="ascii").strip()
        return str(uuid.UUID(text))
    except OSError as error:
        raise Unavailable(f"The host id in {path} cannot be read or written: {error.strerror}.") from error
    except ValueError:
        raise Unavailable(
            f"The host id in {path} is invalid.",
            remedy="Restore the file from a backup, or write the id there that `interlock host show NAME` prints.",
        ) from None


def identity_of(folder: Path) -> HostIdentity:
    """Return the identity of the host with this VM folder, as this process runs it. Raises `Unavailable`."""
    identity = host_id(folder)
    found = folder.stat()
    return HostIdentity(
        id=identity,
        machine=hashlib.sha256(b"interlock" + _machine_id()).hexdigest()[:32],
        boot=_BOOT_ID.read_text(encoding="ascii").strip(),
        folder=f"{found.st_dev}:{found.st_ino}",
        run=_RUN,
    )


def _machine_id() -> bytes:
    """Return the machine id of the operating system; empty if it has none."""
    try:
        return _MACHINE_ID.read_bytes().strip()
    except OSError:
        return b""
