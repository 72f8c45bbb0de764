"""What guests of a host did and the server has not heard yet: a file that outlives the agent, so that none is lost."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Final

import msgspec

from interlock.hypervisors.remote.wire import Told

_LENGTH_MAX: Final = 10_000
"""How many events wait at most; beyond that the oldest are forgotten, and the server sees by looking how guests are."""


class EventLog:
    """Events that were told and not acknowledged, in order, each with a number that is never used again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.id = secrets.token_hex(16)
        """Another one for each run of numbers."""
        self._last = 0
        self._kept: list[Told] = []
        self._decoder = msgspec.json.Decoder(Told)

    def open(self) -> None:
        """Read what an earlier agent could not tell. A last line that was cut short is none."""
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
        self._last = max([self._last, *(told.number for told in self._kept)])

    def add(self, told: Told) -> Told:
        """Keep an event; the answer has its number."""
        self._last += 1
        numbered = msgspec.structs.replace(told, number=self._last)
        self._kept.append(numbered)
        if len(self._kept) > _LENGTH_MAX:
            self._kept = self._kept[_LENGTH_MAX // 2 :]
            self._write()
        else:
            with contextlib.suppress(OSError), self._path.open("ab") as file:
                file.write(msgspec.json.encode(numbered) + b"\n")
        return numbered

    def waiting(self) -> tuple[Told, ...]:
        """What was not acknowledged, as news of what happened while nobody watched."""
        return tuple(
            msgspec.structs.replace(told, event=msgspec.structs.replace(told.event, during_watch=False))
            for told in self._kept
        )

    def heard(self, number: int) -> None:
        """Forget the events up to this number."""
        before = len(self._kept)
        self._kept = [told for told in self._kept if told.number > number]
        if before and not self._kept:
            self._write()

    def _write(self) -> None:
        """Write the file anew. One that cannot be written costs at most an event that is told twice."""
        draft = self._path.with_suffix(".new")
        lines = [msgspec.json.encode((self.id, self._last)), *(msgspec.json.encode(told) for told in self._kept)]
        with contextlib.suppress(OSError):
            draft.write_bytes(b"\n".join(lines) + b"\n")
            draft.replace(self._path)
