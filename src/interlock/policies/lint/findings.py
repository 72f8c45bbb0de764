"""Findings of the policy lints: the record, and the wording of rules and states in messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import cache
from typing import Final, TypeVar

import msgspec

from interlock.core.operations import TASK_OPERATION, TASK_STATES, Operation
from interlock.core.policy import Rule
from interlock.core.states import NO_TASK, VmState
from interlock.policies.language.vocabulary import phases_of
from interlock.policies.lint.condition_sets import TASKS
from interlock.policies.lint.reachability import can_be_together

_Item = TypeVar("_Item")
_PLACE: Final = re.compile(r"(.*?):\d+(?::\d+)?", re.DOTALL)
_SHOWN_MAX: Final = 4
"""How many items a sentence lists before it counts the rest."""


class Severity(StrEnum):
    """How much a finding matters."""

    ERROR = "error"
    """The policy does not do what it says, or an instance can get stuck."""
    WARNING = "warning"
    """The policy may not do what its author meant."""
    NOTE = "note"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One result of a lint."""

    severity: Severity
    code: str
    """The kind of finding; stable."""
    rule: str | None
    """The id of the rule as written; None for the policy as a whole."""
    place: str
    """`file:line`, or `file:line:column`."""
    message: str
    remedy: str | None = None
    detail: bool = False
    """Whether it is shown only with all details."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """One `[[rule]]` as written, with the rules that it expands to."""

    id: str
    rule: Rule
    """The first of them."""
    numbers: tuple[int, ...]
    """Their indexes in the policy."""

    @property
    def file(self) -> str:
        return file_of(self.rule)


def written(rules: Sequence[Rule]) -> tuple[Written, ...]:
    """Return the rules of a policy as written: those expanded from one are grouped."""
    together: dict[tuple[str, str], list[int]] = {}
    for number, rule in enumerate(rules):
        together.setdefault((rule.source, rule.family), []).append(number)
    return tuple(
        Written(id=base if len(numbers) > 1 else rules[numbers[0]].id, rule=rules[numbers[0]], numbers=tuple(numbers))
        for (_, base), numbers in together.items()
    )


def file_of(rule: Rule) -> str:
    """Return the file of a rule."""
    return file_of_place(rule.source)


@cache
def file_of_place(place: str) -> str:
    """Return the file of a `file:line` or `file:line:column`."""
    found = _PLACE.fullmatch(place)
    return found.group(1) if found else place


def some(items: Iterable[_Item], most: int = _SHOWN_MAX, word: Callable[[_Item], str] = str) -> str:
    """Join the words of a list for a sentence; a long one is cut, with the number of the rest."""
    listed = list(items)
    if len(listed) <= most:
        return ", ".join(map(word, listed))
    return f"{', '.join(map(word, listed[: most - 1]))} and {len(listed) - most + 1} more"


def operations_text(operations: Iterable[Operation]) -> str:
    wanted = set(operations)
    return some(operation.value for operation in Operation if operation in wanted)


def states_text(cells: Iterable[tuple[VmState, str]]) -> str:
    """Format pairs of vm_state and task_state: `stopped, error`; `active while @reboot`."""
    tasks_of: dict[VmState, set[str]] = {}
    for vm_state, task in cells:
        tasks_of.setdefault(vm_state, set()).add(task)
    alike: dict[frozenset[str], list[VmState]] = {}
    for vm_state in VmState:
        if vm_state in tasks_of:
            alike.setdefault(frozenset(tasks_of[vm_state]), []).append(vm_state)
    parts = []
    for tasks, states in alike.items():
        named = some((state.value for state in states), len(VmState))
        if tasks == {NO_TASK}:
            parts.append(named)
        elif all(task in tasks for state in states for task in TASKS if can_be_together(state, task)):
            parts.append(f"{named}, during any task")
        else:
            parts.append(f"{named} while {tasks_text(tasks)}")
    return "; ".join(parts[:_SHOWN_MAX]) + (f"; and {len(parts) - _SHOWN_MAX} more" if len(parts) > _SHOWN_MAX else "")


def tasks_text(tasks: frozenset[str]) -> str:
    """Format task states: `@reboot` for all phases of an operation."""
    if tasks >= set(TASK_STATES):
        return "any task is in progress"
    words = ["nothing"] if NO_TASK in tasks else []
    for operation in dict.fromkeys(TASK_OPERATION.values()):
        phases = phases_of(operation)
        if phases and phases <= tasks:
            words.append(f"@{operation.value}")
        else:
            words.extend(phase for phase in TASK_STATES if phase in phases and phase in tasks)
    return some(words)
