"""The whole matrix of a policy: what it answers for every operation in every state, with nothing else in the way.

A row is what one combination is answered, under circumstances that are the same for all rows: who asks, whether the
instance is locked, how long what is in flight has been silent. While a task is being served, the operation that it
belongs to is outstanding, and nothing else is. How a table looks on a page is not here (see `table_pages`), nor on a
terminal.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, Final, NamedTuple

import msgspec

from interlock.core.errors import Invalid
from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, TASK_STATES, Operation
from interlock.core.policy import Before, CompiledPolicy, Policy, Rule, Verdict, View
from interlock.core.states import NO_TASK, VmState
from interlock.policies.durations import seconds
from interlock.policies.reaching import Cell, Reaching

COLUMNS: Final = ("operation", "vm_state", "task_state", "launched", "verdict", "threshold_s", "rule", "reason")
"""The columns of the CSV form, in their order."""
TASKS: Final = (NO_TASK, *TASK_STATES)


class Circumstances(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for every row of a table."""

    role: str = "member"
    locked: bool = False
    silent_ms: int = 0
    """How long what is in flight has shown no life; without a task, how long nothing has happened."""
    host_reachable: bool = True


PLAIN: Final = Circumstances()
"""A member asks, the instance is not locked, its host can be reached, and no time has passed."""


class Variant(NamedTuple):
    """An operation as it may be asked for: itself, or its hard variant."""

    operation: Operation
    hard: bool = False

    @property
    def word(self) -> str:
        """What it is called in `[names]`: the operation, or such as `reboot_hard`."""
        return f"{self.operation.value}_hard" if self.hard else self.operation.value


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of the matrix is wanted. What is None is wanted whole."""

    variants: frozenset[Variant] | None = None
    vm_states: frozenset[VmState] | None = None
    task_states: frozenset[str] | None = None


EVERYTHING: Final = Selection()


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one combination is answered. Its operation and states have the names that the policy gives them."""

    operation: str
    vm_state: str
    task_state: str
    launched: bool
    verdict: Verdict
    threshold_s: int | float | None
    """For `after`: how long what is in flight must have shown no life."""
    rule: str
    reason: str
    """The code of the answer; empty for what is admitted, unless the rule gives one."""
    later_s: int | float | None
    """From which silence on another rule answers, where one with `silent_for` does; the verdict is that of now."""


class Answer(NamedTuple):
    """What one combination is answered, with the rule itself."""

    rule: Rule
    later_ms: int | None

    @property
    def threshold_ms(self) -> int | None:
        return (self.rule.threshold_ms or 0) if self.rule.verdict is Verdict.AFTER else None

    @property
    def reason(self) -> str:
        """The code that a client would see, or none where it is admitted."""
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
    """One row for each operation, vm_state, task_state and whether it was ever launched.

    The hard variant of an operation has rows of its own where the policy tells it apart (see `variants`). What has
    several names in the policy has a row for each.
    """
    return list(rows(policy, circumstances, selection))


def rows(
    policy: CompiledPolicy | Policy, circumstances: Circumstances = PLAIN, selection: Selection = EVERYTHING
) -> Iterator[Row]:
    """The same as `table`, one at a time."""
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
    """The selected part of the product of operations, vm_states and task_states, in this order."""
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
    """What a policy answers under some circumstances. Combinations that no rule tells apart are judged once."""

    def __init__(self, policy: CompiledPolicy, circumstances: Circumstances = PLAIN) -> None:
        self._policy = policy
        self._circumstances = circumstances
        self._reaching = Reaching(policy.rules)
        self._known: dict[tuple[Any, ...], tuple[Answer, Answer]] = {}

    def of(self, variant: Variant, vm_state: VmState, task_state: str) -> tuple[Answer, Answer]:
        """What is answered for an instance that was launched, and for one that never was."""
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
    """The rule of now, and the first silence from which on it is another one."""
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
    """What the rules see in one combination."""
    return View(
        operation=variant.operation,
        vm_state=vm_state,
        task_state=task_state,
        outstanding=0 if task_state == NO_TASK else BIT[TASK_OPERATION[task_state]],
        role=circumstances.role,
        locked=circumstances.locked,
        host_reachable=circumstances.host_reachable,
        hard=variant.hard,
        silent_ms=circumstances.silent_ms,
        running_ms=circumstances.silent_ms,
        launched=launched,
    )


def variants(policy: CompiledPolicy | Policy) -> tuple[Variant, ...]:
    """Every operation, and after it its hard variant where a rule or a name of the policy tells the two apart."""
    whole = policy.policy if isinstance(policy, CompiledPolicy) else policy
    told = frozenset[Operation]().union(*(rule.operations for rule in whole.rules if rule.hard is not None))
    found = []
    for operation in Operation:
        soft, hard = Variant(operation), Variant(operation, hard=True)
        found.append(soft)
        if CATALOGUE[operation].hard_phases and (operation in told or hard.word in whole.names):
            found.append(hard)
    return tuple(found)


def csv_lines(table_rows: Iterable[Row]) -> Iterator[str]:
    """The CSV form: a line of titles and a line for each row, each with its line end."""
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
    """The part of the matrix that words name, in the language's spelling, the policy's or Nova's; no words name all.

    A task is named by its task_state, by `none`, or by the operation of which it is a phase.

    Raises:
        Invalid: a word names nothing; with the nearest one that does.
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
            raise Invalid(f"{word[:80]!r} is no {noun}.", remedy=near)
        meant |= known[plain]
    return frozenset(meant) or None
