"""What goes wrong while the soak goes on, beside kills: QEMU processes that are stopped, and a full data folder."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

import httpx

from soak.environment import Ground
from soak.report import Book
from soak.split_brain_monitor import Doubles, Holder

FROZEN: Final = "QEMU processes stopped"
FULL: Final = "full disks"
"""What is counted."""
_FOR_GOOD: Final = 0.3
"""How often a process that is stopped is never continued."""
_FROZEN_S: Final = 8.0
"""The longest that another one is stopped."""
_FULL_S: Final = 6.0
"""The longest that the data folder is full."""
_WAYS_OUT: Final = (*("stop",) * 8, "delete", "force_delete")
"""What must be acknowledged on a full disk, as often as it is drawn."""
_FREE_BYTES: Final = 16 << 30
"""What the file system of the data folder can hold while it is not to be full."""


class Trouble(StrEnum):
    """What is done to the VMs and their hosts, unless a soak goes without it."""

    FROZEN = "frozen"
    """The QEMU process of a guest is stopped by a signal, for a while or for good."""
    EARLY = "early"
    """A guest that still boots is to stop, or to be resized, and so on."""
    FULL = "full"
    """The file system of the server's data folder has no space left. Only root can do that."""
    IDENTITIES = "identities"
    """Other agents want the name of a host, see `identities`."""


class Freezing:
    """Stops QEMU processes at random with SIGSTOP."""

    def __init__(self, doubles: Doubles, book: Book, over: threading.Event, every_s: float) -> None:
        self._doubles = doubles
        self._book = book
        self._over = over
        self._every_s = every_s

    def freeze_until_over(self, seed: float) -> None:
        """Stop one process after the other; those that are not left so for good are continued when this returns."""
        chance = random.Random(seed)
        try:
            while not self._over.wait(self._every_s * (0.5 + chance.random())):
                holders = [one for each in self._doubles.holders().values() for one in each]
                if holders:
                    self._freeze(chance.choice(holders), chance)
        except Exception as error:  # noqa: BLE001 - one that breaks must be seen
            self._book.complain(f"stopping QEMU processes broke: {error!r}")

    def _freeze(self, holder: Holder, chance: random.Random) -> None:
        for_good = chance.random() < _FOR_GOOD
        if not _send(holder, signal.SIGSTOP):
            return
        self._book.count(FROZEN)
        if for_good:
            self._book.count("QEMU processes stopped for good")
        if not for_good:
            self._over.wait(_FROZEN_S * chance.random())
            _send(holder, signal.SIGCONT)


def _send(holder: Holder, number: signal.Signals) -> bool:
    """Send a signal to a process; False if it has ended."""
    try:
        process = os.pidfd_open(holder.process_id)
    except ProcessLookupError:
        return False
    try:
        if not holder.lives():  # the id may mean another process by now
            return False
        signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(process)
    return True


class SmallDisk:
    """A file system in memory at `folder`, which can be made full to the last byte."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.mounted = False

    def mount(self) -> None:
        """Have it there, if we may: only root may mount."""
        self._folder.mkdir(mode=0o711, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={_FREE_BYTES},mode=711", "tmpfs", str(self._folder)]
        self.mounted = not subprocess.run(words, capture_output=True, check=False).returncode

    def unmount(self) -> None:
        """Let go of it, with all that is on it. Does nothing if it is not mounted."""
        if self.mounted:
            # Lazily: somebody may have a file open there.
            subprocess.run(["umount", "--lazy", str(self._folder)], check=True)
            self.mounted = False

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Have no space left while the block runs."""
        filler = self._folder / "filler"
        try:
            self._resize(self._used() + (4 << 20))
            _fill(filler)
            yield
        finally:
            filler.unlink(missing_ok=True)
            self._resize(_FREE_BYTES)

    def _used(self) -> int:
        found = os.statvfs(self._folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def _resize(self, size: int) -> None:
        words = ["mount", "-o", f"remount,size={size}", str(self._folder)]
        subprocess.run(words, capture_output=True, check=True)


def _fill(filler: Path) -> None:
    """Write until there is no space for one more byte."""
    with filler.open("ab", buffering=0) as file:
        for piece in (1 << 16, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(piece)):
                    pass


class Filling:
    """Fills the server's data folder at random, and sees that VMs can be stopped and deleted meanwhile."""

    def __init__(
        self, ground: Ground, book: Book, serving: threading.Event, over: threading.Event, every_s: float
    ) -> None:
        self._ground = ground
        self._book = book
        self._serving = serving
        self._over = over
        self._every_s = every_s
        self.deleted: set[str] = set()
        """The VMs that it wanted deleted: one of that name has another disk afterwards."""

    def fill_until_over(self, disk: SmallDisk, seed: float) -> None:
        """Fill the disk and free it, again and again; it is free when this returns."""
        chance = random.Random(seed)
        while not self._over.wait(self._every_s * (0.5 + chance.random())):
            try:
                with self._ground.steady, disk.full():
                    self._book.count(FULL)
                    enough = threading.Timer(_FULL_S * (0.3 + 0.7 * chance.random()), lambda: None)
                    enough.start()
                    while enough.is_alive() and not self._over.is_set():
                        self._find_a_way_out(chance)
                        self._over.wait(0.2)  # not more than a person with a script
                    enough.cancel()
            except Exception as error:  # noqa: BLE001 - one that breaks must be seen
                self._book.complain(f"filling the disk broke: {error!r}")
                return

    def _find_a_way_out(self, chance: random.Random) -> None:
        name = chance.choice(list(self._ground.vms))
        operation = chance.choice(_WAYS_OUT)
        self._serving.wait()
        parameters = {"hard": True} if operation == "stop" else {}
        if operation != "stop":
            self.deleted.add(name)
        try:
            answer = self._ground.server.submit(name, operation, **parameters)
            if answer.is_server_error and answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                self._book.complain(f"{operation} of {name} on a full disk: {answer.status_code} {answer.text[:300]}")
            elif answer.is_success:
                self._book.count(f"{operation} acknowledged on a full disk")
                self._book.acknowledge(answer.json().get("request"), operation)
        except (httpx.HTTPError, RuntimeError):
            self._book.count("broken connections")
