"""The content of one volume put on another while no guest has either, by QEMU's image tool."""

from __future__ import annotations

import asyncio
from pathlib import Path

from interlock.core.errors import Refused
from interlock.hypervisors.durable_files import sync_file
from interlock.hypervisors.qemu import qcow2
from interlock.hypervisors.qemu.image_tool import use_image_tool
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Permit, Report


async def copy(permit: Permit, old: Path, new: Path, settings: QemuSettings, report: Report) -> None:
    """See `ports.Hypervisor.copy_disk`. The image tool's own locks see that nothing else has the files."""
    held, offered = _size(old), _size(new)
    if offered < held:
        raise Refused(
            f"The disk {new.name} has {offered} bytes, and {old.name}, whose content it is to take, has {held}.",
            remedy="Use one that is at least as large.",
        )
    permit.check()
    words = ["convert", "-p", "-n", "-f", "qcow2", "-O", "qcow2", str(old), str(new)]
    await use_image_tool(words, f"Copying {old.name}", settings, lambda done: report(int(done * held), held))
    await asyncio.to_thread(sync_file, new)


def _size(path: Path) -> int:
    """The size that a guest sees. Raises `Refused` for what is not there, or leads elsewhere."""
    if not path.is_file():
        raise Refused(f"The disk {path} is not there.", remedy="Put the file back.")
    header = qcow2.read_header(path)
    if not header.stands_alone:
        raise Refused(f"The disk {path} needs another file, which a volume never does.")
    return header.size_bytes
