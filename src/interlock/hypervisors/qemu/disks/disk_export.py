"""Export of the root disk: a point-in-time copy, written to a file without backing file.

While a process holds the guest, QEMU preserves what the guest overwrites from that point on (`copy-before-write`) in an
unlinked file, and a backup job copies the point-in-time view (`snapshot-access`). Unlike with a plain backup, a lack of
space for the preserved data fails the export (`break-snapshot`) and never a write of the guest. See QEMU's
docs/interop/live-block-operations and qapi/block-core.json.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from interlock.core.errors import InterlockError, OperationRejected
from interlock.core.records import Disk, Spec
from interlock.hypervisors.qemu.command_line import ROOT, device_name, node_name
from interlock.hypervisors.qemu.disks import block_jobs, root_disks
from interlock.hypervisors.qemu.disks.block_nodes import add_node, remove_node, sizes
from interlock.hypervisors.qemu.disks.qemu_img import run_qemu_img
from interlock.hypervisors.qemu.files import qcow2
from interlock.hypervisors.qemu.files.file_handles import open_disk
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.files.sparse_copy import uninterrupted
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.guest_agent import frozen
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.images.atomic_files import DRAFT_PREFIX
from interlock.images.subprocess_runner import run
from interlock.ports import Permit, Report

_JOB: Final = "export"
_TARGET: Final = "export-target"
_VIEW: Final = "export-view"
_FILTER: Final = "export-filter"
_PRESERVED: Final = "export-kept"
_ROOT_DEVICE: Final = f"/machine/peripheral/{device_name(ROOT)}"
_WHAT: Final = "Exporting the root disk"
_BROKEN: Final = "Permission denied"
"""QEMU's error for reading data that could not be preserved."""


async def export_offline(
    permit: Permit, folder: InstanceFolder, spec: Spec, target: Path, settings: QemuSettings, report: Report
) -> None:
    """Export while no process holds the guest. Raises as `Hypervisor.export_root_disk`."""
    source = folder.roots(spec).disk(spec.root)
    root_disks.require_root(source)
    if folder.held():
        raise folder.held_by_unknown()
    total = qcow2.read_header(source).size_bytes
    with _draft(target) as fresh:
        permit.check()
        words = ["convert", "-p", "-c", "-O", "qcow2", qcow2.open_options(source, spec), str(fresh)]
        fresh.touch(mode=0o600)
        await run_qemu_img(
            words,
            _WHAT,
            settings,
            lambda done: report(int(done * total), total),
            reads=[source, Path(spec.image.path)],
            writes=fresh,
        )
        await root_disks.replace(permit, fresh, target)


async def export_live(guest: Guest, permit: Permit, target: Path, report: Report) -> None:
    """Export while a process holds the guest, running or not. Raises as `Hypervisor.export_root_disk`."""
    await _clear(guest, permit)
    total = (await sizes(guest)).get(node_name(ROOT))
    if total is None:
        raise OperationRejected(f"VM {guest.instance_id} has no root disk.")
    with _draft(target) as fresh:
        try:
            await _start(guest, permit, fresh, total)
            await _follow(guest, report, target.parent)
        except BaseException:
            # What cannot be undone now is undone by the next export.
            with contextlib.suppress(InterlockError):
                await _clear(guest, permit)
            raise
        await _clear(guest, permit)
        await root_disks.replace(permit, fresh, target)


async def _start(guest: Guest, permit: Permit, fresh: Path, total: int) -> None:
    preserved = fresh.with_suffix(".kept")
    try:
        for path in (preserved, fresh):
            await _create_empty(permit, path, total, guest.settings)
        preserved_at, fresh_at = open_disk(preserved, read_only=False), open_disk(fresh, read_only=False)
    finally:
        preserved.unlink(missing_ok=True)
    try:
        await add_node(guest, permit, preserved_at, Disk(id=_PRESERVED, path=""), node_name=_PRESERVED)
    except BaseException:
        os.close(fresh_at)
        raise
    # Zeros take no space.
    zeros = {"detect_zeroes": "unmap", "discard": "unmap"}
    await add_node(guest, permit, fresh_at, Disk(id=_TARGET, path=""), node_name=_TARGET, **zeros)
    preserving = {"driver": "copy-before-write", "node-name": _FILTER, "file": node_name(ROOT), "target": _PRESERVED}
    limit_s = max(1, guest.settings.export_write_timeout_ms // 1000)
    await guest.execute(
        permit, "blockdev-add", {**preserving, "on-cbw-error": "break-snapshot", "cbw-timeout": limit_s}
    )
    async with frozen(guest, permit):
        await _use(guest, permit, _FILTER)  # this is the point in time
    await guest.execute(permit, "blockdev-add", {"driver": "snapshot-access", "node-name": _VIEW, "file": _FILTER})
    await block_jobs.start(
        guest, permit, "blockdev-backup", _JOB, device=_VIEW, target=_TARGET, sync="full", compress=True
    )


async def _follow(guest: Guest, report: Report, folder: Path) -> None:
    try:
        await block_jobs.follow(guest, _JOB, _WHAT, report)
    except OperationRejected as error:
        if _BROKEN not in error.message:
            raise
        raise OperationRejected(
            f"{_WHAT} failed: the data that the guest overwrote meanwhile could not be preserved in {folder}.",
            remedy="Make room there, or export while the guest writes less.",
        ) from error


async def _create_empty(permit: Permit, path: Path, size_bytes: int, settings: QemuSettings) -> None:
    permit.check()
    path.touch(mode=0o600)  # noqa: ASYNC240 - as quick as a look
    command = [settings.image_tool_binary, "create", "-q", "-f", "qcow2", str(path), str(size_bytes)]
    ended = await uninterrupted(lambda: run(command, timeout_s=settings.image_tool_timeout_ms / 1000))
    if ended.status != 0:
        raise OperationRejected(
            f"{_WHAT} failed: {ended.complaint.rstrip('.')}.", remedy=f"Check the free space in {path.parent}."
        )


async def _use(guest: Guest, permit: Permit, node: str) -> None:
    """Switch the guest's root device to another node of the same disk."""
    await guest.execute(permit, "qom-set", {"path": _ROOT_DEVICE, "property": "drive", "value": node})


async def _clear(guest: Guest, permit: Permit) -> None:
    """Remove everything that an export added to the process, at whatever step it was interrupted."""
    await block_jobs.remove(guest, permit, _JOB)
    nodes = await sizes(guest)
    for node in (_TARGET, _VIEW):
        if node in nodes:
            await remove_node(guest, permit, node)
    if (await guest.device_nodes()).get(device_name(ROOT)) == _FILTER:
        await _use(guest, permit, node_name(ROOT))
    for node in (_FILTER, _PRESERVED):
        if node in nodes:
            await remove_node(guest, permit, node)


def _draft(target: Path) -> contextlib.AbstractContextManager[Path]:
    return root_disks.draft(target.with_name(DRAFT_PREFIX + target.name))
