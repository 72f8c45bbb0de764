"""Replay recorded history under another policy: judge every submission again, and count the differences.

Consequences of another answer are not replayed: every submission meets the state that was recorded. One that was held
and admitted later is judged at both times. Whether a denied one would have been held is unknown, unless it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar, cast

import msgspec

from interlock.core.policy import CompiledPolicy
from interlock.core.time_windows import Calendar
from interlock.core.views import View
from interlock.policies.history.recorded_submissions import Foreseen, Met, RecordedAnswer, Untold, judge_again
from interlock.policies.time_windows import calendar

_KeyT = TypeVar("_KeyT")

RecordedRow = tuple[int, int, str, str, int, str]
"""A recorded submission: sequence number, instance number, project, event kind, time in ms, and data as JSON."""

DISPOSITIONS: Final = {
    "request.admitted": "admitted",
    "request.redundant": "redundant",
    "request.denied": "denied",
    "request.held": "held",
}
"""The events of submissions, and the disposition of each."""

_DAY_MS: Final = 86_400_000
_REMEMBERED_MAX: Final = 200_000
"""The size of the cache of answers to distinct submissions."""


class Totals(msgspec.Struct):
    """Counts of submissions by the difference of their answers."""

    submissions: int = 0
    same: int = 0
    """The same disposition, for the same reason."""
    other_reason: int = 0
    """The same disposition, for another reason."""
    admitted: int = 0
    """Admitted, which it was not."""
    refused: int = 0
    """Refused, which it was not."""
    redundant: int = 0
    """Redundant, which it was not."""
    cannot_be_told: int = 0


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """The first of several submissions with the same answer."""

    sequence: int
    instance: str
    project: str
    at_ms: int


class ReplayDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Submissions of one operation that one rule decided then, and another would now."""

    operation: str
    effect: str
    """`admitted`, `refused`, `redundant` or `other_reason`, as in `Totals`."""
    recorded: RecordedAnswer
    candidate: RecordedAnswer
    submissions: int
    projects: dict[str, int]
    """How many of each project, the most first."""
    example: Example


