"""Second identities: other agents that say they are the far host, on a folder of their own or on a copy of its folder.

Each begins while the agent of the host is alive, stopped by a signal, or killed, and the trouble is healed in either
order. As long as the lease of the first runs, the second must be refused and leave nothing. Once it is over, one with
a folder of its own may be let in: then the first must be refused, and goes on under the name that the server gave it.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from interlock.hypervisors.qemu.process.process_scan import FoundGuest, find_guests
from interlock.hypervisors.remote.lease import Lease, now_ns
from interlock.hypervisors.remote.watchdog import LEASE
from processes.real_agent import RealAgent
from soak.environment import FAR, LEASE_MS, Ground, until
from soak.report import Book

IDENTITIES: Final = "second identities"
"""What is counted."""
_HOSTS_MAX: Final = 4
"""How many hosts there may be, the server's own among them, before no second one is let in any more."""
_BEYOND: Final = 0.6
"""How often the first is away for longer than its lease."""
_LEFT_EMPTY: Final = ("guests/vms", "spool", "images")
"""The folders of an agent that was never let in in which nothing may be."""


class Folder(StrEnum):
    """What the second agent has as its data folder."""

    FRESH = "a fresh folder"
    COPY = "a copy of the folder"
    IN_ITS_PLACE = "a fresh folder in the place of the first, which was moved away"


class First(StrEnum):
    """What the agent that has the name does meanwhile."""

    ALIVE = "is alive"
    STOPPED = "is stopped"
    KILLED = "was killed"


class Contest(msgspec.Struct, frozen=True, kw_only=True):
    """What is done in one of them."""

    folder: Folder
    first: First
    beyond: bool
    """Whether the second may stay until the lease of the first is over."""
    second_goes_first: bool
    """Whether the second ends before the first comes back."""
    seconds: float
    """How long both are left so."""

    def __str__(self) -> str:
        longer = ", for longer than its lease" if self.beyond else ""
        return f"{IDENTITIES}: on {self.folder}, while the first {self.first}{longer}"


def drawn(chance: random.Random, *, may_take_over: bool) -> Contest:
    """One of all contests, at random."""
    folder = chance.choice(tuple(Folder))
    in_its_place = folder is Folder.IN_ITS_PLACE
    # The folder of an agent that goes on cannot be moved away.
    first = First.KILLED if in_its_place else chance.choice(tuple(First))
    beyond = may_take_over and folder is not Folder.COPY and first is not First.ALIVE and chance.random() < _BEYOND
    return Contest(
        folder=folder,
        first=first,
        beyond=beyond,
        second_goes_first=in_its_place or chance.choice((True, False)),
        seconds=LEASE_MS / 1000 * 0.5 * chance.random(),
    )


