"""Conversion of vmdk, vhd, vhdx and vdi images to standalone qcow2, with qemu-img.

Images are inspected (`inspection`) before and after the conversion.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from interlock.core.errors import Invalid, NotResponding, Unavailable
from interlock.images.atomic_files import full
from interlock.images.qemu_img import ImageTool

_DRIVERS: Final = {"vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}
"""QEMU's block driver by format."""


def needs_conversion(image_format: str) -> bool:
    """Whether an image of that format must be converted."""
    return image_format in _DRIVERS


def convert(
    tool: ImageTool, source: Path, target: Path, named: Path, image_format: str, abandoned: Callable[[], bool]
) -> None:
    """Convert the image `source` to `target`, an empty file in the same folder. Blocks.

    `named` is the caller's path, for messages.

    Raises:
        Invalid: QEMU cannot read it, it would become too large, or it timed out.
        StoreFull: no space left.
        Unavailable: qemu-img is not installed.
        Abandoned: `abandoned` returned true.
    """
    if not tool.usable:
        raise Unavailable(
            f"Converting a {image_format} image requires qemu-img, which is not installed.",
            remedy="Run `sudo apt-get install qemu-utils`, or convert it to qcow2 elsewhere.",
        )
    driver = _DRIVERS[image_format]
    # Relative names, so that the tool's user needs no access to the parent folders.
    words = ["convert", "-q", "-f", driver, "-O", "qcow2", f"./{source.name}", f"./{target.name}"]
    try:
        ended = tool.run(words, tool.timeout_ms, abandoned, reads=source, writes=target)
    except NotResponding as error:
        raise Invalid(
            f"{named.name}: converting the image timed out: it took longer than {tool.timeout_ms} ms.",
            remedy="Convert it to qcow2 elsewhere, or have image_conversion_timeout_ms raised.",
        ) from error
    if ended.status == 0:
        return
    if ended.status in {-signal.SIGXFSZ, 128 + signal.SIGXFSZ} or "File too large" in ended.complaint:
        raise Invalid(
            f"{named.name}: the image would become larger than {tool.bytes_max} bytes.",
            remedy="Have image_bytes_max raised if you trust the image.",
        )
    if "No space left" in ended.complaint or "quota exceeded" in ended.complaint:
        raise full(source.parent)
    reason = ended.complaint.rpartition("': ")[2] or f"it ended with status {ended.status}"
    raise Invalid(f"{named.name}: QEMU cannot convert the image: {reason.rstrip('.')}.")
