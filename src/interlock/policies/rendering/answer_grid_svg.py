"""Answer grids of a policy as SVG: operations by vm_states, or by tasks in service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from interlock.core.operations import CATALOGUE, Lane
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.policies.rendering.tables import LATER, MEANINGS, Answer, Answers, sign, variants

_COLOURS: Final = {
    Verdict.ADMIT: ("#d4efd8", "#12531f"),
    Verdict.PREEMPT: ("#cdeaf4", "#0b4a61"),
    Verdict.REDUNDANT: ("#fbeec3", "#654c02"),
    Verdict.AFTER: ("#e8dcf8", "#4b2284"),
    Verdict.DENY: ("#ffffff", "#9aa3ad"),
}
_ROW, _NAMES, _HEAD, _LEFT, _BOTTOM = 19, 212, 104, 8, 60
"""Pixels: the height of a row, the width of its name, the height of the titles, the margins."""


class Grid(NamedTuple):
    """The content of a grid."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Answer, ...]], ...]


def of_states(policy: CompiledPolicy) -> Grid:
    """What a member is answered in each vm_state, with no task."""
    answers = Answers(policy)
    return Grid(
        f"Policy {policy.policy.name}, with no task",
        tuple(state.value for state in VmState),
        tuple(
            (_name(policy, variant.word), tuple(answers.of(variant, state, NO_TASK)[0] for state in VmState))
            for variant in variants(policy)
        ),
    )


def of_tasks(policy: CompiledPolicy, vm_state: VmState = VmState.ACTIVE) -> Grid:
    """What a member is answered in one vm_state while the first phase of each state change is being served."""
    answers = Answers(policy)
    tasks = {
        phases[0]: ", ".join(policy.policy.names.get(phases[0], (phases[0],)))
        for entry in CATALOGUE.values()
        if entry.lane is Lane.STATE
        for phases in (entry.phases, entry.hard_phases)
        if phases
    }
    return Grid(
        f"Policy {policy.policy.name}, {vm_state.value}, by operation in progress",
        tuple(tasks.values()),
        tuple(
            (_name(policy, variant.word), tuple(answers.of(variant, vm_state, task)[0] for task in tasks))
            for variant in variants(policy)
        ),
    )


def _name(policy: CompiledPolicy, word: str) -> str:
    return ", ".join(policy.policy.names.get(word, (word,)))


def svg_grid(grid: Grid) -> str:
    """The grid as a picture that says on hovering which rule answers."""
    step = 54 if len(grid.columns) < 20 else 38  # noqa: PLR2004 - what still fits the width of a page
    width = max(_LEFT + _NAMES + step * len(grid.columns) + 70, 720)
    height = _HEAD + _ROW * len(grid.rows) + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_style()}</style>",
        '<g font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20" font-size="14" font-weight="bold" fill="#1c2430">{escape(grid.title)}</text>',
        *_titles(grid.columns, step),
        *_rows(grid, step),
        *_legend(height - _BOTTOM + 24),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _titles(columns: Sequence[str], step: int) -> Iterator[str]:
    for number, title in enumerate(columns):
        x = _LEFT + _NAMES + step * number + step // 2
        place = f'transform="translate({x} {_HEAD - 6}) rotate(-40)"'
        yield f'<text {place} fill="#1c2430">{escape(title)}</text>'


def _rows(grid: Grid, step: int) -> Iterator[str]:
    for line, (name, row) in enumerate(grid.rows):
        y = _HEAD + _ROW * line
        place = f'x="{_LEFT + _NAMES - 8}" y="{y + 13}" text-anchor="end"'
        yield f'<text {place} fill="#1c2430">{escape(_cut(name))}</text>'
        for number, answer in enumerate(row):
            x = _LEFT + _NAMES + step * number
            verdict = answer.rule.verdict.value
            hover = f"{name}, {grid.columns[number]}: {verdict}" + (f" ({answer.reason})" if answer.reason else "")
            yield (
                f'<g class="{verdict}"><title>{escape(hover)}; rule {escape(answer.rule.id)}</title>'
                f'<rect x="{x}" y="{y}" width="{step}" height="{_ROW}"/>'
                f'<text x="{x + step // 2}" y="{y + 13}">{sign(answer)}</text></g>'
            )


def _style() -> str:
    verdicts = (
        f".{verdict.value} rect{{fill:{fill};stroke:#e3e7ec}}.{verdict.value} text{{fill:{ink};text-anchor:middle}}"
        for verdict, (fill, ink) in _COLOURS.items()
    )
    return "".join(verdicts)


def _cut(name: str, length: int = 30) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _legend(y: int) -> Iterator[str]:
    x = _LEFT
    signs = [(_COLOURS[verdict], word, meaning) for verdict, (word, meaning) in MEANINGS.items()]
    for number, ((fill, ink), word, meaning) in enumerate((*signs, (("#ffffff", "#1c2430"), *LATER))):
        place = y + 18 * (number // 3)
        yield f'<rect x="{x}" y="{place - 12}" width="34" height="16" fill="{fill}" stroke="#c5ccd4"/>'
        yield f'<text x="{x + 17}" y="{place}" text-anchor="middle" fill="{ink}">{word}</text>'
        yield f'<text x="{x + 40}" y="{place}" fill="#46505c">{escape(_SHORT.get(word, meaning))}</text>'
        x = _LEFT if number % 3 == 2 else x + 240  # noqa: PLR2004 - three in a line


_SHORT: Final = {
    "now": "admitted first",
    "3m": "admitted after such a stall",
}
