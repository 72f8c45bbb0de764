"""Lint: rules whose time windows never hold, or always."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from interlock.core.conditions import CONDITION
from interlock.core.policy import windows_in
from interlock.core.time_windows import Calendar
from interlock.policies.lint.finding_kinds import finding
from interlock.policies.lint.findings import Finding, Written
from interlock.policies.time_windows import HORIZON, calendar

_FROM_MS: Final = 1_767_571_200_000
"""A Monday; for a weekly window any serves, apart from the weeks in which clocks change."""


def window_findings(rules: tuple[Written, ...], own_file: str) -> Iterator[Finding]:
    """Yield a finding for each rule of the file whose time windows never hold, or always."""
    for one in rules:
        within = one.rule.within
        if within is None or one.file != own_file:
            continue
        holds = CONDITION["windows"].kind.test(within)
        intervals = calendar(windows_in([one.rule]), _FROM_MS, 0)
        seen = {bool(holds(intervals.open_at(at_ms))) for at_ms in _moments(intervals)}
        if seen == {True}:
            message = f"The time windows of {one.id!r} always hold: they leave no gap in the week."
            yield finding("windows-always", one, message)
        elif seen == {False}:
            message = f"The time windows of {one.id!r} never hold: those with `!` cover the others."
            yield finding("windows-never", one, message)


def _moments(intervals: Calendar) -> list[int]:
    """Return a moment of each part of some weeks in which the same windows are open."""
    bounds = {bound for spans in intervals.intervals.values() for span in spans for bound in span}
    inside = range(_FROM_MS, _FROM_MS + round(HORIZON.total_seconds() * 1000))
    return sorted({_FROM_MS, *(bound for bound in bounds if bound in inside)})