class Contesting:
    """Has second agents want the name of the far host, one at a time."""

    def __init__(self, ground: Ground, book: Book, serving: threading.Event) -> None:
        self._ground = ground
        self._book = book
        self._serving = serving
        self._numbers = itertools.count(2)

    def contest(self, chance: random.Random) -> None:
        """Have one second agent, and heal that; the far host has an agent again when this returns."""
        contest = drawn(chance, may_take_over=len(self._ground.folders) < _HOSTS_MAX)
        self._book.count(IDENTITIES)
        self._book.count(str(contest))
        first, second = self._begin(contest, self._ground.agents[FAR])
        seen, lease_ns = _names(second.folder), _lease_ends_ns(first)
        before, refusals = _connections(second), _refusals(first)

        def is_let_in() -> bool:
            return _connections(second) > before

        second.begin()
        self._await_answer(contest, second, is_let_in)
        if not is_let_in() and contest.second_goes_first:
            second.kill()
            if not is_let_in():
                self._remove(contest, second, seen)
        if not is_let_in():
            first = self._come_back(contest, first, second)
            self._await_lease(contest, first, lambda: is_let_in() or _lease_ends_ns(first) > lease_ns)
        self._book.count(f"{IDENTITIES} that were {'let in' if is_let_in() else 'refused'}")
        if not is_let_in():
            if not contest.second_goes_first:
                self._remove(contest, second, seen)
            return
        self._judge_ended(contest, first)
        if contest.folder is Folder.COPY:
            self._take_back(contest, first, second)
        else:
            self._take_over(contest, first, second, refusals)

    def _begin(self, contest: Contest, first: RealAgent) -> tuple[RealAgent, RealAgent]:
        """The first agent, as it is to be found from now on, and another of its name that was not started yet."""
        place = self._ground.folder / f"{FAR}-{next(self._numbers)}"
        if contest.folder is Folder.COPY:
            # What changes or goes meanwhile is not copied whole, as it is with people.
            words = ["cp", "-a", "--sparse=always", str(first.folder), str(place)]
            subprocess.run(words, capture_output=True, check=False)
        if contest.first is First.KILLED:
            first.kill()
        elif contest.first is First.STOPPED:
            first.freeze()
        if contest.folder is Folder.IN_ITS_PLACE:
            own = first.folder
            own.rename(place)
            own.mkdir(mode=0o711)
            second = self._ground.make_agent(FAR, own)
            second.log = place.with_name(place.name + "-replacement.log")
            return self._ground.make_agent(FAR, place), second
        place.mkdir(mode=0o711, exist_ok=True)
        return first, self._ground.make_agent(FAR, place)

    def _await_answer(self, contest: Contest, second: RealAgent, is_let_in: Callable[[], bool]) -> None:
        """Wait until the second was told whether it is let in, and for as long as it is to stay refused."""

        def is_told() -> bool:
            return is_let_in() or second.ended or _refusals(second) > 0

        def has_begun_again() -> bool:
            # One that finds guests of the first whose files are elsewhere ends, and is started again by who runs it.
            if second.ended:
                second.kill()
                second.begin()
            return is_let_in()

        if not until(is_told, self._serving.is_set):
            self._book.complain(f"{contest}: neither let in nor refused")
        if contest.beyond:
            until(has_begun_again, self._serving.is_set)
        else:
            threading.Event().wait(contest.seconds)  # how long both are left so is what this is about

    def _come_back(self, contest: Contest, first: RealAgent, second: RealAgent) -> RealAgent:
        """Have the first back; the first, as it is to be found from now on."""
        if contest.folder is Folder.IN_ITS_PLACE:
            first.folder.rename(second.folder)
            first = self._ground.agents[FAR]
        if contest.first is First.STOPPED:
            first.thaw()
        elif contest.first is First.KILLED:
            first.begin()
        return first

    def _await_lease(self, contest: Contest, first: RealAgent, has_it: Callable[[], bool]) -> None:
        if not until(has_it, self._serving.is_set):
            self._book.complain(f"{contest}: {first.name} comes back, and its lease is not renewed")

    def _take_back(self, contest: Contest, first: RealAgent, second: RealAgent) -> None:
        """Have the first let in again in the place of a copy, whose guests end with it."""
        second.clear()
        shutil.rmtree(second.folder)
        lease_ns = _lease_ends_ns(first)
        if not first.running:
            first.begin()
        elif contest.first is First.STOPPED:
            first.thaw()
        self._await_lease(contest, first, lambda: _lease_ends_ns(first) > lease_ns)

    def _take_over(self, contest: Contest, first: RealAgent, second: RealAgent, refusals: int) -> None:
        """Have the first back, which must be refused once more, and then under the name that it has now."""
        if contest.second_goes_first:
            second.kill()
        connections = _connections(first)
        if contest.first is First.STOPPED:
            first.thaw()
        elif not first.running:
            first.begin()
        if not until(lambda: first.ended or _refusals(first) > refusals, self._serving.is_set):
            self._book.complain(f"{contest}: the first comes back, and is not refused")
        if _connections(first) > connections:
            self._book.complain(f"{contest}: the first was let in beside the second")
        first.kill()
        if not second.running:
            second.start()
        with self._ground.steady:
            name = self._name_of_first() or f"{first.folder.name}-anew"
            renamed = self._ground.make_agent(name, first.folder)
            renamed.token_file()
        self._ground.agents = {**self._ground.agents, FAR: second, name: renamed}
        renamed.start()

    def _name_of_first(self) -> str | None:
        """What the server calls the host now whose name was taken; None if it has forgotten it."""
        hosts = {str(one["name"]) for one in self._ground.server.get("/v1/hosts")["items"]}
        return next(iter(sorted(hosts - set(self._ground.folders))), None)

    # ---------------------------------------------------------------------------------------------------- judging

    def _judge_ended(self, contest: Contest, first: RealAgent) -> None:
        """Complain if the guests of the first may run, or do, though the second was let in."""
        left_ms = (_lease_ends_ns(first) - now_ns()) // 1_000_000
        if left_ms > 0:
            self._book.complain(f"{contest}: let in while the lease of the first had {left_ms} ms left")
        for guest in _guests_of(first.folder):
            self._book.complain(f"{contest}: let in while process {guest.process_id} held {guest.instance_id}")

    def _remove(self, contest: Contest, second: RealAgent, seen: frozenset[str]) -> None:
        """End an agent that was never let in, complain of what it holds or has made, and remove its folder."""
        second.kill()
        for guest in _guests_of(second.folder):
            self._book.complain(f"{contest}: refused, and process {guest.process_id} holds {guest.instance_id}")
        for name in sorted(_names(second.folder) - seen):
            self._book.complain(f"{contest}: refused, and left {name}")
        second.clear()
        shutil.rmtree(second.folder)


def _connections(agent: RealAgent) -> int:
    return len(agent.logged("connected"))


def _refusals(agent: RealAgent) -> int:
    return len(agent.logged("refused by server"))


def _lease_ends_ns(agent: RealAgent) -> int:
    """When the lease in the agent's folder ends, whether it runs or not; 0 if there is none."""
    path = agent.folder / LEASE
    if not path.exists():
        return 0
    lease = Lease(path)
    lease.open()
    try:
        return lease.ends_ns
    finally:
        lease.close()


def _guests_of(folder: Path) -> Iterator[FoundGuest]:
    """The processes that hold guests in the folder, wherever it was when they were started."""
    try:
        guests = (folder / "guests").stat()
    except FileNotFoundError:
        return
    for one in find_guests():
        if (one.folder.device, one.folder.inode) == (guests.st_dev, guests.st_ino) and one.lives():
            yield one


def _names(folder: Path) -> frozenset[str]:
    """What there is where an agent that was never let in makes nothing."""
    return frozenset(f"{kind}/{one.name}" for kind in _LEFT_EMPTY for one in (folder / kind).glob("*"))
