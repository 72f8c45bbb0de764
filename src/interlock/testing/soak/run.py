"""One run of the soak: what is made, who asks, what is killed, and how it is judged, in that order."""

from __future__ import annotations

import random  # noqa: TID251 - the seed is an argument
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from interlock.testing.soak.asking import Asking
from interlock.testing.soak.book import Book
from interlock.testing.soak.doubles import Doubles
from interlock.testing.soak.ground import Ground
from interlock.testing.soak.judging import Judging
from interlock.testing.soak.killing import Killing


class Soak:
    """One run on one folder.

    Args:
        folder: QEMU's user must be able to pass through it.
        vms: how many.
        small: how many of them are a Linux that boots from its disk; the others are the smallest guest there is.
        hosts: 1, or 2 for an agent of another host beside the server.
        shared: whether the hosts have all disks in common.
        packages: where packages for that Linux are kept already.
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
    ) -> None:
        self.book = Book()
        self._chance = random.Random(seed)  # noqa: S311 - not for secrets
        self.ground = Ground(folder, self.book, vms=vms, small=small, hosts=hosts, shared=shared, packages=packages)
        self._seed = seed

    def run(self, seconds: float, callers: int, kill_every_s: float) -> None:
        """Make the VMs, let callers ask while servers and agents are killed now and then, and look at what is left."""
        with self.book.timed("making"):
            self.ground.open()
        serving, over = threading.Event(), threading.Event()
        serving.set()
        asking = Asking(self.ground, self.book, serving, over)
        killing = Killing(self.ground, self.book, serving, over, kill_every_s)
        with self.book.timed("asking and killing"), ThreadPoolExecutor(callers + 3) as pool:
            tasks = [pool.submit(asking.ask_until_over, self._chance.random()) for _ in range(callers)]
            tasks.append(pool.submit(killing.kill_server_until_over, self._chance.random()))
            if self.ground.agent is not None:
                tasks.append(pool.submit(killing.kill_agent_until_over, self.ground.agent, self._chance.random()))
            tasks.append(pool.submit(Doubles(self.ground.guests, self.book).look_until, over))
            try:
                over.wait(seconds)
            finally:
                over.set()
            for one in tasks:
                one.result()
        Judging(self.ground, self.book, asking).judge()

    def report(self) -> dict[str, Any]:
        """What was covered and what is wrong."""
        return {"seed": self._seed, **self.book.report()}
