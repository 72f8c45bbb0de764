"""The matrix of a policy in the form that people read: operations down, vm_states across, one section a kind of task.

Task states between which no answer differs share a section, so that what is shown is what the policy tells apart.
The rows that programs read are in `tables`; how a matrix looks is with whoever shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from interlock.core.operations import TASK_OPERATION
from interlock.core.policy import CompiledPolicy, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.policies.tables import (
    EVERYTHING,
    PLAIN,
    TASKS,
    Answer,
    Answers,
    Circumstances,
    Selection,
    Variant,
    variants,
)

MEANINGS: Final = {
    Verdict.ADMIT: ("yes", "admitted, and served in turn"),
    Verdict.PREEMPT: ("now", "admitted before all else: what is in flight is asked to stop"),
    Verdict.AFTER: ("3m", "admitted once what is in flight has been silent for so long"),
    Verdict.REDUNDANT: ("same", "holds already, or is on its way"),
    Verdict.DENY: ("·", "refused"),
}
"""How each verdict is shown in a matrix, and what that means."""
LATER: Final = ("*", "answered otherwise after some silence")
_UNITS_MS: Final = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000))


class Line(NamedTuple):
    """The answers to one operation, in the order of the matrix's vm_states."""

    variant: Variant
    names: tuple[str, ...]
    answers: tuple[Answer, ...]


class Section(NamedTuple):
    """What is answered while any of some task states holds; all of them are answered alike."""

    task_states: tuple[str, ...]
    lines: tuple[Line, ...]


class Matrix(NamedTuple):
    """What is answered for instances that were all launched, or all never."""

    vm_states: tuple[VmState, ...]
    sections: tuple[Section, ...]


def matrix(
    policy: CompiledPolicy,
    circumstances: Circumstances = PLAIN,
    selection: Selection = EVERYTHING,
    *,
    launched: bool = True,
    alike: Callable[[Answer], object] | None = None,
) -> Matrix:
    """The selected part of a policy's matrix, the sections in the order of their first task states.

    Task states share a section if what `alike` makes of their answers is equal: all that a client can tell apart,
    unless said otherwise.
    """
    of = alike or mark
    answers = Answers(policy, circumstances)
    vm_states = tuple(state for state in VmState if selection.vm_states is None or state in selection.vm_states)
    asked = [each for each in variants(policy) if selection.variants is None or each in selection.variants]
    grouped: dict[tuple[object, ...], tuple[list[str], tuple[Line, ...]]] = {}
    for task in TASKS:
        if selection.task_states is not None and task not in selection.task_states:
            continue
        lines = tuple(
            Line(
                variant,
                policy.policy.names.get(variant.word, (variant.word,)),
                tuple(answers.of(variant, state, task)[not launched] for state in vm_states),
            )
            for variant in asked
        )
        key = (task == NO_TASK, *(of(answer) for line in lines for answer in line.answers))
        grouped.setdefault(key, ([], lines))[0].append(task)
    return Matrix(vm_states, tuple(Section(tuple(tasks), lines) for tasks, lines in grouped.values()))


def mark(answer: Answer) -> tuple[object, ...]:
    """All of an answer that a client can tell from another."""
    return answer.rule.verdict, answer.threshold_ms, answer.reason, answer.later_ms


def differing(one: Matrix, other: Matrix) -> int:
    """In how many combinations two matrices of the same selection answer otherwise."""
    return sum(
        mark(mine) != mark(yours)
        for _, lines, others in zip_tasks(one, other)
        for line, against in zip(lines, others, strict=True)
        for mine, yours in zip(line.answers, against.answers, strict=True)
    )


def zip_tasks(one: Matrix, other: Matrix) -> list[tuple[str, tuple[Line, ...], tuple[Line, ...]]]:
    """Every task state that both have, with the lines of each."""
    theirs = {task: section.lines for section in other.sections for task in section.task_states}
    return [(task, section.lines, theirs[task]) for section in one.sections for task in section.task_states]


def sign(answer: Answer) -> str:
    """An answer in a few letters, as the legend explains them."""
    word = short_time(answer.threshold_ms or 0) if answer.rule.verdict is Verdict.AFTER else sign_of(answer.rule)
    return word if answer.later_ms is None else word + LATER[0]


def sign_of(rule: Rule) -> str:
    return MEANINGS[rule.verdict][0]


def short_time(milliseconds: int) -> str:
    """A length of time in the greatest unit of which it is a whole number, such as `90s` or `3m`."""
    for unit, length in _UNITS_MS:
        if milliseconds and milliseconds % length == 0:
            return f"{milliseconds // length}{unit}"
    return f"{milliseconds}ms"


def title_of(section: Section, names: dict[str, tuple[str, ...]]) -> str:
    """What is being done in a section: operations of which all phases are in it are named as `@operation`."""
    if section.task_states == (NO_TASK,):
        return "no task"
    there = frozenset(section.task_states)
    parts: dict[str, None] = {}
    for task in section.task_states:
        operation = TASK_OPERATION[task]
        phases = {phase for phase, of in TASK_OPERATION.items() if of is operation}
        whole = len(phases) > 1 and phases <= there
        parts[f"@{operation.value}" if whole else "/".join(names.get(task, (task,)))] = None
    return ", ".join(parts)
