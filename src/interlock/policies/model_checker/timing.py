"""Concrete times for the steps of a path: difference constraints from its age classes, solved for the earliest times.

If the constraints have no solution, the path is an artefact of the age classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.steps import Action

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
