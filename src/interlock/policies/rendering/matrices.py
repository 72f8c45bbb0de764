"""Answer matrices of a policy: operations by vm_states, with one section for each class of task states.

Task states with equal answers share a section. `tables` has the rows for programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from interlock.core.durations import short_time
from interlock.core.operations import TASK_OPERATION
from interlock.core.policy import CompiledPolicy, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.policies.rendering.tables import (
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
    Verdict.ADMIT: ("yes", "admitted, and queued"),
    Verdict.PREEMPT: ("now", "admitted first; the operation in flight is interrupted"),
    Verdict.AFTER: ("3m", "admitted after that time without progress"),
    Verdict.REDUNDANT: ("same", "reached, or already requested"),
    Verdict.DENY: ("·", "denied"),
}
"""The sign of each verdict in a matrix, and its meaning."""
LATER: Final = ("*", "changes after a time without progress")


class MatrixRow(NamedTuple):
    """The answers to one operation, in the order of the matrix's vm_states."""

    variant: Variant
    names: tuple[str, ...]
    answers: tuple[Answer, ...]


class Section(NamedTuple):
    """What is answered while any of some task states holds; all of them are answered alike."""

    task_states: tuple[str, ...]
    lines: tuple[MatrixRow, ...]


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

    Task states share a section if what `alike` makes of their answers is equal: all that a client can distinguish,
    unless said otherwise.
    """
    of = alike or mark
    answers = Answers(policy, circumstances)
    vm_states = tuple(state for state in VmState if selection.vm_states is None or state in selection.vm_states)
    asked = [each for each in variants(policy) if selection.variants is None or each in selection.variants]
    grouped: dict[tuple[object, ...], tuple[list[str], tuple[MatrixRow, ...]]] = {}
    for task in TASKS:
        if selection.task_states is not None and task not in selection.task_states:
            continue
        lines = tuple(
            MatrixRow(
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
    """Return all of an answer that a client can see."""
    return answer.rule.verdict, answer.threshold_ms, answer.reason, answer.later_ms


def differing(one: Matrix, other: Matrix) -> int:
    """In how many combinations two matrices of the same selection answer otherwise."""
    return sum(
        mark(mine) != mark(yours)
        for _, lines, others in zip_tasks(one, other)
        for line, against in zip(lines, others, strict=True)
        for mine, yours in zip(line.answers, against.answers, strict=True)
    )


def zip_tasks(one: Matrix, other: Matrix) -> list[tuple[str, tuple[MatrixRow, ...], tuple[MatrixRow, ...]]]:
    """Every task state that both have, with the lines of each."""
    theirs = {task: section.lines for section in other.sections for task in section.task_states}
    return [(task, section.lines, theirs[task]) for section in one.sections for task in section.task_states]


def sign(answer: Answer) -> str:
    """An answer in a few letters, as the legend explains them."""
    word = short_time(answer.threshold_ms or 0) if answer.rule.verdict is Verdict.AFTER else sign_of(answer.rule)
    return word if answer.later_ms is None else word + LATER[0]


def sign_of(rule: Rule) -> str:
    return MEANINGS[rule.verdict][0]


def title_of(section: Section, names: dict[str, tuple[str, ...]]) -> str:
    """Return the operations in progress in a section: those of which all phases are in it are named as `@operation`."""
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
