"""Compact descriptions of sets of combinations, as products of operations, vm_states and task_states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import msgspec

from interlock.core.operations import TASK_OPERATION, Operation
from interlock.core.states import NO_TASK, VmState
from interlock.policies.rendering.tables import TASKS, Variant


class Combination(NamedTuple):
    """One combination."""

    operation: str
    """`Variant.word`: an operation, or for example `reboot_hard`."""
    vm_state: str
    task_state: str


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """Every combination of some operations, vm_states and task_states."""

    operations: tuple[str, ...]
    vm_states: tuple[str, ...]
    task_states: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.operations) * len(self.vm_states) * len(self.task_states)


def cover(places: Iterable[Combination]) -> tuple[Product, ...]:
    """Partition the combinations into few products (greedy)."""
    wanted = list(places)
    best = min((_products(wanted, order) for order in permutations(range(3))), key=len)
    return tuple(sorted((_in_order(sets) for sets in best), key=lambda one: -one.size))


def _products(places: list[Combination], order: tuple[int, ...]) -> list[tuple[frozenset[str], ...]]:
    """Gather the values of one axis, then those of the next that have the same ones, then those of the last."""
    rest = [tuple(place[axis] for axis in order) for place in places]
    # (second, third) -> values of the first axis; then (third, those) -> second; then those -> third.
    by_first = _gather(((place[1], place[2]), place[0]) for place in rest)
    by_second = _gather(((pair[1], firsts), pair[0]) for pair, firsts in by_first.items())
    by_third = _gather(((firsts, seconds_), third) for (third, firsts), seconds_ in by_second.items())
    found = []
    for (firsts, seconds_), thirds in by_third.items():
        sets = dict(zip(order, (firsts, seconds_, thirds), strict=True))
        found.append(tuple(sets[axis] for axis in range(3)))
    return found


def _gather(pairs: Iterable[tuple[Any, str]]) -> dict[Any, frozenset[str]]:
    values: dict[Any, set[str]] = {}
    for key, value in pairs:
        values.setdefault(key, set()).add(value)
    return {key: frozenset(members) for key, members in values.items()}


def _in_order(sets: tuple[frozenset[str], ...]) -> Product:
    operations, vm_states, task_states = sets
    return Product(
        operations=tuple(word for word in _WORDS if word in operations),
        vm_states=tuple(state.value for state in VmState if state.value in vm_states),
        task_states=tuple(task for task in TASKS if task in task_states),
    )


_WORDS = tuple(Variant(operation, hard).word for operation in Operation for hard in (False, True))


def product_text(one: Product, asked: Iterable[str] = _WORDS) -> str:
    """A product as people say it: `stop, reboot | in active, paused | while @reboot`.

    `asked` are the operations that were compared.
    """
    operations = _some(one.operations, asked, "every operation")
    deleted = VmState.DELETED.value
    states = [state.value for state in VmState if state is not VmState.DELETED or deleted in one.vm_states]
    return f"{operations} | in {_some(one.vm_states, states, 'any state')} | {_while(one.task_states)}"


def _some(there: Sequence[str], every: Iterable[str], whole: str) -> str:
    """List the words, or those left out if that is shorter."""
    missing = [word for word in every if word not in there]
    if not missing:
        return whole
    return f"{whole} but {', '.join(missing)}" if len(missing) * 2 < len(there) else ", ".join(there)


def _while(task_states: Sequence[str]) -> str:
    tasks = [task for task in task_states if task != NO_TASK]
    if not tasks:
        return "with no task"
    text = f"while {_some(_groups(tasks), _groups(TASKS[1:]), 'any operation is in progress')}"
    return text if len(tasks) == len(task_states) else f"{text}, or with no task"


def _groups(tasks: Sequence[str]) -> list[str]:
    """Task states, those of an operation of which all are there by its name."""
    found: dict[str, None] = {}
    for task in tasks:
        operation = TASK_OPERATION[task]
        whole = all(phase in tasks for phase in TASKS[1:] if TASK_OPERATION[phase] is operation)
        found[f"@{operation.value}" if whole else task] = None
    return list(found)