class Stamp(msgspec.Struct, frozen=True, gc=False):
    """A policy as recorded in a decision."""

    name: str = ""
    digest: str = ""


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """How many submissions a policy had decided."""

    name: str
    digest: str
    submissions: int


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a replay."""

    policy: str
    digest: str
    """As recorded in decisions."""
    decided_by: tuple[Decided, ...]
    """The policies that had decided, the most used first; with an empty name where it was not recorded."""
    first_at_ms: int | None
    last_at_ms: int | None
    totals: Totals
    untold: dict[str, int]
    """The number of submissions whose new answer is unknown, by reason (see `Untold`)."""
    unreadable: int
    """Events that cannot be parsed as submissions. Not part of the totals."""
    operations: dict[str, Totals]
    projects: dict[str, Totals]
    differences: tuple[ReplayDifference, ...]
    """The most submissions first."""


def replay(rows: Iterable[RecordedRow], policy: CompiledPolicy, instance_of: Callable[[int], str] = str) -> Replay:
    """Judge recorded submissions by `policy`. `instance_of` maps an instance's number to its id.

    Streams: no row is kept.
    """
    replaying = _Replaying(policy)
    for row in rows:
        replaying.add(row)
    return replaying.result(instance_of)


if TYPE_CHECKING:
    RecordedView = View
else:
    RecordedView = msgspec.defstruct(
        "RecordedView", [("launched", bool | None, None)], bases=(View,), frozen=True, kw_only=True, gc=False
    )
    """A view as recorded: `launched` is None in events of older versions."""


class _Facts(msgspec.Struct, gc=False):
    rule: str
    view: RecordedView
    reason: str | None = None
    foreseen: Foreseen | None = None
    waiting: int | None = None
    unchanged: bool | None = None
    policy: Stamp = Stamp()


_decode: Final = msgspec.json.Decoder(_Facts).decode


class _Tally:
    """Submissions with the same recorded and the same new answer."""

    __slots__ = ("answer", "example", "operation", "projects", "recorded")

    def __init__(
        self, operation: str, recorded: RecordedAnswer, answer: RecordedAnswer | Untold, row: RecordedRow
    ) -> None:
        self.operation = operation
        self.recorded = recorded
        self.answer = answer
        self.example = row
        self.projects: dict[str, int] = {}

    @property
    def effect(self) -> str:
        """The field of `Totals` in which these are counted."""
        if isinstance(self.answer, Untold):
            return "cannot_be_told"
        if self.answer.disposition != self.recorded.disposition:
            return "refused" if self.answer.disposition == "denied" else self.answer.disposition
        return "same" if self.answer.reason == self.recorded.reason else "other_reason"


class _Replaying:
    """One pass over a history. Equal submissions are judged once."""

    def __init__(self, policy: CompiledPolicy) -> None:
        self._policy = policy
        self._class_of = policy.class_of
        self._outstanding_max = policy.outstanding_max
        self._known: dict[tuple[object, ...], _Tally] = {}
        self._tallies: dict[tuple[str, RecordedAnswer, RecordedAnswer | Untold], _Tally] = {}
        self._decided_by: dict[Stamp, int] = {}
        self._unreadable = 0
        self._day: int | None = None
        self._calendar = Calendar({})
        """The policy's time windows around that day."""
        self._first_at_ms: int | None = None
        self._last_at_ms: int | None = None

    def add(self, row: RecordedRow) -> None:
        _sequence, _number, project, kind, at_ms, data = row
        try:
            facts = _decode(data)
        except msgspec.DecodeError:
            self._unreadable += 1
            return
        view, there = self._timed(facts.view, at_ms), facts.foreseen
        key = (
            kind,
            facts.rule,
            facts.reason,
            view.outstanding,
            view.launched,
            self._class_of(view),
            None if facts.waiting is None else facts.waiting < self._outstanding_max,
            there,
            facts.unchanged,
        )
        tally = self._known.get(key)
        if tally is None:
            disposition = DISPOSITIONS[kind]
            recorded = RecordedAnswer(disposition, facts.rule, None if disposition == "admitted" else facts.reason)
            launched = cast("bool | None", view.launched)
            known = msgspec.structs.replace(view, launched=launched is not False)
            met = Met(known, recorded, there, facts.waiting, launched is not None, facts.unchanged)
            tally = self._judge(key, row, met)
        tally.projects[project] = tally.projects.get(project, 0) + 1
        stamp = facts.policy
        self._decided_by[stamp] = self._decided_by.get(stamp, 0) + 1
        if self._first_at_ms is None:
            self._first_at_ms = at_ms
        self._last_at_ms = at_ms

    def _timed(self, view: RecordedView, at_ms: int) -> RecordedView:
        """Return the view with those time windows of the policy that were open then."""
        if not self._policy.windows:
            return view
        day = at_ms // _DAY_MS
        if day != self._day:
            self._day, self._calendar = day, calendar(self._policy.windows, at_ms, 0)
        return msgspec.structs.replace(view, windows=self._calendar.open_at(at_ms))

    def _judge(self, key: tuple[object, ...], row: RecordedRow, met: Met) -> _Tally:
        answer = judge_again(met, self._policy)
        operation = met.view.operation.value
        group = (operation, met.recorded, answer)
        tally = self._tallies.get(group)
        if tally is None:
            tally = self._tallies[group] = _Tally(operation, met.recorded, answer, row)
        if len(self._known) >= _REMEMBERED_MAX:
            self._known.clear()
        self._known[key] = tally
        return tally

    def result(self, instance_of: Callable[[int], str]) -> Replay:
        totals, operations, projects = Totals(), dict[str, Totals](), dict[str, Totals]()
        untold: dict[str, int] = {}
        for tally in self._tallies.values():
            for project, count in tally.projects.items():
                for each in (
                    totals,
                    operations.setdefault(tally.operation, Totals()),
                    projects.setdefault(project, Totals()),
                ):
                    each.submissions += count
                    setattr(each, tally.effect, getattr(each, tally.effect) + count)
            if isinstance(tally.answer, Untold):
                untold[tally.answer.value] = untold.get(tally.answer.value, 0) + sum(tally.projects.values())
        return Replay(
            policy=self._policy.policy.name,
            digest=self._policy.stamp["digest"],
            decided_by=tuple(
                Decided(name=stamp.name, digest=stamp.digest, submissions=count)
                for stamp, count in _most_first(self._decided_by)
            ),
            first_at_ms=self._first_at_ms,
            last_at_ms=self._last_at_ms,
            totals=totals,
            untold=untold,
            unreadable=self._unreadable,
            operations=dict(sorted(operations.items())),
            projects=dict(sorted(projects.items())),
            differences=self._differences(instance_of),
        )

    def _differences(self, instance_of: Callable[[int], str]) -> tuple[ReplayDifference, ...]:
        found = []
        for tally in self._tallies.values():
            if isinstance(tally.answer, Untold) or tally.effect == "same":
                continue
            sequence, number, project, _kind, at_ms, _data = tally.example
            found.append(
                ReplayDifference(
                    operation=tally.operation,
                    effect=tally.effect,
                    recorded=tally.recorded,
                    candidate=tally.answer,
                    submissions=sum(tally.projects.values()),
                    projects=dict(_most_first(tally.projects)),
                    example=Example(sequence=sequence, instance=instance_of(number), project=project, at_ms=at_ms),
                )
            )
        return tuple(sorted(found, key=lambda one: (-one.submissions, one.operation, one.example.sequence)))


def _most_first(counts: dict[_KeyT, int]) -> Sequence[tuple[_KeyT, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])
