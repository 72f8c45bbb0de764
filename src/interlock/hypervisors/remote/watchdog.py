"""The process that ends a host's guests when its lease runs out, whatever has become of the agent.

It outlives the agent, as the guests do, and does nothing else: it reads when the lease ends, sleeps until then, and
kills whatever holds an instance of its folder, for as long as the lease is over. It ends by itself when nothing has
been there to be killed for a while. An agent that is in charge sees to it that there is one.
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
from interlock.hypervisors.qemu.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.process import find_in, spawn
from interlock.hypervisors.remote.lease import Lease

LOCK: Final = "watchdog.lock"
LEASE: Final = "lease"
_LOOK_MS: Final = 50
"""How often it looks while the lease is over and something is there."""
_NAP_MS: Final = 250
"""How long it sleeps at most: a lease that was without end may be given one."""
_IDLE_ROUNDS: Final = 240
"""After how many looks at an empty folder it ends, while the lease is over."""
_START_S: Final = 20.0


def guard(folder: Path, guests: Path) -> None:
    """Keep watch over the guests in `guests`, by the lease in `folder`, until there is nothing to watch over."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    lease = Lease(folder / LEASE)
    lease.open()
    idle = 0
    while idle < _IDLE_ROUNDS:
        left_ms = lease.left_ns // 1_000_000
        if left_ms > 0:
            idle = 0
            _sleep(min(left_ms + 1, _NAP_MS))
        elif _end_guests(guests):
            idle = 0
            _sleep(_LOOK_MS)
        else:
            idle += 1
            _sleep(_NAP_MS)


def _sleep(milliseconds: int) -> None:
    select.poll().poll(milliseconds)


def _end_guests(guests: Path) -> bool:
    """Kill everything that holds an instance; whether anything does."""
    found = False
    with contextlib.suppress(FileNotFoundError):
        for path in guests.iterdir():
            folder = InstanceFolder(path)
            with contextlib.suppress(OSError):
                if folder.held():
                    found = True
                    _kill(folder)
    return found


def _kill(folder: InstanceFolder) -> None:
    process_id = find_in(folder.inside)
    if process_id is not None:
        process = os.pidfd_open(process_id)
        try:
            if find_in(folder.inside) == process_id:
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


class Watchdog:
    """The agent's side: sees to it that there is one.

    Args:
        folder: the agent's, with the lease.
        guests: where the instances are, one folder each.
    """

    def __init__(self, folder: Path, guests: Path) -> None:
        self._folder = folder
        self._guests = guests
        self._process: int | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        if self._process is None:
            return False
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return not poll.poll(0)

    async def ensure(self) -> None:
        """Start it, if it does not run. Raises `Unavailable` if it does not come up."""
        if self.alive:
            return
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
                    "The process that watches over the guests' lease does not start.",
                    remedy=f"What it said is in {self._folder / 'watchdog.log'}.",
                )
            # It takes its lock when it is ready, and nothing announces that.
            await asyncio.sleep(0.02)

    def _find(self) -> bool:
        """Find the one that runs, maybe since before this agent."""
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
                self._process = os.pidfd_open(int(text))
            except ProcessLookupError:
                return False
            return True
        finally:
            os.close(lock)
        return False

    def close(self) -> None:
        """Let go of it; it goes on."""
        if self._process is not None:
            os.close(self._process)
            self._process = None


if __name__ == "__main__":
    guard(Path(sys.argv[1]), Path(sys.argv[2]))
