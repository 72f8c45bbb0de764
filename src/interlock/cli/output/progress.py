"""Progress display: a bar on a terminal, lines elsewhere.

On a terminal, short operations show no bar, and the bar is removed at the end. Lines are overwritten without clearing
them first, to avoid flicker.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TextIO

from interlock.cli.output.formatting import duration, size

if TYPE_CHECKING:
    # Imported where it is used: it costs more time than a quick command takes.
    from rich.progress_bar import ProgressBar as Bar

_QUIET_S: Final = 0.5
"""Operations shorter than this show no bar."""
_FRAME_S: Final = 0.1
_DUMB: Final = frozenset({"dumb", "unknown"})
_REST_OF_LINE: Final = "\x1b[K"
_GAP: Final = 2
_SPINNER: Final = 2
"""Width of the spinner and the space after it."""
_BAR_SHARE: Final = 6
"""Share of the line for the bar (1/6); it shrinks to the minimum if more text then fits."""
_BAR_LEAST: Final = 5
_BAR_MOST: Final = 30
_TEXT_LEAST: Final = 12
_PERCENT: Final = 100
_ESTIMATE_AFTER_S: Final = 2.0
_ESTIMATE_FROM: Final = 0.02
"""Fraction that must be done before the remaining time is estimated."""


class Progress(NamedTuple):
    """The progress of an operation."""

    text: str
    fraction: float | None = None
    """0 to 1; None if unknown."""
    done: int | None = None
    """Bytes transferred."""
    total: int | None = None
    """Bytes to transfer."""
    per_s: int | None = None
    """Recent transfer rate."""


def transfer(text: str, done: int, total: int | None, elapsed_s: float) -> Progress:
    """Return the progress of a transfer of `done` of `total` bytes."""
    per_s = int(done / elapsed_s) if elapsed_s >= 1 else None
    return Progress(text, done / total if total else None, done, total, per_s)


class LiveLine:
    """Context manager whose `update` shows the progress; on exit the line of a terminal is cleared.

    Args:
        stream: output.
        silent: no output.
        plain: no colours.
        since_s: time elapsed before.
    """

    def __init__(self, stream: TextIO, *, silent: bool = False, plain: bool = False, since_s: float = 0) -> None:
        self._stream = stream
        self._terminal = stream.isatty() and os.environ.get("TERM") not in _DUMB
        self._silent = silent
        self._plain = plain
        self._line = ""
        self._progress = Progress("")
        self._began = time.monotonic() - since_s
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def update(self, line: str, progress: Progress | None = None) -> None:
        """Set the line and, for a terminal, the progress. An unchanged line is not repeated."""
        with self._lock:
            self._progress = progress or Progress(line)
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
        """Redraw until the end. The cursor is not hidden: it would stay hidden if the process were killed."""
        if self._ended.wait(_QUIET_S):
            return
        bar = ProgressBar(self._stream, plain=self._plain)
        while not self._ended.wait(_FRAME_S):
            with self._lock:
                progress = self._progress
            bar.draw(progress, self.elapsed_s)
        bar.clear()


def progress_stream(*, json: bool) -> TextIO:
    """Return the output for progress: standard error with `--json`."""
    return sys.stderr if json else sys.stdout


class _Layout(NamedTuple):
    text: str
    bar: int
    facts: tuple[str, ...]


class ProgressBar:
    """A progress bar on the last line of a terminal."""

    def __init__(self, stream: TextIO, *, plain: bool = False) -> None:
        from rich.console import Console
        from rich.spinner import Spinner

        self._stream = stream
        self._console = Console(
            file=stream, force_terminal=True, no_color=plain or None, highlight=False, markup=False, emoji=False
        )
        self._spinner = Spinner("dots" if self._console.encoding.startswith("utf") else "line")
        self._shown = Progress("")
        self._shown_from: tuple[float, float] | None = None

    def draw(self, progress: Progress, elapsed_s: float) -> None:
        """Overwrite the line with the progress."""
        from rich.table import Table
        from rich.text import Text

        left_s = self._left_s(progress, elapsed_s)
        room = max(_TEXT_LEAST, self._console.size.width - 1)
        layout = next(_layouts(progress, elapsed_s, left_s, room - _SPINNER))
        line = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        spinner = self._spinner.render(elapsed_s)
        cells: list[Any] = [Text(f"{spinner} {layout.text}", no_wrap=True)]
        if layout.bar:
            cells.append(_bar(progress.fraction, layout.bar, elapsed_s))
        if layout.facts:
            cells.append(Text((" " * _GAP).join(layout.facts), style="dim", no_wrap=True))
        line.add_row(*cells)
        with self._console.capture() as drawn:
            self._console.print(line, end="", crop=True, width=room + _GAP)
        self._write("\r" + drawn.get().split("\n")[0].rstrip() + _REST_OF_LINE)

    def clear(self) -> None:
        """Clear the line."""
        self._write("\r" + _REST_OF_LINE)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _left_s(self, progress: Progress, elapsed_s: float) -> float | None:
        """Estimate the remaining time from the transfer rate or the elapsed time; None if unknown."""
        if progress.per_s and progress.total is not None and progress.done is not None:
            return (progress.total - progress.done) / progress.per_s
        if progress.fraction is None:
            self._shown_from = None
            return None
        if self._shown_from is None or progress.text != self._shown.text or progress.fraction < self._shown_from[1]:
            self._shown, self._shown_from = progress, (elapsed_s, progress.fraction)
        since, before = self._shown_from
        gained = progress.fraction - before
        if elapsed_s - since < _ESTIMATE_AFTER_S or gained < _ESTIMATE_FROM:
            return None
        return (1 - progress.fraction) * (elapsed_s - since) / gained


def _bar(fraction: float | None, width: int, elapsed_s: float) -> Bar:
    from rich.progress_bar import ProgressBar as Bar

    return Bar(
        total=None if fraction is None else 1.0,
        completed=fraction or 0,
        width=width,
        animation_time=elapsed_s,
        complete_style="cyan",
        finished_style="green",
        pulse_style="cyan",
    )


def _layouts(progress: Progress, elapsed_s: float, left_s: float | None, room: int) -> Iterator[_Layout]:
    """Yield layouts that fit, the fullest first: figures are dropped before the bar, and the text is cut last."""
    percent = () if progress.fraction is None else (f"{_percent(progress.fraction):3} %",)
    moved = () if progress.done is None else (_moved(progress.done, progress.total),)
    rate = () if not progress.per_s else (f"{size(progress.per_s)}/s",)
    since = (duration(int(elapsed_s)),)
    left = () if left_s is None or left_s < 1 else (f"{duration(round(left_s))} left",)
    bar = min(_BAR_MOST, max(_BAR_LEAST, room // _BAR_SHARE))
    least = (*percent, *since)
    for facts in (
        (*percent, *moved, *rate, *since, *left),
        (*percent, *moved, *rate, *since),
        (*percent, *moved, *since),
        least,
        percent or since,
    ):
        for width in (bar, _BAR_LEAST):
            if _width(progress.text) + width + sum(map(_width, facts)) <= room:
                yield _Layout(progress.text, width, facts)
    for facts in (least, percent or since, ()):
        for_text = room - sum(map(_width, facts))
        if for_text >= _TEXT_LEAST or not facts:
            yield _Layout(_cut(progress.text, max(1, for_text)), 0, facts)


def _percent(fraction: float) -> int:
    """Return the percentage; 100 only when done."""
    return round(fraction * _PERCENT) if fraction >= 1 else min(_PERCENT - 1, round(fraction * _PERCENT))


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text) + _GAP


def _cut(text: str, width: int) -> str:
    from rich.text import Text

    cut = Text(text)
    cut.truncate(width, overflow="ellipsis")
    return cut.plain


def _moved(done: int, total: int | None) -> str:
    if not total:
        return size(done)
    number, _, unit = size(done).partition(" ")
    whole = size(total)
    return f"{number}/{whole}" if whole.endswith(f" {unit}") else f"{number} {unit}/{whole}"
