"""What another policy would have answered to a whole history: every submission judged again, and what differs counted.

One submission is judged in `recorded_submissions`; reading a database is not here (see `interlock.stores.history`).

What is not replayed: what would have followed from another answer. Every submission meets the state that it really met;
one that was held and admitted later is judged at both moments, as it was then. Whether what is refused would have been
held is not known, unless it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Rule, View
from interlock.core.states import NO_TASK, VmState
from interlock.policies.recorded_submissions import Answer, Foreseen, Met, Untold, judge_again

_KeyT = TypeVar("_KeyT")

RecordedRow = tuple[int, int, str, str, int, str]
"""A recorded submission as a store gives it: its sequence number, the number of its instance, the project, the kind of
the event, its time in ms, and its data as JSON."""

DISPOSITIONS: Final = {
    "request.admitted": "admitted",
    "request.redundant": "redundant",
    "request.denied": "denied",
    "request.held": "held",
}
"""The events that tell a submission, and what each says became of it."""

_REMEMBERED_MAX: Final = 200_000
"""How many different submissions have their answer remembered; a history with more is judged more slowly."""


class Totals(msgspec.Struct):
    """How many submissions would have been answered how."""

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
    """The first of several submissions that were answered alike."""

    sequence: int
    instance: str
    project: str
    at_ms: int


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Submissions of one operation, for which one rule spoke then and another would now."""

    operation: str
    effect: str
    """`admitted`, `refused`, `redundant` or `other_reason`, as in `Totals`."""
    recorded: Answer
    candidate: Answer
    submissions: int
    projects: dict[str, int]
    """How many of each project, the most first."""
    example: Example


