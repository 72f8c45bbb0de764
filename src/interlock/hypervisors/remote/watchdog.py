"""The process that ends a host's guests when its lease expires, whatever has become of the agent.

It outlives the agent, as the guests do, and does nothing else: it reads when the lease expires, sleeps until then, and
kills the guests that were started for its folder, as long as the lease is expired. It finds them by their processes,
and keeps lease and folder open: moving or deleting files changes nothing. It ends by itself when it has found no guest
to kill for a while. A running agent ensures that there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import sys
from pathlib import Path
from typing import Final

from interlock.core.errors import Unavailable
from interlock.hypervisors.host_identity import host_id
from interlock.hypervisors.qemu.process.process_scan import GuestFolder, find_guests
from interlock.hypervisors.qemu.process.qemu_process import is_stopped, spawn
from interlock.hypervisors.remote.lease import EndedByLease, Lease

LOCK: Final = "watchdog.lock"
LEASE: Final = "lease"
_LOOK_MS: Final = 50
"""The interval between two scans while the lease is expired and guests exist."""
_NAP_MS: Final = 250
"""The longest sleep: a lease without an end may get one."""
_IDLE_ROUNDS: Final = 240
"""After how many scans of an empty folder it ends, while the lease is expired."""
_START_S: Final = 20.0


def guard(folder: Path, guests: Path) -> None:
    """End the guests of the folder `guests` whenever the lease in `folder` is expired, until there are none."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    identity = host_id(guests)  # creates the folder of a host that has had no guest
    # While it is open, no other folder can be given its number.
    os.open(guests, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    home = GuestFolder.of(guests, identity)
    lease = Lease(folder / LEASE)
    lease.open()
    ended = EndedByLease(folder)
    ended.open()
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    idle = 0
    while idle < _IDLE_ROUNDS:
        left_ms = lease.left_ns // 1_000_000
        if left_ms > 0:
            idle = 0
            _sleep(min(left_ms + 1, _NAP_MS))
        elif _end_guests(home, ended):
            idle = 0
            _sleep(_LOOK_MS)
        else:
            idle += 1
            _sleep(_NAP_MS)


def _sleep(milliseconds: int) -> None:
    select.poll().poll(milliseconds)


def _end_guests(home: GuestFolder, ended: EndedByLease) -> bool:
    """Kill every guest that was started for the folder; return whether there was any."""
    found = [guest for guest in find_guests() if guest.folder.is_same(home)]
    for guest in found:
        ended.add(guest.instance_id)  # first: the agent may notice the end at once
        guest.kill()
    return bool(found)


class Watchdog:
    """The agent's side: ensures that there is one.

    Args:
        folder: the agent's data folder, with the lease.
        guests: the folder of guests.
    """

    def __init__(self, folder: Path, guests: Path) -> None:
        self._folder = folder
        self._guests = guests
        self._process: int | None = None
        self._process_id = 0

    @property
    def alive(self) -> bool:
        """Whether it runs, and was not stopped by a signal."""
        if self._process is None:
            return False
        return not self._poll(0) and not is_stopped(self._process_id)

    def _poll(self, seconds: float) -> bool:
        """Return whether it ends within that time, in seconds."""
        assert self._process is not None
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    async def ensure(self) -> None:
        """Start it, unless it runs. Raises `Unavailable` if it does not start."""
        if self._process is None:
            self._find()
        if self.alive:
            return
        self._end_stopped()
        self.close()
        deadline = asyncio.get_running_loop().time() + _START_S
        if not self._find():
            command = [sys.executable, "-m", __name__, str(self._folder), str(self._guests)]
            errors = os.open(
                self._folder / "watchdog.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            try:
                spawn(command, errors, ())
            finally:
                os.close(errors)
        while not self._find():
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(
                    "The lease watchdog did not start: timed out.",
                    remedy=f"Its log is {self._folder / 'watchdog.log'}.",
                )
            # It takes its lock when it is ready; there is no notification of that.
            await asyncio.sleep(0.02)

    def _end_stopped(self) -> None:
        """End one that was stopped by a signal, so that another can be started."""
        if self._process is not None and is_stopped(self._process_id):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
                self._poll(_START_S)

    def _find(self) -> bool:
        """Find a running one, also one that an earlier agent started."""
        try:
            lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(lock, 32, 0)
            if not text.isdigit():
                return False
            try:
                self._process, self._process_id = os.pidfd_open(int(text)), int(text)
            except ProcessLookupError:
                return False
            return True
        finally:
            os.close(lock)
        return False

    def close(self) -> None:
        """Detach from it; it keeps running."""
        if self._process is not None:
            os.close(self._process)
            self._process = None


if __name__ == "__main__":
    guard(Path(sys.argv[1]), Path(sys.argv[2]))
