"""How a simulated host keeps its guests, and tells who drives it of them.

The rules of this file:

* The host outlives whoever drives it, as processes outlive a server. With a folder, it outlives the Python process
  too: each change is in the guest's file before the call that made it returns, so that a `kill -9` loses nothing.
* What a guest does by itself is kept as untold until the watcher has told it, so it is told once however the
  watcher dies.

What can happen to a guest is not here: see `host`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import msgspec

from interlock.core.errors import HypervisorError, Unavailable
from interlock.hypervisors.simulated.guest import Command, Guest


class Watcher(Protocol):
    """Who drives the host now."""

    def replaced(self) -> None:
        """Somebody else drives it from now on."""

    def stirred(self, guest: Guest) -> None:
        """The guest changed; it may have something untold."""

    def button_pressed(self, guest: Guest) -> None:
        """The guest will react to its power button, in its own time, by `SimulatedHost.answer_button`."""

    def answered(self, command: Command, error: HypervisorError | None) -> None:
        """A command that had waited was carried out, refused, or lost with the guest."""


class KeptGuests:
    """The guests of a host, in memory and, with a folder, each in a file of its own."""

    def __init__(self, folder: Path | None) -> None:
        self.guests: dict[str, Guest] = {}
        self._folder = folder
        self._watcher: Watcher | None = None

    def load(self) -> None:
        """Read the folder again, where there is one.

        Raises:
            Unavailable: the folder cannot be used, or a file in it is not one of a guest.
        """
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept = [msgspec.json.decode(path.read_bytes(), type=Guest) for path in sorted(self._folder.glob("*.json"))]
        except (OSError, msgspec.DecodeError) as error:
            raise Unavailable(
                f"The simulated host cannot read its guests in {self._folder}: {error}",
                remedy="Make the folder writable for this user; if a file in it is damaged, remove that file.",
            ) from error
        self.guests = {guest.instance_id: guest for guest in kept}

    def _file(self, guest: Guest) -> Path | None:
        return None if self._folder is None else self._folder / f"{quote(guest.instance_id, safe='')}.json"

    def keep(self, guest: Guest) -> None:
        """Write the guest's file, whole or not at all. Does nothing without a folder."""
        path = self._file(guest)
        if path is not None and self.guests.get(guest.instance_id) is guest:
            draft = path.with_suffix(".draft")
            draft.write_bytes(msgspec.json.encode(guest))
            draft.replace(path)

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` from now on, and nobody else."""
        before, self._watcher = self._watcher, watcher
        if before is not None and before is not watcher:
            before.replaced()

    def unwatch(self, watcher: Watcher) -> None:
        """Tell nobody, if `watcher` is who was told."""
        if self._watcher is watcher:
            self._watcher = None

    def changed(self, guest: Guest) -> None:
        """Keep the guest as it is now, and tell who waits for a change of it."""
        self.keep(guest)
        if self._watcher is not None:
            self._watcher.stirred(guest)
