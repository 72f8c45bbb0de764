"""QEMU's block nodes: files of ours opened in it by descriptor, and closed again. What uses a node is elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any, Final

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.core.records import Disk
from interlock.hypervisors.qemu.command_line import node_arguments
from interlock.hypervisors.qemu.guest import Guest
from interlock.ports import Permit

_LOOK_AGAIN_S: Final = 0.02


async def add_node(guest: Guest, permit: Permit, descriptor: int, disk: Disk, **more: Any) -> None:
    """Have QEMU open a disk, of which we hold the descriptor; this closes ours.

    Args:
        guest: in whose process.
        permit: of the worker that wants it.
        descriptor: the open file.
        disk: what it is.
        more: arguments of `blockdev-add` that go before those which follow from the disk, with underscores.
    """
    try:
        handed_over = await guest.tell(permit, "add-fd", attach=descriptor)
    finally:
        os.close(descriptor)
    number = handed_over["fdset-id"]
    changed = {name.replace("_", "-"): value for name, value in more.items()}
    try:
        await guest.tell(permit, "blockdev-add", {**node_arguments(disk, number), **changed})
    finally:
        # What uses the descriptor has a copy of its own.
        with contextlib.suppress(Refused, NotThere, NotResponding):
            await guest.tell(permit, "remove-fd", {"fdset-id": number})


async def remove_node(guest: Guest, permit: Permit, name: str) -> None:
    """Have QEMU close a node, and the file that it was started with for it; does nothing where there is none.

    QEMU goes on using it for a moment after the device or the job is gone, and does not tell when it ends.

    Raises:
        NotResponding: it is still in use.
    """
    await _remove_given_file(guest, permit, name)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + guest.settings.detach_timeout_ms / 1000
    while name in await sizes(guest):
        try:
            await guest.tell(permit, "blockdev-del", {"node-name": name})
        except Refused as error:
            if loop.time() >= deadline:
                raise NotResponding(error.message, remedy=error.remedy) from error
            await asyncio.sleep(_LOOK_AGAIN_S)
        else:
            return


async def _remove_given_file(guest: Guest, permit: Permit, node: str) -> None:
    """Have QEMU close what it was started with for a node. The node itself has a copy of its own."""
    for given in await guest.ask("query-fdsets"):
        if any(file.get("opaque") == node for file in given["fds"]):
            with contextlib.suppress(Refused):
                await guest.tell(permit, "remove-fd", {"fdset-id": given["fdset-id"]})


async def sizes(guest: Guest) -> dict[str, int]:
    """The nodes that there are, and the size in bytes that a guest sees of each."""
    nodes: list[dict[str, Any]] = await guest.ask("query-named-block-nodes", flat=True)
    return {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
