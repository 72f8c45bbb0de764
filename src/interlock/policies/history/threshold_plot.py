"""Threshold plots: recorded progress gaps of each operation, with the current and the proposed threshold.

Drawn with matplotlib, which is imported on demand because that is slow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from interlock.core.errors import Invalid
from interlock.core.policy import MeasuredFrom
from interlock.policies.history.suggested_policies import shown, written
from interlock.policies.history.threshold_advisor import OperationStatistics, Recorded, Suggestion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES: Final = (".png", ".svg", ".html")
PANELS_MAX: Final = 48
"""How many operations are drawn at most, those recorded most often."""

_COLUMNS_MAX: Final = 3
_BINS_A_DECADE: Final = 12
# The palette of Okabe and Ito, which people of every colour vision distinguish; the lines differ in their dashes too.
_BARS: Final = "#56B4E9"
_TODAY: Final = "#000000"
_PROPOSED: Final = "#D55E00"
_TICKS_MS: Final = (
    (1, "1 ms"),
    (10, "10 ms"),
    (100, "0.1 s"),
    (1_000, "1 s"),
    (10_000, "10 s"),
    (60_000, "1 min"),
    (600_000, "10 min"),
    (3_600_000, "1 h"),
    (86_400_000, "1 d"),
)
_AXIS: Final = {
    MeasuredFrom.LAST_PROGRESS: "longest silence",
    MeasuredFrom.TASK_STARTED: "time since it was taken",
}
_HTML: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Thresholds</title>
<style>body {{ margin: 1em; background: white }} svg {{ max-width: 100%; height: auto }}</style></head>
<body>
{svg}
</body></html>
"""


def check_suffix(path: Path) -> None:
    """Raise `Invalid` if no picture can be written under that name, and `ModuleNotFoundError` without matplotlib."""
    import_module("matplotlib")
    if path.suffix.lower() not in SUFFIXES:
        raise Invalid(f"{path.name} names no kind of picture.", remedy=f"End it in {', '.join(SUFFIXES)}.")


def draw(suggestion: Suggestion, recorded: Recorded, path: Path) -> int:
    """Write the picture to `path`, as its suffix says; how many operations are in it.

    Raises:
        Invalid: the suffix is not known, or nothing healthy was recorded.
        OSError: the file cannot be written.
    """
    check_suffix(path)
    panels = _panels(suggestion, recorded)
    if not panels:
        raise Invalid("No operation that a threshold is about succeeded in this time, so there is nothing to draw.")
    kind = "png" if path.suffix.lower() == ".png" else "svg"
    picture = _draw(suggestion, panels, kind)
    if path.suffix.lower() == ".html":
        text = picture.decode("utf-8")
        picture = _HTML.format(svg=text[text.index("<svg") :]).encode("utf-8")
    path.write_bytes(picture)
    return len(panels)


_Panel = tuple[OperationStatistics, Sequence[int]]


def _panels(suggestion: Suggestion, recorded: Recorded) -> list[_Panel]:
    values = {
        (watch.operation.value, watch.phases, watch.measured_from): measures.values_ms
        for watch, measures in recorded.items()
    }
    found = [(one, values[one.operation, one.phases, one.measured_from]) for one in suggestion.findings if one.healthy]
    most = sorted(found, key=lambda panel: -panel[0].healthy)[:PANELS_MAX]
    return [panel for panel in found if panel in most]


