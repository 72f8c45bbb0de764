"""What a soak did and what it found wrong, written down by many threads. Nothing is judged here."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

_ANY_NAME: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|(?:vm|data)-[0-9]+|\b[0-9]{4,}\b")
"""What differs between two messages that say the same."""
ACKNOWLEDGED: Final = "requests acknowledged"
_MESSAGE_LENGTH: Final = 160


class Book:
    """Counts by kind, complaints, and the requests that were acknowledged."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        """What happened, and how often."""
        self.ended: dict[str, Counter[str]] = {}
        """How the requests for each operation ended."""
        self.messages: Counter[str] = Counter()
        """Why requests failed."""
        self.acknowledged: list[str] = []
        """The ids of all requests that were admitted."""
        self.seconds: dict[str, float] = {}
        """How long each part of the soak took."""
        self._lock = threading.Lock()
        self._labels = 0

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Note how long a part of the soak takes."""
        begun = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - begun, 1)

    def complain(self, what: str) -> None:
        """Write down what is wrong; once is enough."""
        with self._lock:
            if what not in self.wrong:
                self.wrong.append(what)

    def acknowledge(self, request: dict[str, Any] | None, operation: str) -> str | None:
        """Note what was admitted; the request's id, or None where what was asked for holds already."""
        if request is None:
            self.count(f"{operation}: redundant")
            return None
        with self._lock:
            self.acknowledged.append(request["id"])
            self.counts[ACKNOWLEDGED] += 1
        return str(request["id"])

    def label(self) -> int:
        """A number that was not given before."""
        with self._lock:
            self._labels += 1
            return self._labels

    def note_end(self, request: dict[str, Any]) -> None:
        """Note how a request ended."""
        operation, status = request["operation"], request["status"]
        with self._lock:
            self.ended.setdefault(operation, Counter())[status] += 1
            if status == "failed":
                message = _ANY_NAME.sub("…", request["message"] or "")[:_MESSAGE_LENGTH]
                self.messages[f"{operation}: {message}"] += 1

    def succeeded(self, operation: str | None = None) -> int:
        """How many requests succeeded, of one operation or of all."""
        chosen = self.ended.values() if operation is None else [self.ended.get(operation, Counter())]
        return sum(one["succeeded"] for one in chosen)

    def report(self) -> dict[str, Any]:
        """All of it, for people and for `jq`."""
        return {
            "wrong": self.wrong,
            "ended": {operation: dict(sorted(ends.items())) for operation, ends in sorted(self.ended.items())},
            "why requests failed": dict(self.messages.most_common()),
            "seconds": self.seconds,
            "counts": dict(sorted(self.counts.items())),
        }
