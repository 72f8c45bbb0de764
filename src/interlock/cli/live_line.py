"""What is going on, told while it goes on: a bar that changes on a terminal, lines elsewhere.

On a terminal nothing is shown of what ends soon, and nothing stays of what was shown. How a bar looks is in
`progress_bar`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Final, NamedTuple, Self, TextIO

_QUIET_S: Final = 0.5
"""What takes no longer than this is not worth a bar."""
_FRAME_S: Final = 0.1
_DUMB: Final = frozenset({"dumb", "unknown"})


class Standing(NamedTuple):
    """How far something is."""

    text: str
    """What is going on."""
    fraction: float | None = None
    """How much of it is done, 0 to 1; None while that is not known."""
    done: int | None = None
    """How many bytes were moved, and below how many there are."""
    total: int | None = None
    per_s: int | None = None
    """How many bytes were moved a second lately."""


class LiveLine:
    """A context in which `tell` shows what is going on now; leaving it clears the line of a terminal.

    Args:
        stream: where it is told.
        silent: nothing is told at all.
        plain: without colours.
        since_s: for how long it has been going on already.
    """

    def __init__(self, stream: TextIO, *, silent: bool = False, plain: bool = False, since_s: float = 0) -> None:
        self._stream = stream
        self._terminal = stream.isatty() and os.environ.get("TERM") not in _DUMB
        self._silent = silent
        self._plain = plain
        self._line = ""
        self._standing = Standing("")
        self._began = time.monotonic() - since_s
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def tell(self, line: str, standing: Standing | None = None) -> None:
        """Say what is going on: in one line, and how a terminal shows it. The same said again is not repeated."""
        with self._lock:
            self._standing = standing or Standing(line)
            if line == self._line:
                return
            self._line = line
            if not self._terminal and not self._silent:
                print(f"{self.elapsed_s:7.1f} s  {line}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._terminal and not self._silent:
            self._thread = threading.Thread(target=self._paint, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _paint(self) -> None:
        """Redraw until the end. The cursor is not hidden: who kills this process must not be left without one."""
        if self._ended.wait(_QUIET_S):
            return
        # Costs more time than a quick command takes.
        from interlock.cli.progress_bar import ProgressBar

        bar = ProgressBar(self._stream, plain=self._plain)
        while not self._ended.wait(_FRAME_S):
            with self._lock:
                standing = self._standing
            bar.draw(standing, self.elapsed_s)
        bar.clear()


def progress_stream(*, json: bool) -> TextIO:
    """Where progress is told: not among the documents of `--json`."""
    return sys.stderr if json else sys.stdout
