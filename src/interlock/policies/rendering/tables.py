"""Answer tables: what a policy answers for every operation, vm_state and task_state, as rows and as matrices.

All rows share the same circumstances: the caller's role, whether the instance is locked, how long the task was silent.
During a task its operation is outstanding, and nothing else is. In a matrix of operations by vm_states, task states
with equal answers share a section. `table_pages` formats tables.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, Final, NamedTuple

import msgspec

from interlock.core.conditions import CALLER
from interlock.core.durations import seconds, short_time
from interlock.core.errors import Invalid
from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, TASK_STATES, Operation
from interlock.core.policy import Before, CompiledPolicy, Policy, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import View
from interlock.policies.lint.reachability import Cell, Reaching

COLUMNS: Final = ("operation", "vm_state", "task_state", "launched", "verdict", "threshold_s", "rule", "reason")
"""The columns of the CSV form, in their order."""
TASKS: Final = (NO_TASK, *TASK_STATES)


class Circumstances(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances shared by all rows of a table."""

    caller: dict[str, Any] = {}
    """The fields of a view that describe who asks, where they are not those of a plain submission."""
    locked: bool = False
    silent_ms: int = 0
    """Time since the last progress of the request in flight; without one, since the last change."""
    host_reachable: bool = True

    def document(self) -> dict[str, Any]:
        """Return it as JSON, with everything that describes who asks."""
        others = msgspec.structs.asdict(self)
        caller = others.pop("caller")
        return {**{condition.reads: caller.get(condition.reads, condition.usual) for condition in CALLER}, **others}


PLAIN: Final = Circumstances()
"""A request by a member for an unlocked instance on a reachable host, with no time passed."""


class Variant(NamedTuple):
    """An operation or its hard variant."""

    operation: Operation
    hard: bool = False

    @property
    def word(self) -> str:
        """Its key in `[names]`: the operation, or for example `reboot_hard`."""
        return f"{self.operation.value}_hard" if self.hard else self.operation.value


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the table. None selects everything."""

    variants: frozenset[Variant] | None = None
    vm_states: frozenset[VmState] | None = None
    task_states: frozenset[str] | None = None


EVERYTHING: Final = Selection()


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The answer for one combination, with the policy's custom names."""

    operation: str
    vm_state: str
    task_state: str
    launched: bool
    verdict: Verdict
    threshold_s: int | float | None
    """For `after`: the threshold."""
    rule: str
    reason: str
    """The reason code; empty if admitted, unless the rule has one."""
    later_s: int | float | None
    """The silence after which another rule decides, if one with `silent_for` does."""


class Answer(NamedTuple):
    """The answer for one combination, with its rule."""

    rule: Rule
    later_ms: int | None

    @property
    def threshold_ms(self) -> int | None:
        return (self.rule.threshold_ms or 0) if self.rule.verdict is Verdict.AFTER else None

    @property
    def reason(self) -> str:
        """The reason code for clients; empty if admitted."""
        rule = self.rule
        if rule.verdict in (Verdict.ADMIT, Verdict.PREEMPT):
            return rule.reason or ""
        if rule.verdict is Verdict.AFTER and rule.before is Before.REDUNDANT:
            return rule.reason or "already"
        return rule.code


def compiled(policy: CompiledPolicy | Policy) -> CompiledPolicy:
    return policy if isinstance(policy, CompiledPolicy) else CompiledPolicy(policy)


def table(
    policy: CompiledPolicy | Policy,
    circumstances: Circumstances = PLAIN,
    selection: Selection = EVERYTHING,
) -> list[Row]:
    """Return one row for each operation, vm_state, task_state and `launched`.

    Hard variants have rows of their own where the policy distinguishes them (see `variants`). Each of several custom
    names has a row.
    """
    return list(rows(policy, circumstances, selection))


def rows(
    policy: CompiledPolicy | Policy, circumstances: Circumstances = PLAIN, selection: Selection = EVERYTHING
) -> Iterator[Row]:
    """Yield the rows of `table`."""
    ready = compiled(policy)
    names = ready.policy.names
    answers = Answers(ready, circumstances)
    for variant, vm_state, task_state in combinations(ready, selection):
        pair = answers.of(variant, vm_state, task_state)
        called = (names.get(word, (word,)) for word in (variant.word, vm_state.value, task_state))
        for operation, state, task in product(*called):
            for launched, answer in zip((True, False), pair, strict=True):
                yield _row(operation, state, task, answer, launched=launched)


def combinations(
    policy: CompiledPolicy | Policy, selection: Selection = EVERYTHING
) -> Iterator[tuple[Variant, VmState, str]]:
    """Yield the selected combinations of operations, vm_states and task_states, in this order."""
    return product(
        (each for each in variants(policy) if selection.variants is None or each in selection.variants),
        (state for state in VmState if selection.vm_states is None or state in selection.vm_states),
        (task for task in TASKS if selection.task_states is None or task in selection.task_states),
    )


def _row(operation: str, vm_state: str, task_state: str, answer: Answer, *, launched: bool) -> Row:
    threshold_ms = answer.threshold_ms
    return Row(
        operation=operation,
        vm_state=vm_state,
        task_state=task_state,
        launched=launched,
        verdict=answer.rule.verdict,
        threshold_s=None if threshold_ms is None else seconds(threshold_ms),
        rule=answer.rule.id,
        reason=answer.reason,
        later_s=None if answer.later_ms is None else seconds(answer.later_ms),
    )


