"""Counterexamples: the shortest path to a packed state, as rehearsal events that were replayed on the core.

The times of its steps are the earliest that solve the difference constraints from its age classes. If these have no
solution, the path is an artefact of the age classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from interlock.core.errors import BrokenInvariant
from interlock.core.operations import Lane
from interlock.core.policy import Verdict
from interlock.core.records import SERVED, Instance, Request
from interlock.core.request_queue import in_service_order
from interlock.core.roles import Role
from interlock.policies.model_checker.actions import SubmissionKind
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.search import Visited
from interlock.policies.model_checker.steps import Action
from interlock.policies.rehearsal.events import read_line
from interlock.policies.rehearsal.runner import Rehearsal

_encode = msgspec.json.Encoder().encode
_OUTCOMES: Final = {Action.SUCCEED: "succeeded", Action.FAIL: "failed", Action.INTERRUPT: "interrupted"}
_SAME: Final[dict[Action, dict[str, Any]]] = {
    Action.GUEST_STOPPED: {"observe": "stopped"},
    Action.GUEST_CRASHED: {"observe": "crashed"},
    Action.GUEST_RESET: {"observe": "reset"},
    Action.HOST_LOST: {"host_reachable": False},
    Action.HOST_BACK: {"host_reachable": True},
    Action.TAKE: {"take": Lane.STATE.value},
    Action.TAKE_COMPONENT: {"take": Lane.COMPONENT.value},
    Action.ADOPT: {"adopt": True},
}
"""The actions whose event is the same in every state."""
_ROLE: Final = "member"
"""The role of a submission that names none."""
_BY_MEMBER: Final = ("role", _ROLE)


class CounterexampleBuilder:
    """Builds counterexamples from the states of one search."""

    def __init__(self, model: Model, visited: Visited) -> None:
        self._model = model
        self._visited = visited

    def build(self, state: int, action: int | None) -> tuple[str, ...] | None:
        """Return the events that lead to a state, and then the action; None if the path has no possible timing.

        Raises:
            BrokenInvariant: the core reaches other states than the search.
        """
        trace = self._trace(state)
        for path in with_signs_of_life(self._model, trace):
            times = self._moments(path)
            if times is not None:
                return self._replayed(*self._without_spare_steps(path, times), action)
        return None

    def _moments(self, trace: list[TraceStep]) -> list[int] | None:
        return moments(self._model, trace, lambda at: self._grace_ms(trace, at))

    def _without_spare_steps(self, trace: list[TraceStep], times: list[int]) -> tuple[list[TraceStep], list[int]]:
        """Drop the signs of life that the path does not need."""
        for at in range(len(trace) - 1, 0, -1):
            if trace[at].word == trace[at - 1].word:
                shorter = trace[:at] + trace[at + 1 :]
                found = self._moments(shorter)
                if found is not None:
                    trace, times = shorter, found
        return trace, times

    def _trace(self, state: int) -> list[TraceStep]:
        trace = []
        while state >= 0:
            trace.append(TraceStep(self._visited.action(state), int(self._visited.words[state])))
            state = self._visited.parent(state)
        return trace[::-1]

    def _grace_ms(self, trace: list[TraceStep], at: int) -> int | None:
        """Return the grace period of a preempting submission, or None for another step."""
        number = trace[at].action - Action.SUBMIT
        if number < 0 or trace[at].action >= Action.HOLD:
            return None
        rule = self._model.gate.rule(trace[at - 1].word, number)
        return rule.grace_ms if rule.verdict is Verdict.PREEMPT else None

    def _replayed(self, trace: list[TraceStep], times: list[int], tried: int | None) -> tuple[str, ...] | None:
        """Replay the path on the core, comparing every state, and return its events."""
        model = self._model
        stage = Rehearsal(model.alphabet.policy)
        lines: list[str] = []

        def play(event: dict[str, Any]) -> dict[str, Any]:
            line = _encode(event).decode()
            lines.append(line)
            return stage.play(*read_line(line))

        start = model.alphabet.bases[model.layout.base.one(trace[0].word)]
        play({"instance": {"vm_state": start.vm_state.value, "role": _ROLE}})
        for at in range(1, len(trace)):
            waited_ms = times[at] - times[at - 1]
            if waited_ms:
                play({"advance": _duration(waited_ms)})
            for event in self._events(trace[at].action, stage.instance):
                play(event)
            if not self._is_reached(trace, at, stage):
                if any(model.layout.held.one(one.word) for one in trace):
                    return None  # A held request was admitted later than the core does.
                raise BrokenInvariant(f"The core reaches another state than the search: {' '.join(lines)}")
        if tried is not None:
            for event in self._events(tried, stage.instance):
                answer = play(event)
                if answer.get("retry_after"):
                    play({"advance": answer["retry_after"]})
                    play(event)
        return tuple(lines)

    def _is_reached(self, trace: list[TraceStep], at: int, stage: Rehearsal) -> bool:
        """Return whether the core is in the state after a step; true if the next step happens together with it."""
        following = trace[at + 1].action if at + 1 < len(trace) else None
        if following == Action.HELD_ADMITTED or (trace[at].action in AGEING and following in AGEING):
            return True
        there = self._model.encoding.pack(stage.instance, stage.now_ms, host_reachable=stage.host_reachable)
        return there == self._without_faults(trace[at].word)

    def _without_faults(self, word: int) -> int:
        return word & ~self._model.layout.faults.mask

    def _events(self, action: int, instance: Instance) -> Iterator[dict[str, Any]]:
        """Yield the rehearsal events of an action; none where only time passes."""
        state, component = instance.served(Lane.STATE), instance.served(Lane.COMPONENT)
        if action >= Action.HOLD:
            yield {**self._submitted(action - Action.HOLD), "hold": "30d"}
        elif action >= Action.SUBMIT:
            yield self._submitted(action - Action.SUBMIT)
        elif action == Action.HOLD_ENDED:
            yield {"cancel": instance.held[0].id}
        elif action >= Action.CANCEL:
            waiting = [one for one in in_service_order(instance) if one.status not in SERVED]
            yield {"cancel": waiting[action - Action.CANCEL].id}
        elif action >= Action.RELABEL:
            tag = self._model.alphabet.tags[action - Action.RELABEL]
            yield {"relabel": sorted({*instance.tags} ^ {tag}), "role": Role.ADMIN.value}
        elif action in _SAME:
            yield _SAME[Action(action)]
        elif action == Action.FINISH_COMPONENT and component is not None:
            yield {"finish": component.operation.value, "outcome": "succeeded"}
        elif action == Action.COMPONENT_LIFE and component is not None:
            yield {"progress": component.id}
        elif state is not None:
            yield from self._reports(action, state)

    def _submitted(self, number: int) -> dict[str, Any]:
        submission = self._model.alphabet.submissions[number]
        parameters = {"parameters": submission.parameters} if submission.parameters else {}
        return {"submit": submission.operation.value, **parameters, **self._caller(submission)}

    def _caller(self, submission: SubmissionKind) -> dict[str, Any]:
        """Return who asks, as far as callers of the operation differ; the role is `_ROLE` if not given."""
        known = self._model.alphabet.callers(submission.operation)
        varies = {field for caller in known for field, value in caller if dict(known[0])[field] != value}
        return {field: value for field, value in submission.caller if field in varies and (field, value) != _BY_MEMBER}

    def _reports(self, action: int, state: Request) -> Iterator[dict[str, Any]]:
        if action == Action.ARRIVE:
            yield {"finish": state.operation.value, "outcome": "succeeded", "arrived": True}
        elif action in _OUTCOMES:
            yield {"finish": state.operation.value, "outcome": _OUTCOMES[Action(action)]}
        elif action == Action.LIFE:
            yield {"progress": state.id}
        elif action == Action.PHASE:
            phases = self._model.alphabet.phases(state.operation, hard=state.hard)
            yield {"progress": state.id, "phase": phases[phases.index(state.phase or "") + 1]}


def _duration(milliseconds: int) -> str:
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


AGEING: Final = frozenset(
    {Action.SILENT, Action.RUNNING, Action.COMPONENT_SILENT, Action.COMPONENT_RUNNING, Action.IDLE}
)
"""The actions in which only time passes."""
_RESETS_IDLE: Final = (
    frozenset(Action)
    - AGEING
    - {Action.DEADLINE, Action.SUBMIT, Action.CANCEL}
    - {Action.HOST_LOST, Action.HOST_BACK, Action.RELABEL}
    - {Action.HOLD, Action.HELD_ADMITTED, Action.HOLD_ENDED}
)
_RESETS_TASK: Final = frozenset({Action.TAKE, Action.LIFE, Action.PHASE, Action.ADOPT})
_RESETS_COMPONENT: Final = frozenset({Action.TAKE_COMPONENT, Action.COMPONENT_LIFE, Action.ADOPT})


class TraceStep(NamedTuple):
    """One step of a path, and the word it led to."""

    action: int
    word: int


class Gap(NamedTuple):
    """A difference constraint: time[later] - time[earlier] ≥ least_ms, which may be negative."""

    later: int
    earlier: int
    least_ms: int


class _Clock(NamedTuple):
    """The start of an age, and the bounds of its classes."""

    since: int
    bounds: tuple[int, ...]
    number: int
    """Its class."""


def with_signs_of_life(model: Model, trace: list[TraceStep]) -> Iterator[list[TraceStep]]:
    """Yield the path as it is, and then with added signs of life that change no word but restart ages.

    The search skips self-loops, so that a path may need one for its ages to be possible.
    """
    yield trace
    for every in (False, True):
        path: list[TraceStep] = []
        for stage in trace:
            if stage.action in AGEING and (every or path[-1].action not in AGEING):
                path += [TraceStep(action, path[-1].word) for action in _unseen(model, path[-1].word)]
            path.append(stage)
        yield path


def _unseen(model: Model, word: int) -> Iterator[Action]:
    layout = model.layout
    if layout.idle.one(word):
        return
    if layout.task.one(word) and not layout.silent.one(word):
        yield Action.LIFE
    if layout.component.one(word) and not layout.component_silent.one(word):
        yield Action.COMPONENT_LIFE
    yield Action.GUEST_RESET


def moments(model: Model, trace: list[TraceStep], grace_ms: Callable[[int], int | None]) -> list[int] | None:
    """Return the time of each step in milliseconds after the first; None if there is no solution.

    `grace_ms` returns the grace period of the step with that index, or None if it interrupts nothing.
    """
    gaps = list(_gaps(model, trace, grace_ms))
    times = [0] * len(trace)
    for _ in range(len(trace) + 1):
        changed = False
        for gap in gaps:
            if times[gap.later] < times[gap.earlier] + gap.least_ms:
                times[gap.later] = times[gap.earlier] + gap.least_ms
                changed = True
        if not changed:
            return times
    return None


def _gaps(model: Model, trace: list[TraceStep], grace_ms: Callable[[int], int | None]) -> Iterator[Gap]:
    since: dict[str, int] = dict.fromkeys(("idle", "silent", "running", "part_silent", "part_running"), 0)
    deadline: tuple[int, int] | None = None
    for at in range(1, len(trace)):
        action, word = trace[at]
        before = trace[at - 1].word
        yield Gap(at, at - 1, 0)
        ageing = action in AGEING
        if deadline is not None and _asked_to_stop(model, before):
            begun, grace = deadline
            if action == Action.DEADLINE:
                yield Gap(at, begun, grace)
            else:
                yield Gap(begun, at, -max(0, grace - 1))
        # Several ages may change at one time: only the word after the last of those steps is constrained.
        if not ageing or at + 1 == len(trace) or trace[at + 1].action not in AGEING:
            for clock in _clocks(model, word if ageing else before, since):
                yield from _between(at, clock)
        _reset_clocks(action, at, since)
        grace_given = grace_ms(at)
        if grace_given is not None and (deadline is None or not _asked_to_stop(model, before)):
            deadline = (at, grace_given)


def _between(at: int, clock: _Clock) -> Iterator[Gap]:
    if clock.number:
        yield Gap(at, clock.since, clock.bounds[clock.number - 1])
    if clock.number < len(clock.bounds):
        yield Gap(clock.since, at, 1 - clock.bounds[clock.number])


def _clocks(model: Model, word: int, since: dict[str, int]) -> Iterator[_Clock]:
    layout, alphabet = model.layout, model.alphabet
    yield _Clock(since["idle"], alphabet.idle_ages, layout.idle.one(word))
    task = layout.task.one(word)
    if task:
        ages = alphabet.task_ages[task - 1]
        yield _Clock(since["silent"], ages.silent, layout.silent.one(word))
        yield _Clock(since["running"], ages.running, layout.running.one(word))
    if layout.component.one(word):
        ages = alphabet.component_ages
        yield _Clock(since["part_silent"], ages.silent, layout.component_silent.one(word))
        yield _Clock(since["part_running"], ages.running, layout.component_running.one(word))


def _asked_to_stop(model: Model, word: int) -> bool:
    return bool(word & (model.layout.deadline.mask | model.layout.component_deadline.mask))


def _reset_clocks(action: int, at: int, since: dict[str, int]) -> None:
    if action in _RESETS_IDLE:
        since["idle"] = at
    if action in _RESETS_TASK:
        since["silent"] = at
    if action in _RESETS_COMPONENT:
        since["part_silent"] = at
    if action == Action.TAKE:
        since["running"] = at
    if action == Action.TAKE_COMPONENT:
        since["part_running"] = at
