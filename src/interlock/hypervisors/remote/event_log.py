"""Events of guests that the server has not acknowledged, in a file that outlives the agent."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Final

import msgspec

from interlock.hypervisors.remote.protocol import GuestEventMessage
from interlock.images.atomic_files import drafted

_LENGTH_MAX: Final = 10_000
"""Maximum number of events; beyond it the oldest are dropped, and the server inspects its guests."""


class EventLog:
    """Events that were not acknowledged, in order, each with a number that is never used again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.id = secrets.token_hex(16)
        """Another one for each sequence of numbers."""
        self._last = 0
        self._kept: list[GuestEventMessage] = []
        self._decoder = msgspec.json.Decoder(GuestEventMessage)

    def open(self) -> None:
        """Read the events of an earlier agent. A truncated last line is ignored."""
        if not self._path.exists():
            self._write()
            return
        head, *lines = self._path.read_bytes().split(b"\n")
        with contextlib.suppress(msgspec.DecodeError):
            identity, last = msgspec.json.decode(head, type=tuple[str, int])
            self.id, self._last = identity, last
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError):
                self._kept.append(self._decoder.decode(line))
        self._last = max([self._last, *(message.number for message in self._kept)])

    def add(self, message: GuestEventMessage) -> GuestEventMessage:
        """Keep an event, and return it with its number."""
        self._last += 1
        numbered = msgspec.structs.replace(message, number=self._last)
        self._kept.append(numbered)
        if len(self._kept) > _LENGTH_MAX:
            self._kept = self._kept[_LENGTH_MAX // 2 :]
            self._write()
        else:
            with contextlib.suppress(OSError), self._path.open("ab") as file:
                file.write(msgspec.json.encode(numbered) + b"\n")
        return numbered

    def waiting(self) -> tuple[GuestEventMessage, ...]:
        """Return the events that were not acknowledged, as events from before the connection."""
        return tuple(
            msgspec.structs.replace(message, event=msgspec.structs.replace(message.event, during_watch=False))
            for message in self._kept
        )

    def acknowledge(self, number: int) -> None:
        """Drop the events up to this number."""
        before = len(self._kept)
        self._kept = [message for message in self._kept if message.number > number]
        if before and not self._kept:
            self._write()

    def _write(self) -> None:
        """Rewrite the file. If that fails, an event is sent twice at most."""
        lines = [msgspec.json.encode((self.id, self._last)), *(msgspec.json.encode(message) for message in self._kept)]
        with contextlib.suppress(OSError), drafted(self._path) as draft:
            draft.write_bytes(b"\n".join(lines) + b"\n")