class Answers:
    """The answers of a policy under some circumstances. Combinations that no rule distinguishes are judged once."""

    def __init__(self, policy: CompiledPolicy, circumstances: Circumstances = PLAIN) -> None:
        self._policy = policy
        self._circumstances = circumstances
        self._reaching = Reaching(policy.rules)
        self._known: dict[tuple[Any, ...], tuple[Answer, Answer]] = {}

    def of(self, variant: Variant, vm_state: VmState, task_state: str) -> tuple[Answer, Answer]:
        """Return the answers for an instance that was launched, and for one that was not."""
        program = self._reaching.program(Cell(variant.operation, vm_state, task_state))
        key = (program, variant.hard, TASK_OPERATION.get(task_state), vm_state is VmState.DELETED)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._judge(variant, vm_state, task_state)
        return known

    def _judge(self, variant: Variant, vm_state: VmState, task_state: str) -> tuple[Answer, Answer]:
        asked = self._policy.cell(variant.operation, vm_state, task_state)
        launched, never = (
            view_of(variant, vm_state, task_state, self._circumstances, launched=launched) for launched in (True, False)
        )
        answer = _answer(self._policy, asked, launched)
        if all(rule.launched is None for rule in asked):
            return answer, answer
        return answer, _answer(self._policy, asked, never)


def _answer(policy: CompiledPolicy, asked: tuple[Rule, ...], view: View) -> Answer:
    """Return the rule that decides now, and the first silence at which another one does."""
    now = policy.decide(view)
    moments = {rule.silent_ms_min or 0 for rule in asked}
    for moment in sorted(moment for moment in moments if moment > view.silent_ms):
        if policy.decide(msgspec.structs.replace(view, silent_ms=moment, running_ms=moment)) is not now:
            return Answer(now, moment)
    return Answer(now, None)


def view_of(
    variant: Variant,
    vm_state: VmState,
    task_state: str,
    circumstances: Circumstances = PLAIN,
    *,
    launched: bool = True,
) -> View:
    """Build the view of one combination."""
    return View(
        operation=variant.operation,
        vm_state=vm_state,
        task_state=task_state,
        outstanding=0 if task_state == NO_TASK else BIT[TASK_OPERATION[task_state]],
        locked=circumstances.locked,
        host_reachable=circumstances.host_reachable,
        hard=variant.hard,
        silent_ms=circumstances.silent_ms,
        running_ms=circumstances.silent_ms,
        launched=launched,
        **circumstances.caller,
    )


def variants(policy: CompiledPolicy | Policy) -> tuple[Variant, ...]:
    """Return every operation, each followed by its hard variant if the policy distinguishes or names it."""
    whole = policy.policy if isinstance(policy, CompiledPolicy) else policy
    distinguished = frozenset[Operation]().union(*(rule.operations for rule in whole.rules if rule.hard is not None))
    found = []
    for operation in Operation:
        soft, hard = Variant(operation), Variant(operation, hard=True)
        found.append(soft)
        if CATALOGUE[operation].hard_phases and (operation in distinguished or hard.word in whole.names):
            found.append(hard)
    return tuple(found)


def csv_lines(table_rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of the CSV form, with line ends, the titles first."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")

    def line(*values: object) -> str:
        writer.writerow(values)
        text = buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
        return text

    yield line(*COLUMNS)
    for row in table_rows:
        launched = "true" if row.launched else "false"
        threshold = "" if row.threshold_s is None else row.threshold_s
        verdict = row.verdict.value
        yield line(row.operation, row.vm_state, row.task_state, launched, verdict, threshold, row.rule, row.reason)


# ------------------------------------------------------------------------------------------------------- selecting


def select(
    policy: CompiledPolicy | Policy,
    *,
    operations: Iterable[str] = (),
    vm_states: Iterable[str] = (),
    tasks: Iterable[str] = (),
) -> Selection:
    """Return the selection for some words: standard, custom or Nova's names; none selects everything.

    A task is named by its task_state, by `none`, or by its operation.

    Raises:
        Invalid: unknown word, with the nearest valid one.
    """
    whole = policy.policy if isinstance(policy, CompiledPolicy) else policy
    names = whole.names
    known: dict[str, set[Variant]] = {}
    for variant in variants(whole):
        for word in (variant.word, variant.operation.value, *names.get(variant.word, ())):
            known.setdefault(word.replace("-", "_"), set()).add(variant)
    states = {word: {state} for state in VmState for word in _spellings(state.value, names)}
    phases: dict[str, set[str]] = {word: {task} for task in TASKS for word in _spellings(task, names)}
    for task, operation in TASK_OPERATION.items():
        if task in TASKS:
            phases.setdefault(operation.value, set()).add(task)
    return Selection(
        variants=_meant("operation", operations, known),
        vm_states=_meant("vm_state", vm_states, states),
        task_states=_meant("task_state", (task.removeprefix("@") for task in tasks), phases),
    )


def _spellings(word: str, names: dict[str, tuple[str, ...]]) -> set[str]:
    return {each.replace("-", "_") for each in (word, *names.get(word, ()))}


def _meant(noun: str, words: Iterable[str], known: dict[str, set[Any]]) -> frozenset[Any] | None:
    meant: set[Any] = set()
    for word in words:
        plain = word.lower().replace("-", "_")
        if plain not in known:
            close = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
            near = f"Did you mean {close[0]!r}?" if close else f"Such as {', '.join(sorted(known)[:3])}."
            raise Invalid(f"Unknown {noun} {word[:80]!r}.", remedy=near)
        meant |= known[plain]
    return frozenset(meant) or None


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
