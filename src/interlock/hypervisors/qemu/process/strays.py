"""Stray guests: started for a VM folder, and not in it any more because it was moved, emptied or deleted.

Such a guest cannot be controlled, and its instance may be started again elsewhere. So a server or agent that opens the
folder, or another one at its path, kills those whose files are deleted, and refuses to run beside those whose files are
elsewhere: they may be needed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from pathlib import Path
from typing import Final

import structlog

from interlock.core.errors import Unavailable
from interlock.hypervisors.qemu.process.process_scan import FoundGuest, GuestFolder, find_guests

_LOG = structlog.get_logger(__name__)
_END_MS: Final = 10_000
_NAMED_MAX: Final = 5
LOCK: Final = "lock"
"""The file in a VM folder that is locked by its server or agent."""


async def settle_strays(home: GuestFolder) -> None:
    """Kill the strays of this folder, or of one that was at its path, whose own folder is deleted.

    Raises:
        Unavailable: there are strays whose folder is elsewhere, or that do not end.
    """
    await asyncio.to_thread(_settle, home)


def _settle(home: GuestFolder) -> None:
    ended, elsewhere = [], []
    for guest in [one for one in find_guests() if _is_stray(one, home)]:
        place = guest.place()
        if place is None:
            _LOG.warning("guest killed: its folder is deleted", instance=guest.instance_id, process=guest.process_id)
            guest.kill()
            ended.append(guest)
        elif guest.folder.host_id == home.host_id or not _is_served(guest):
            elsewhere.append((guest, place))
    if elsewhere:
        raise _unknown_guests(home, elsewhere)
    for guest in ended:
        if not guest.kill(_END_MS):
            raise Unavailable(
                f"Process {guest.process_id} runs VM {guest.instance_id}, whose folder is deleted, and does not end.",
                remedy="It probably waits for I/O: check the host's storage.",
            )


def _is_stray(guest: FoundGuest, home: GuestFolder) -> bool:
    """Whether the guest was started for this folder, or for one at its path, and is not in it."""
    related = guest.folder.host_id == home.host_id or guest.folder.path == home.path or guest.folder.is_same(home)
    return related and not _is_in(guest, Path(home.path))


def _is_in(guest: FoundGuest, folder: Path) -> bool:
    """Whether it works in the folder, or has the lock there: one that was broken out of can change one or the other."""
    place = folder / "vms" / guest.instance_id
    return _is_same(guest.working_folder, place / "inside") or _is_same(guest.lock, place / LOCK)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _is_served(guest: FoundGuest) -> bool:
    """Whether a server or agent has locked the VM folder that the guest is in now."""
    place = guest.place()
    if place is None:
        return False
    try:
        lock = os.open(place.parents[2] / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _unknown_guests(home: GuestFolder, guests: list[tuple[FoundGuest, Path]]) -> Unavailable:
    named = [f"{guest.instance_id} (process {guest.process_id}, in {place})" for guest, place in guests[:_NAMED_MAX]]
    more = f", and {len(guests) - _NAMED_MAX} more" if len(guests) > _NAMED_MAX else ""
    return Unavailable(
        f"VMs run that were started from {home.path} and are no longer in it: {', '.join(named)}{more}.",
        remedy="The folder was moved, copied or replaced. Put it back, or end these processes with `kill`, then start "
        "again. On a host with a lease they end by themselves when it runs out.",
    )
