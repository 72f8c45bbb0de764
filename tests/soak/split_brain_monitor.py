"""Who watches that no instance runs twice: looks at the processes of all hosts, and asks nobody.

Processes are found by their marks, whatever has become of the folders in which they were started.

While a guest goes to another host as it runs, a process holds it on both. That is as it should be for as long as one
of them stands still: the one that `awaits` it has never run, and the one that `sent` it does not run any more. The
first is taken from the mark in its folder; the second is seen besides, by the threads of its vCPUs doing nothing.
QEMU's other threads work on where a guest stands still: for its monitor, or on what the guest did before.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from interlock.hypervisors.qemu.process.process_scan import FoundGuest, find_guests
from soak.report import Book

_LOOK_EVERY_S: Final = 0.5
_STILL_S: Final = 0.3
"""For how long a guest is watched that must stand still."""
SWITCHES_MAX: Final = 5
"""How often the vCPUs of one that stands still may be woken in that time; that of the smallest guest is woken fifteen
times."""
_VCPU_THREADS: Final = ("CPU ", "ALL CPUs")
"""How QEMU's names of the threads of vCPUs begin: one for each, or one for all."""
_STEP_TICKS: Final = 2 * os.sysconf("SC_CLK_TCK")


class Holder(NamedTuple):
    """A process that holds an instance."""

    host: str
    guest: FoundGuest

    @property
    def process_id(self) -> int:
        return self.guest.process_id

    def lives(self) -> bool:
        """Whether it runs."""
        return self.guest.lives()

    def marked(self, name: str) -> bool:
        """Whether there is a mark in its folder; there is none where that was deleted."""
        place = self.guest.place()
        return place is not None and (place.parent / name).exists()


class Doubles:
    """Looks again and again; complains of each instance once.

    Args:
        folders: where each host has its instances, a folder for each; by the hosts' names. Folders beside them are
            watched too, such as those of other agents of the same name.
    """

    def __init__(self, folders: Mapping[str, Path], book: Book) -> None:
        self._names = {str(folder.resolve().parent): name for name, folder in folders.items()}
        self._root = Path(os.path.commonpath(self._names))
        self._book = book

    def look_until(self, over: threading.Event) -> None:
        """Look until `over` is set."""
        while not over.wait(_LOOK_EVERY_S):
            self._book.count("looks for doubles")
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 - one that breaks must be seen
                self._book.complain(f"looking for doubles broke: {error!r}")
                return

    def look(self) -> None:
        """Complain of each instance that runs twice."""
        for instance_id, holders in self.holders().items():
            for one, other in itertools.combinations(holders, 2):
                self._judge(instance_id, one, other)

    def holders(self) -> dict[str, list[Holder]]:
        """Who holds each instance."""
        found: dict[str, list[Holder]] = {}
        for instance_id, holder in self._all():
            found.setdefault(instance_id, []).append(holder)
        return found

    def _all(self) -> Iterator[tuple[str, Holder]]:
        for guest in find_guests():
            if Path(guest.folder.path).is_relative_to(self._root):
                yield guest.instance_id, Holder(self._names.get(guest.folder.path, guest.folder.path), guest)

    def _judge(self, instance_id: str, one: Holder, other: Holder) -> None:
        # The marks are read in this order: what is not awaited any more never is again, and whoever had sent it then,
        # goes on only if the other has ended, which is looked at last.
        awaited = [holder.marked("awaited") for holder in (one, other)]
        sent = [holder.marked("sent") for holder in (one, other)]
        if not (one.lives() and other.lives()):
            return
        if one.host == other.host:
            self._tell(instance_id, one, other, "no host may hold it twice")
        elif any(awaited):
            self._book.count("seen on both hosts, awaited")
        elif not any(sent):
            self._tell(instance_id, one, other, "neither awaits it, neither has sent it")
        else:
            source = one if sent[0] else other
            self._book.count("seen on both hosts, taken up")
            if all(moves(source) for _ in range(2)) and source.marked("sent") and one.lives() and other.lives():
                self._tell(instance_id, one, other, f"that on {source.host} goes on although it was sent")

    def _tell(self, instance_id: str, one: Holder, other: Holder, why: str) -> None:
        on = f"on {one.host} by process {one.process_id} and on {other.host} by {other.process_id}"
        self._book.complain(f"{instance_id} runs twice, {on}: {why}")


def moves(holder: Holder, within_s: float = _STILL_S) -> bool:
    """Whether its guest runs: within so long its vCPUs are woken again and again."""
    before, deadline = vcpu_switches(holder), time.monotonic() + within_s
    while True:
        threading.Event().wait(_STILL_S)
        if sum(number - before.get(thread, 0) for thread, number in vcpu_switches(holder).items()) > SWITCHES_MAX:
            return True
        if time.monotonic() >= deadline:
            return False


def is_stopped(holder: Holder) -> bool:
    """Whether the process was stopped by a signal."""
    return _stat(holder)[:1] == ["T"]


def computed(holder: Holder) -> int:
    """How much processor time it has had, in steps that a guest with nothing to do seldom makes."""
    stat = _stat(holder)
    return (int(stat[11]) + int(stat[12])) // _STEP_TICKS if stat else 0


def _stat(holder: Holder) -> list[str]:
    """What the kernel says of the process behind its name; nothing if it is gone."""
    try:
        return Path(f"/proc/{holder.process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def vcpu_switches(holder: Holder) -> dict[str, int]:
    """How often each vCPU's thread was given a processor."""
    found = {}
    for thread in Path(f"/proc/{holder.process_id}/task").glob("*"):
        try:
            text = (thread / "status").read_text()
        except OSError:
            continue
        if text.partition("\t")[2].startswith(_VCPU_THREADS):
            found[thread.name] = sum(int(number) for number in re.findall(r"ctxt_switches:\s+(\d+)", text))
    return found
