"""The root disk written, as it is at one moment, to a file that needs no other.

While a process holds the guest, QEMU itself keeps what the guest overwrites from that moment on (`copy-before-write`)
in a file without a name, and a job copies from what can be seen through it (`snapshot-access`). That takes one step
more than a plain backup, and has a reason: when there is no room for what is overwritten, it is the export that fails
(`break-snapshot`) and never the guest's write. See QEMU's docs/interop/live-block-operations and qapi/block-core.json.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from interlock.core.errors import InterlockError, NotResponding, Refused
from interlock.core.records import Disk, Spec
from interlock.hypervisors.commands import run
from interlock.hypervisors.qemu import block_jobs, qcow2, root_disks
from interlock.hypervisors.qemu.command_line import ROOT, device_name, node_name
from interlock.hypervisors.qemu.copying import whole
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.guest_agent import frozen
from interlock.hypervisors.qemu.image_tool import use_image_tool
from interlock.hypervisors.qemu.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.nodes import add_node, remove_node, sizes
from interlock.hypervisors.qemu.opening import open_disk
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Permit, Report

_JOB: Final = "export"
_TARGET: Final = "export-target"
_VIEW: Final = "export-view"
_FILTER: Final = "export-filter"
_KEPT: Final = "export-kept"
_ROOT_DEVICE: Final = f"/machine/peripheral/{device_name(ROOT)}"
_WHAT: Final = "Exporting the root disk"
_BROKEN: Final = "Permission denied"
"""What QEMU says when something is read that could not be kept."""
_HALF_MADE: Final = ".half-made-"
"""How the names of files begin that an image folder clears away when a server starts."""


def is_there(target: Path) -> bool:
    """Whether the export was completed before."""
    return target.exists()


async def export_at_rest(
    permit: Permit, folder: InstanceFolder, spec: Spec, target: Path, settings: QemuSettings, report: Report
) -> None:
    """Export while no process holds the guest. Raises as `Hypervisor.export_root_disk`."""
    source = folder.roots(spec).disk(spec.root)
    if not source.exists():
        raise Refused(f"The root disk {source} is not there.", remedy="Put the file back, or rebuild the instance.")
    if folder.held():
        raise NotResponding(
            f"A process that is not known holds instance {folder.path.name}.",
            remedy="Restart the server: it looks for such processes when it starts.",
        )
    total = qcow2.read_header(source).size_bytes
    with _half_made(target) as fresh:
        permit.check()
        words = ["convert", "-p", "-c", "-O", "qcow2", qcow2.opened(source, spec), str(fresh)]
        await use_image_tool(words, _WHAT, settings, lambda done: report(int(done * total), total))
        await root_disks.keep(permit, fresh, target)


async def export_live(guest: Guest, permit: Permit, target: Path, report: Report) -> None:
    """Export while a process holds the guest, whatever that does. Raises as `Hypervisor.export_root_disk`."""
    await _clear(guest, permit)
    total = (await sizes(guest)).get(node_name(ROOT))
    if total is None:
        raise Refused(f"The guest of instance {guest.instance_id} has no root disk.")
    with _half_made(target) as fresh:
        try:
            await _begin(guest, permit, fresh, total)
            await _follow(guest, report, target.parent)
        except BaseException:
            # Who comes after us finds whatever cannot be undone now.
            with contextlib.suppress(InterlockError):
                await _clear(guest, permit)
            raise
        await _clear(guest, permit)
        await root_disks.keep(permit, fresh, target)


async def _begin(guest: Guest, permit: Permit, fresh: Path, total: int) -> None:
    kept = fresh.with_suffix(".kept")
    try:
        for path in (kept, fresh):
            await _make_empty(permit, path, total, guest.settings)
        kept_at, fresh_at = open_disk(kept, read_only=False), open_disk(fresh, read_only=False)
    finally:
        kept.unlink(missing_ok=True)
    try:
        await add_node(guest, permit, kept_at, Disk(id=_KEPT, path=""), node_name=_KEPT)
    except BaseException:
        os.close(fresh_at)
        raise
    # Zeros take no room.
    zeros = {"detect_zeroes": "unmap", "discard": "unmap"}
    await add_node(guest, permit, fresh_at, Disk(id=_TARGET, path=""), node_name=_TARGET, **zeros)
    keeping = {"driver": "copy-before-write", "node-name": _FILTER, "file": node_name(ROOT), "target": _KEPT}
    limit_s = max(1, guest.settings.export_write_timeout_ms // 1000)
    await guest.tell(permit, "blockdev-add", {**keeping, "on-cbw-error": "break-snapshot", "cbw-timeout": limit_s})
    async with frozen(guest, permit):
        await _use(guest, permit, _FILTER)  # this is the moment
    await guest.tell(permit, "blockdev-add", {"driver": "snapshot-access", "node-name": _VIEW, "file": _FILTER})
    await block_jobs.begin(
        guest, permit, "blockdev-backup", _JOB, device=_VIEW, target=_TARGET, sync="full", compress=True
    )


async def _follow(guest: Guest, report: Report, folder: Path) -> None:
    try:
        await block_jobs.follow(guest, _JOB, _WHAT, report)
    except Refused as error:
        if _BROKEN not in error.message:
            raise
        raise Refused(
            f"{_WHAT} failed: what the guest overwrote meanwhile could not be kept in {folder}.",
            remedy="See that there is room, or export it while the guest writes less.",
        ) from error


async def _make_empty(permit: Permit, path: Path, size_bytes: int, settings: QemuSettings) -> None:
    permit.check()
    command = [settings.image_tool_binary, "create", "-q", "-f", "qcow2", str(path), str(size_bytes)]
    ended = await whole(lambda: run(command, timeout_s=settings.image_tool_timeout_ms / 1000))
    if ended.status != 0:
        raise Refused(f"{_WHAT} failed: {ended.complaint.rstrip('.')}.", remedy=f"Check the room in {path.parent}.")


async def _use(guest: Guest, permit: Permit, node: str) -> None:
    """Have the guest's root device use another node over the same disk."""
    await guest.tell(permit, "qom-set", {"path": _ROOT_DEVICE, "property": "drive", "value": node})


async def _clear(guest: Guest, permit: Permit) -> None:
    """Take away whatever an export has put into the process, at whatever point that was."""
    await block_jobs.end(guest, permit, _JOB)
    there = await sizes(guest)
    for node in (_TARGET, _VIEW):
        if node in there:
            await remove_node(guest, permit, node)
    if (await guest.drives()).get(device_name(ROOT)) == _FILTER:
        await _use(guest, permit, node_name(ROOT))
    for node in (_FILTER, _KEPT):
        if node in there:
            await remove_node(guest, permit, node)


@contextlib.contextmanager
def _half_made(target: Path) -> Iterator[Path]:
    with root_disks.half_made(target.with_name(_HALF_MADE + target.name)) as fresh:
        yield fresh
