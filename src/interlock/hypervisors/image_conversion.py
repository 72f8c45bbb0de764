"""Images of other makers' formats, turned into the one in which they are kept: qcow2 that needs no other file.

What is converted has passed `disk_inspection`; what comes out of it goes through it again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from interlock.core.errors import Invalid, NotResponding, StoreError, Unavailable
from interlock.hypervisors.durable_files import full
from interlock.hypervisors.image_tool import ImageTool

_DRIVERS: Final = {"vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}
"""What QEMU calls the formats that are converted."""
_READ_ONLY: Final = 0o400
_READ_WRITE: Final = 0o600


def needs_conversion(image_format: str) -> bool:
    """Whether an image of that format cannot be kept as it is."""
    return image_format in _DRIVERS


def convert(
    tool: ImageTool, source: Path, target: Path, named: Path, image_format: str, abandoned: Callable[[], bool]
) -> None:
    """Write the disk that the image in `source` holds to `target`, an empty file in the same folder. Blocks.

    `named` is what the caller called it. Both files are the tool's user's afterwards.

    Raises:
        Invalid: QEMU cannot read it, it would become too large, or it took too long.
        StoreFull: there is no room.
        Unavailable: QEMU's tool is not installed.
        Abandoned: `abandoned` said so.
    """
    if not tool.usable:
        raise Unavailable(
            f"A {image_format} image needs QEMU's tool to be converted, and that is not installed.",
            remedy="Run `sudo apt-get install qemu-utils`, or convert it to qcow2 elsewhere.",
        )
    _give(source, tool, _READ_ONLY)
    _give(target, tool, _READ_WRITE)
    driver = _DRIVERS[image_format]
    # The names are relative, so that no folder above this one needs to be open to the tool's user.
    words = ["convert", "-q", "-f", driver, "-O", "qcow2", f"./{source.name}", f"./{target.name}"]
    try:
        ended = tool.run(words, source.parent, tool.timeout_ms, abandoned)
    except NotResponding as error:
        raise Invalid(
            f"{named.name}: converting the image took longer than {tool.timeout_ms} ms.",
            remedy="Convert it to qcow2 elsewhere, or have image_conversion_timeout_ms raised.",
        ) from error
    if ended.status == 0:
        return
    if ended.status in {-signal.SIGXFSZ, 128 + signal.SIGXFSZ} or "File too large" in ended.complaint:
        raise Invalid(
            f"{named.name}: the image would become larger than {tool.bytes_max} bytes.",
            remedy="Have image_bytes_max raised, if it is to be trusted with that much room.",
        )
    if "No space left" in ended.complaint or "quota exceeded" in ended.complaint:
        raise full(source.parent)
    reason = ended.complaint.rpartition("': ")[2] or f"it ended with status {ended.status}"
    raise Invalid(f"{named.name}: QEMU cannot convert the image: {reason.rstrip('.')}.")


def _give(path: Path, tool: ImageTool, mode: int) -> None:
    try:
        path.chmod(mode)
        if tool.account is not None:
            os.chown(path, tool.account.user_id, tool.account.group_id)
    except OSError as error:
        raise StoreError(f"{path} cannot be given to the user of QEMU's tool: {error.strerror}.") from error
