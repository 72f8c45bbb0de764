"""QEMU block nodes: files are opened in QEMU by descriptor, and closed again. What uses a node is elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any, Final

from interlock.core.errors import GuestNotFound, NotResponding, OperationRejected
from interlock.core.records import Disk
from interlock.hypervisors.qemu.command_line import node_arguments
from interlock.hypervisors.qemu.guest import Guest
from interlock.ports import Permit

_RETRY_INTERVAL_S: Final = 0.02


async def add_node(guest: Guest, permit: Permit, descriptor: int, disk: Disk, **more: Any) -> None:
    """Open a disk in QEMU by its descriptor, which is closed here.

    Args:
        guest: in whose QEMU.
        permit: of the worker.
        descriptor: the open file.
        disk: its id and format.
        more: arguments of `blockdev-add` that override those of the disk, with underscores.
    """
    try:
        handed_over = await guest.execute(permit, "add-fd", attach=descriptor)
    finally:
        os.close(descriptor)
    number = handed_over["fdset-id"]
    changed = {name.replace("_", "-"): value for name, value in more.items()}
    try:
        await guest.execute(permit, "blockdev-add", {**node_arguments(disk, number), **changed})
    finally:
        # The node has a duplicate of the descriptor.
        with contextlib.suppress(OperationRejected, GuestNotFound, NotResponding):
            await guest.execute(permit, "remove-fd", {"fdset-id": number})


async def remove_node(guest: Guest, permit: Permit, name: str) -> None:
    """Close a node, if it exists, and the descriptor that QEMU was started with for it.

    QEMU uses a node for a moment after its device or job is removed, and sends no event when that ends.

    Raises:
        NotResponding: it is still in use.
    """
    await _remove_initial_descriptor(guest, permit, name)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + guest.settings.detach_timeout_ms / 1000
    while name in await sizes(guest):
        try:
            await guest.execute(permit, "blockdev-del", {"node-name": name})
        except OperationRejected as error:
            if loop.time() >= deadline:
                raise NotResponding(error.message, remedy=error.remedy) from error
            await asyncio.sleep(_RETRY_INTERVAL_S)
        else:
            return


async def _remove_initial_descriptor(guest: Guest, permit: Permit, node: str) -> None:
    """Close the descriptor that QEMU was started with for a node, which has a duplicate."""
    for given in await guest.query("query-fdsets"):
        if any(file.get("opaque") == node for file in given["fds"]):
            with contextlib.suppress(OperationRejected):
                await guest.execute(permit, "remove-fd", {"fdset-id": given["fdset-id"]})


async def sizes(guest: Guest) -> dict[str, int]:
    """Return the virtual size of each node in bytes, by node name."""
    nodes: list[dict[str, Any]] = await guest.query("query-named-block-nodes", flat=True)
    return {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
