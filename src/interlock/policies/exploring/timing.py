"""When the steps of a packed story happen: moments that are far enough apart, and close enough, for every age in it.

A word says between which bounds an age is. From the least times that all of these allow, a story becomes one that a
clock can tell; if there are none, the ages of the story do not go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from interlock.policies.exploring.model import Model
from interlock.policies.exploring.steps import Action

AGEING: Final = frozenset({Action.SILENT, Action.RUNNING, Action.PART_SILENT, Action.PART_RUNNING, Action.IDLE})
"""The steps in which nothing happens but that time passes."""
_IDLE_AGAIN: Final = frozenset(Action) - AGEING - {Action.DEADLINE, Action.SUBMIT, Action.CANCEL, Action.CANCEL_PART}
_TASK_AGAIN: Final = frozenset({Action.TAKE, Action.LIFE, Action.PHASE, Action.ADOPT})
_PART_AGAIN: Final = frozenset({Action.TAKE_PART, Action.PART_LIFE, Action.ADOPT})


class Stage(NamedTuple):
    """One step of a story, and the word to which it led."""

    action: int
    word: int


class Gap(NamedTuple):
    """One moment is at least so many milliseconds after another (which may be later, if the number is negative)."""

    later: int
    earlier: int
    least_ms: int


class _Clock(NamedTuple):
    """When an age began, and the moments that bound its classes."""

    since: int
    bounds: tuple[int, ...]
    number: int
    """Its class."""


def tellings(model: Model, stages: list[Stage]) -> Iterator[list[Stage]]:
    """The same story, and then with signs of life that change no word, so that ages may begin anew.

    A walk does not follow what leads back to where it is, so that one age may be in its next class in a story, and
    another that began with it is not. Then something lived in between.
    """
    yield stages
    for every in (False, True):
        told: list[Stage] = []
        for stage in stages:
            if stage.action in AGEING and (every or told[-1].action not in AGEING):
                told += [Stage(action, told[-1].word) for action in _unseen(model, told[-1].word)]
            told.append(stage)
        yield told


def _unseen(model: Model, word: int) -> Iterator[Action]:
    layout = model.layout
    if layout.idle.one(word):
        return
    if layout.task.one(word) and not layout.silent.one(word):
        yield Action.LIFE
    if layout.part.one(word) and not layout.part_silent.one(word):
        yield Action.PART_LIFE
    yield Action.GUEST_RESET


def moments(model: Model, stages: list[Stage], grace_ms: Callable[[int], int | None]) -> list[int] | None:
    """When each step happens, in milliseconds after the first; None if there are no such moments.

    `grace_ms` tells of the number of a step how long it gives what is served to stop, if it does.
    """
    gaps = list(_gaps(model, stages, grace_ms))
    times = [0] * len(stages)
    for _ in range(len(stages) + 1):
        changed = False
        for gap in gaps:
            if times[gap.later] < times[gap.earlier] + gap.least_ms:
                times[gap.later] = times[gap.earlier] + gap.least_ms
                changed = True
        if not changed:
            return times
    return None


def _gaps(model: Model, stages: list[Stage], grace_ms: Callable[[int], int | None]) -> Iterator[Gap]:
    since: dict[str, int] = dict.fromkeys(("idle", "silent", "running", "part_silent", "part_running"), 0)
    deadline: tuple[int, int] | None = None
    for at in range(1, len(stages)):
        action, word = stages[at]
        before = stages[at - 1].word
        yield Gap(at, at - 1, 0)
        ageing = action in AGEING
        if deadline is not None and _asked_to_stop(model, before):
            begun, grace = deadline
            if action == Action.DEADLINE:
                yield Gap(at, begun, grace)
            else:
                yield Gap(begun, at, -max(0, grace - 1))
        # Several ages may change at once: what they are between those steps is nothing that ever was.
        if not ageing or at + 1 == len(stages) or stages[at + 1].action not in AGEING:
            for clock in _clocks(model, word if ageing else before, since):
                yield from _between(at, clock)
        _begin_again(action, at, since)
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
    if layout.part.one(word):
        ages = alphabet.part_ages
        yield _Clock(since["part_silent"], ages.silent, layout.part_silent.one(word))
        yield _Clock(since["part_running"], ages.running, layout.part_running.one(word))


def _asked_to_stop(model: Model, word: int) -> bool:
    return bool(word & (model.layout.deadline.mask | model.layout.part_deadline.mask))


def _begin_again(action: int, at: int, since: dict[str, int]) -> None:
    if action in _IDLE_AGAIN:
        since["idle"] = at
    if action in _TASK_AGAIN:
        since["silent"] = at
    if action in _PART_AGAIN:
        since["part_silent"] = at
    if action == Action.TAKE:
        since["running"] = at
    if action == Action.TAKE_PART:
        since["part_running"] = at
