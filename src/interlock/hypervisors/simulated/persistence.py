"""The files of a simulated host's guests: one JSON file each, so that the guests outlive the process."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import msgspec

from interlock.core.errors import Unavailable
from interlock.hypervisors.simulated.guest import SimulatedGuest


class GuestFiles:
    """The guests in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> dict[str, SimulatedGuest]:
        """Return the guests by instance id; create the folder if it is missing.

        Raises:
            Unavailable: the folder cannot be used, or a file in it is invalid.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files = sorted(self._folder.glob("*.json"))
            guests = [msgspec.json.decode(path.read_bytes(), type=SimulatedGuest) for path in files]
        except (OSError, msgspec.DecodeError) as error:
            raise Unavailable(
                f"The simulated host cannot read its guests in {self._folder}: {error}",
                remedy="Make the folder writable for this user; if a file in it is invalid, remove that file.",
            ) from error
        return {guest.instance_id: guest for guest in guests}

    def write(self, guest: SimulatedGuest) -> None:
        """Write a guest's file atomically."""
        path = self._path(guest)
        draft = path.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(guest))
        draft.replace(path)

    def remove(self, guest: SimulatedGuest) -> None:
        """Remove a guest's file."""
        self._path(guest).unlink(missing_ok=True)

    def _path(self, guest: SimulatedGuest) -> Path:
        return self._folder / f"{quote(guest.instance_id, safe='')}.json"