class Stamp(msgspec.Struct, frozen=True, gc=False):
    """A policy as a decision tells it."""

    name: str = ""
    digest: str = ""


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """How many submissions a policy had decided."""

    name: str
    digest: str
    submissions: int


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy would have answered to recorded submissions."""

    policy: str
    digest: str
    """As far as decisions tell it."""
    decided_by: tuple[Decided, ...]
    """The policies that had decided, the most used first; empty names for events that do not say so."""
    first_at_ms: int | None
    last_at_ms: int | None
    totals: Totals
    untold: dict[str, int]
    """Why it cannot be told, and of how many (see `Untold`)."""
    unreadable: int
    """Events that tell no submission that is known here. They are not among the totals."""
    operations: dict[str, Totals]
    projects: dict[str, Totals]
    differences: tuple[Difference, ...]
    """The most submissions first."""


def replay(rows: Iterable[RecordedRow], policy: CompiledPolicy, instance_of: Callable[[int], str] = str) -> Replay:
    """Judge recorded submissions by `policy`. `instance_of` gives an instance's id for its number.

    Each row is looked at once and none is kept, so that there may be any number.
    """
    replaying = _Replaying(policy)
    for row in rows:
        replaying.add(row)
    return replaying.result(instance_of)


class _SeenView(msgspec.Struct, gc=False):
    """A view as it was written down. What it holds is made values of the core only where it is judged."""

    operation: str
    vm_state: str
    task_state: str = NO_TASK
    outstanding: int = 0
    role: str = "member"
    locked: bool = False
    blocked: bool = False
    tags: tuple[str, ...] = ()
    host_reachable: bool = True
    hard: bool = False
    silent_ms: int = 0
    running_ms: int = 0
    launched: bool | None = None
    held: int = 0


class _SeenForeseen(msgspec.Struct, gc=False):
    vm_state: str
    launched: bool = True


class _Facts(msgspec.Struct, gc=False):
    rule: str
    view: _SeenView
    reason: str | None = None
    foreseen: _SeenForeseen | None = None
    waiting: int | None = None
    policy: Stamp = Stamp()


_decode: Final = msgspec.json.Decoder(_Facts).decode


class _Tally:
    """Submissions that were answered alike, and would be."""

    __slots__ = ("answer", "example", "operation", "projects", "recorded")

    def __init__(self, operation: str, recorded: Answer, answer: Answer | Untold, row: RecordedRow) -> None:
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
    """One pass over a history. What is told of a submission is judged once for all that met the same."""

    def __init__(self, policy: CompiledPolicy) -> None:
        self._policy = policy
        self._tags = frozenset(tag for rule in policy.rules for tag in rule.tags or ())
        self._silent_ms, self._running_ms = _moments(policy.rules)
        self._known: dict[tuple[object, ...], _Tally] = {}
        self._tallies: dict[tuple[str, Answer, Answer | Untold], _Tally] = {}
        self._decided_by: dict[Stamp, int] = {}
        self._unreadable = 0
        self._first_at_ms: int | None = None
        self._last_at_ms: int | None = None

    def add(self, row: RecordedRow) -> None:
        _sequence, _number, project, kind, at_ms, data = row
        try:
            facts = _decode(data)
        except msgspec.DecodeError:
            self._unreadable += 1
            return
        view, there = facts.view, facts.foreseen
        key = (
            kind,
            facts.rule,
            facts.reason,
            view.operation,
            view.vm_state,
            view.task_state,
            view.outstanding,
            view.role,
            (view.locked, view.blocked, view.host_reachable, view.hard, view.launched),
            view.held,
            self._tags.intersection(view.tags) if view.tags else None,
            bisect_right(self._silent_ms, view.silent_ms),
            bisect_right(self._running_ms, view.running_ms),
            None if facts.waiting is None else facts.waiting < self._policy.outstanding_max,
            None if there is None else (there.vm_state, there.launched),
        )
        tally = self._known.get(key)
        if tally is None:
            tally = self._judge(key, row, facts)
            if tally is None:
                self._unreadable += 1
                return
        tally.projects[project] = tally.projects.get(project, 0) + 1
        stamp = facts.policy
        self._decided_by[stamp] = self._decided_by.get(stamp, 0) + 1
        if self._first_at_ms is None:
            self._first_at_ms = at_ms
        self._last_at_ms = at_ms

    def _judge(self, key: tuple[object, ...], row: RecordedRow, facts: _Facts) -> _Tally | None:
        try:
            met = _met(row[3], facts)
        except (ValueError, KeyError):
            return None
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

    def _differences(self, instance_of: Callable[[int], str]) -> tuple[Difference, ...]:
        found = []
        for tally in self._tallies.values():
            if isinstance(tally.answer, Untold) or tally.effect == "same":
                continue
            sequence, number, project, _kind, at_ms, _data = tally.example
            found.append(
                Difference(
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


def _moments(rules: Iterable[Rule]) -> tuple[list[int], list[int]]:
    """The ages at which a decision may come out otherwise, in ms: of silence, and since it was taken."""
    silent, running = set[int](), set[int]()
    for rule in rules:
        if rule.silent_ms_min is not None:
            silent.add(rule.silent_ms_min)
        if rule.threshold_ms is not None:
            (silent if rule.measured_from is MeasuredFrom.LAST_PROGRESS else running).add(rule.threshold_ms)
    return sorted(silent), sorted(running)


def _met(kind: str, facts: _Facts) -> Met:
    """What was written down, as values of the core. Raises `ValueError` or `KeyError` for what is not known here."""
    seen = facts.view
    disposition = DISPOSITIONS[kind]
    view = View(
        Operation(seen.operation),
        VmState(seen.vm_state),
        seen.task_state,
        seen.outstanding,
        seen.role,
        seen.locked,
        seen.blocked,
        seen.tags,
        seen.host_reachable,
        seen.hard,
        seen.silent_ms,
        seen.running_ms,
        seen.launched is not False,
        seen.held,
    )
    return Met(
        view=view,
        recorded=Answer(disposition, facts.rule, None if disposition == "admitted" else facts.reason),
        foreseen=None
        if facts.foreseen is None
        else Foreseen(VmState(facts.foreseen.vm_state), facts.foreseen.launched),
        waiting=facts.waiting,
        launched_recorded=seen.launched is not None,
    )