def _draw(suggestion: Suggestion, panels: list[_Panel], kind: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS_MAX, len(panels))
    lines = -(-len(panels) // columns)
    # Names of sets and policies are text, never mathematics; and the same numbers give the same file.
    settings: dict[Any, Any] = {"text.parse_math": False, "svg.hashsalt": "interlock", "svg.fonttype": "path"}
    with mpl.rc_context({**mpl.rcParamsDefault, **settings, "backend": "agg"}):
        figure = Figure(figsize=(4.6 * columns + 0.4, 2.9 * lines + 1.1), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        limits = _limits(panels)
        for axis, panel in zip(axes, panels, strict=False):
            _draw_panel(axis, panel, limits)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.suptitle(_title(suggestion), fontsize=11)
        _legend(figure, columns)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _limits(panels: list[_Panel]) -> tuple[float, float]:
    """The ends of the time axis, in ms: one for all, so that operations can be compared."""
    least = min(max(1, min(values)) for _, values in panels)
    most = max(max((*values, *one.today_ms, one.proposed_ms or 0)) for one, values in panels)
    return least / 1.6, most * 4


def _draw_panel(axis: Axes, panel: _Panel, limits: tuple[float, float]) -> None:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    finding, values = panel
    measured = np.maximum(np.asarray(values, dtype=float), 1.0)
    bins = max(2, round(_BINS_A_DECADE * float(np.log10(limits[1] / limits[0]))))
    axis.hist(measured, bins=np.geomspace(limits[0], limits[1], bins).tolist(), color=_BARS, edgecolor="white", lw=0.4)
    axis.set_xscale("log")
    axis.set_xlim(*limits)
    ticks = [(at, text) for at, text in _TICKS_MS if limits[0] <= at <= limits[1]]
    axis.set_xticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=7.5)
    axis.minorticks_off()
    axis.tick_params(axis="y", labelsize=7.5)
    axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.set_xlabel(f"{_AXIS[finding.measured_from]} (log scale)", fontsize=8)
    axis.set_ylabel("operations", fontsize=8)
    axis.set_title(_name(finding), fontsize=9, fontweight="bold", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(top=axis.get_ylim()[1] * 1.32)
    for place, today_ms in enumerate(finding.today_ms):
        axis.axvline(today_ms, color=_TODAY, lw=1.4, ls=(0, (4, 2)))
        _label(axis, today_ms, f"today {written(today_ms)}", _TODAY, height=0.99 - 0.2 * (place % 4))
    if finding.proposed_ms is not None:
        axis.axvline(finding.proposed_ms, color=_PROPOSED, lw=1.8)
        beyond = finding.proposed_ms >= max(finding.today_ms)
        _label(
            axis, finding.proposed_ms, f"proposed {written(finding.proposed_ms)}", _PROPOSED, height=0.89, right=beyond
        )
    if finding.bound_ms is not None:
        axis.axvline(max(1, finding.bound_ms), color=_PROPOSED, lw=1.1, ls=":")


def _label(axis: Axes, at_ms: int, text: str, colour: str, *, height: float, right: bool = False) -> None:
    """Say what a line is, to its left where there is no reason for the other side."""
    axis.annotate(
        text,
        xy=(at_ms, height),
        xycoords=axis.get_xaxis_transform(),
        xytext=(3 if right else -3, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="top",
        fontsize=7.5,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 0.8},
    )


def _name(finding: OperationStatistics) -> str:
    name = finding.operation.replace("_", " ")
    if not finding.all_phases:
        name += f" ({finding.phases[0]} …)" if len(finding.phases) > 1 else f" ({finding.phases[0]})"
    few = "" if finding.bound_ms is not None else ", too few to propose"
    return f"{name}: {finding.healthy} healthy{few}, median {shown(finding.median_ms or 0)}"


def _title(suggestion: Suggestion) -> str:
    aim = suggestion.aim
    return (
        f"{suggestion.policy}: recorded silences and thresholds\n"
        f"{aim.percentile:g}th percentile, bounded with {aim.confidence:g} % confidence, times {aim.factor:g}"
    )


def _legend(figure: Any, columns: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Patch(color=_BARS, label="healthy operations"),
            Line2D([], [], color=_TODAY, lw=1.4, ls=(0, (4, 2)), label="today's threshold"),
            Line2D([], [], color=_PROPOSED, lw=1.1, ls=":", label="bound on the percentile"),
            Line2D([], [], color=_PROPOSED, lw=1.8, label="proposed threshold"),
        ],
        loc="outside lower center",
        # All in one line are wider than one panel.
        ncols=2 if columns == 1 else 4,
        fontsize=8,
        frameon=False,
    )
