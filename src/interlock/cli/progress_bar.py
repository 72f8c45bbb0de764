"""How a bar looks on a terminal: what is going on, how far it is, how fast, since when, and how long it will yet take.

When to draw is not here but in `live_line`. A line is written over the one before, without clearing it first, so that
nothing flickers; and it is made to fit, so that no terminal breaks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.progress_bar import ProgressBar as Bar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from interlock.cli.live_line import Standing
from interlock.cli.wording import duration, size

_REST_OF_LINE: Final = "\x1b[K"
_GAP: Final = 2
_SPINNER: Final = 2
"""The cells of the spinner and the space after it."""
_BAR_SHARE: Final = 6
"""Which part of a line is the bar's; it is made the least where that lets more be told."""
_BAR_LEAST: Final = 5
_BAR_MOST: Final = 30
_TEXT_LEAST: Final = 12
_PERCENT: Final = 100
_FORETOLD_AFTER_S: Final = 2.0
_FORETOLD_FROM: Final = 0.02
"""How much has to be done before what is left can be told by it."""


class _Layout(NamedTuple):
    text: str
    bar: int
    facts: tuple[str, ...]


class ProgressBar:
    """One line at the bottom of what was written."""

    def __init__(self, stream: TextIO, *, plain: bool = False) -> None:
        self._stream = stream
        self._console = Console(
            file=stream, force_terminal=True, no_color=plain or None, highlight=False, markup=False, emoji=False
        )
        self._spinner = Spinner("dots" if self._console.encoding.startswith("utf") else "line")
        self._shown = Standing("")
        self._shown_from: tuple[float, float] | None = None

    def draw(self, standing: Standing, elapsed_s: float) -> None:
        """Write how it stands over what was written before."""
        left_s = self._left_s(standing, elapsed_s)
        room = max(_TEXT_LEAST, self._console.size.width - 1)
        layout = next(_layouts(standing, elapsed_s, left_s, room - _SPINNER))
        line = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        spinner = self._spinner.render(elapsed_s)
        cells: list[Bar | Text] = [Text(f"{spinner} {layout.text}", no_wrap=True)]
        if layout.bar:
            cells.append(_bar(standing.fraction, layout.bar, elapsed_s))
        if layout.facts:
            cells.append(Text((" " * _GAP).join(layout.facts), style="dim", no_wrap=True))
        line.add_row(*cells)
        with self._console.capture() as drawn:
            self._console.print(line, end="", crop=True, width=room + _GAP)
        self._write("\r" + drawn.get().split("\n")[0].rstrip() + _REST_OF_LINE)

    def clear(self) -> None:
        """Leave the line as if nothing had been written."""
        self._write("\r" + _REST_OF_LINE)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _left_s(self, standing: Standing, elapsed_s: float) -> float | None:
        """How long it will yet take, by how fast bytes go or by how long what is done has taken; None: who knows."""
        if standing.per_s and standing.total is not None and standing.done is not None:
            return (standing.total - standing.done) / standing.per_s
        if standing.fraction is None:
            self._shown_from = None
            return None
        if self._shown_from is None or standing.text != self._shown.text or standing.fraction < self._shown_from[1]:
            self._shown, self._shown_from = standing, (elapsed_s, standing.fraction)
        since, before = self._shown_from
        gained = standing.fraction - before
        if elapsed_s - since < _FORETOLD_AFTER_S or gained < _FORETOLD_FROM:
            return None
        return (1 - standing.fraction) * (elapsed_s - since) / gained


def _bar(fraction: float | None, width: int, elapsed_s: float) -> Bar:
    return Bar(
        total=None if fraction is None else 1.0,
        completed=fraction or 0,
        width=width,
        animation_time=elapsed_s,
        complete_style="cyan",
        finished_style="green",
        pulse_style="cyan",
    )


def _layouts(standing: Standing, elapsed_s: float, left_s: float | None, room: int) -> Iterator[_Layout]:
    """What fits, the fullest first: facts are left out before the bar, and the text is cut last."""
    percent = () if standing.fraction is None else (f"{_percent(standing.fraction):3} %",)
    moved = () if standing.done is None else (_moved(standing.done, standing.total),)
    rate = () if not standing.per_s else (f"{size(standing.per_s)}/s",)
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
            if cell_len(standing.text) + _GAP + width + sum(map(_width, facts)) <= room:
                yield _Layout(standing.text, width, facts)
    for facts in (least, percent or since, ()):
        for_text = room - sum(map(_width, facts))
        if for_text >= _TEXT_LEAST or not facts:
            yield _Layout(_cut(standing.text, max(1, for_text)), 0, facts)


def _percent(fraction: float) -> int:
    """A hundred only of what is done."""
    return round(fraction * _PERCENT) if fraction >= 1 else min(_PERCENT - 1, round(fraction * _PERCENT))


def _width(text: str) -> int:
    return cell_len(text) + _GAP


def _cut(text: str, width: int) -> str:
    cut = Text(text)
    cut.truncate(width, overflow="ellipsis")
    return cut.plain


def _moved(done: int, total: int | None) -> str:
    if not total:
        return size(done)
    number, _, unit = size(done).partition(" ")
    whole = size(total)
    return f"{number}/{whole}" if whole.endswith(f" {unit}") else f"{number} {unit}/{whole}"
