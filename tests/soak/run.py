"""One run of the soak: what is made, who asks, what is killed, and how it is judged, in that order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from soak.checks import Judging
from soak.environment import Ground
from soak.faults import FULL, Filling, Freezing, SmallDisk, Trouble
from soak.identities import Contesting
from soak.kills import Killing
from soak.operations import Asking
from soak.report import Book
from soak.split_brain_monitor import Doubles

_ENOUGH_S: Final = 300.0
"""How much longer it goes on for what was to happen and has not."""


class Soak:
    """One run on one folder.

    Args:
        folder: QEMU's user must be able to pass through it.
        vms: how many.
        small: how many of them are a Linux that boots from its disk; the others are the smallest guest there is.
        hosts: 1, or 2 for an agent of another host beside the server.
        shared: whether the hosts have all disks in common.
        packages: where packages for that Linux are kept already.
        without: which troubles it goes without.
        seed: of everything that is drawn. What is asked for in which order also depends on the machine.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vms: int,
        small: int,
        hosts: int,
        shared: bool,
        seed: int,
        packages: Path | None = None,
        without: Collection[Trouble] = (),
    ) -> None:
        self.book = Book()
        self._troubles = frozenset(Trouble).difference(without)
        self._chance = random.Random(seed)
        self.ground = Ground(folder, self.book, vms=vms, small=small, hosts=hosts, shared=shared, packages=packages)
        self._disk = SmallDisk(self.ground.server.folder)
        self._seed = seed

    def run(self, seconds: float, callers: int, kill_every_s: float, at_least: Mapping[str, int] | None = None) -> None:
        """Make the VMs, let callers ask while servers and agents are killed now and then, and look at what is left.

        It goes on for longer than `seconds` until everything in `at_least` was counted so often: a busy machine needs
        more time for that.
        """
        if Trouble.FULL in self._troubles:
            self._disk.mount()
        with self.book.timed("making"):
            self.ground.open()
        serving, over = threading.Event(), threading.Event()
        serving.set()
        asking = Asking(self.ground, self.book, serving, over, early=Trouble.EARLY in self._troubles)
        killing = Killing(self.ground, self.book, serving, over, kill_every_s)
        contesting = Contesting(self.ground, self.book, serving) if Trouble.IDENTITIES in self._troubles else None
        doubles = Doubles(self.ground.guests, self.book)
        freezing = Freezing(doubles, self.book, over, kill_every_s / 2)
        filling = Filling(self.ground, self.book, serving, over, kill_every_s * 2)
        with self.book.timed("asking and killing"), ThreadPoolExecutor(callers + 5) as pool:
            tasks = [pool.submit(asking.ask_until_over, self._chance.random()) for _ in range(callers)]
            tasks.append(pool.submit(killing.kill_server_until_over, self._chance.random()))
            if self.ground.agents:
                tasks.append(pool.submit(killing.kill_agents_until_over, self._chance.random(), contesting))
            if Trouble.FROZEN in self._troubles:
                tasks.append(pool.submit(freezing.freeze_until_over, self._chance.random()))
            if self._disk.mounted:
                tasks.append(pool.submit(filling.fill_until_over, self._disk, self._chance.random()))
            tasks.append(pool.submit(doubles.look_until, over))
            try:
                over.wait(seconds)
                enough = time.monotonic() + _ENOUGH_S
                while self._lacks(at_least or {}) and time.monotonic() < enough and not over.wait(1.0):
                    pass
            finally:
                over.set()
            for one in tasks:
                one.result()
        asking.disturbed |= filling.deleted
        Judging(self.ground, self.book, asking).judge()

    def _lacks(self, at_least: Mapping[str, int]) -> bool:
        return any(self.book.counts[what] < times for what, times in at_least.items() if what != FULL or self.can_fill)

    @property
    def can_fill(self) -> bool:
        """Whether the disk of the server can be made full here."""
        return self._disk.mounted

    def close(self) -> None:
        """Kill everything that is still there, and let go of the disk."""
        try:
            self.ground.close()
        finally:
            self._disk.unmount()

    def report(self) -> dict[str, Any]:
        """What was covered and what is wrong."""
        return {"seed": self._seed, **self.book.report()}
