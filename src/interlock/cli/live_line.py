"""What is going on, told while it goes on: one line that changes on a terminal, lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import Final, Self, TextIO

from interlock.cli.wording import duration

_FRAMES: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAME_S: Final = 0.1
_CLEAR: Final = "\r\x1b[2K"


class LiveLine:
    """A context in which `tell` shows what is going on now; leaving it clears the line of a terminal."""

    def __init__(self, stream: TextIO, *, silent: bool = False) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._silent = silent
        self._text = ""
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def tell(self, text: str) -> None:
        """Say what is going on; the same said again is not repeated."""
        with self._lock:
            if text == self._text:
                return
            self._text = text
            if not self._terminal and not self._silent:
                print(f"{self.elapsed_s:7.1f} s  {text}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._terminal and not self._silent:
            self._thread = threading.Thread(target=self._turn, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _turn(self) -> None:
        """Redraw until the end: a spinner that turns says that the wait is not the terminal's."""
        frame = 0
        while not self._ended.wait(_FRAME_S):
            with self._lock:
                line = f"{_FRAMES[frame % len(_FRAMES)]} {self._text}  {duration(round(self.elapsed_s))}"
            room = shutil.get_terminal_size().columns - 1
            self._stream.write(_CLEAR + (line if len(line) <= room else line[: room - 1] + "…"))
            self._stream.flush()
            frame += 1
        self._stream.write(_CLEAR)
        self._stream.flush()


def progress_stream(*, json: bool) -> TextIO:
    """Where progress is told: not among the documents of `--json`."""
    return sys.stderr if json else sys.stdout
