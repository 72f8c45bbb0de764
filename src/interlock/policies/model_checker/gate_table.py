"""The gate as a decision table: for each situation and submission, masks of outstanding operations and their effects.

A *situation* is everything a rule can see of an instance except the outstanding operations: vm_state, launched, locked,
task, ages. In one situation, the answer to a submission is a short list of masks: the first that intersects the
outstanding operations decides. Whether a rule holds is evaluated by the core, one rule at a time.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, NamedTuple, assert_never

import msgspec
import numpy as np
from numpy.typing import NDArray

from interlock.core.conditions import Tests, compiled_tests
from interlock.core.operations import BIT, CATALOGUE, Lane, Operation
from interlock.core.policy import HOST_NOT_FENCED, MeasuredFrom, Rule, Verdict
from interlock.core.roles import Role
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import View
from interlock.policies.model_checker.actions import Alphabet, SubmissionKind
from interlock.policies.model_checker.results import check_time

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NONE_OUTSTANDING = 1 << 62
"""The mask bit for an instance with nothing outstanding."""
_ALWAYS = (1 << 63) - 1


class GateEffect(IntEnum):
    """The effect of an answer: the lower bits of a table entry. The upper bits are the kind of request."""

    REFUSED = 0
    REFUSED_UNTIL = 1
    """Refused, with a retry time at which the rules alone guarantee admission."""
    UNCERTAIN = 2
    """Refused, with a retry time at which another rule may decide: checked with the core."""
    UNEXPLAINED = 3
    """Refused without a rule or a reason."""
    ADMIT = 4
    TAKE_OVER = 5
    PREEMPT = 6
    RECORD_ONLY = 7
    """Changes a field of the record that no decision depends on."""
    LOCK = 8
    UNLOCK = 9
    RESET = 10


ROLE_BIT: Final = {role: 1 << number for number, role in enumerate(Role)}
_EVERY_ROLE: Final = (1 << len(Role)) - 1
EFFECT_BITS = 4
EFFECT_MASK = (1 << EFFECT_BITS) - 1
_PLAIN_RECORDS = {
    Operation.LOCK: GateEffect.LOCK,
    Operation.UNLOCK: GateEffect.UNLOCK,
    Operation.RESET_STATE: GateEffect.RESET,
}


class Situation(NamedTuple):
    """The input of the gate but the submission and what is outstanding."""

    vm_state: VmState
    launched: bool
    host_reachable: bool
    tags: tuple[str, ...]
    lock_role: Role | None
    """The role with which it is locked; None: it is not."""
    held: int
    """The operation that is held, as a bit mask."""
    task_state: str
    silent_ms: int
    running_ms: int


_ANYWHERE: Final[dict[str, Any]] = {"vm_state": VmState.ACTIVE, "task_state": NO_TASK}
"""What a rule's further conditions do not see."""


class GateAnswer(NamedTuple):
    """A rule, and the mask of operations of which one must be outstanding for it to decide."""

    mask: int
    rule: Rule


class Rows(NamedTuple):
    """The rows of all known situations: `first[situation]` to `first[situation] + counts[situation]`."""

    first: Ints
    counts: Ints
    submission: Ints
    """The number of the submission: the first of those that are answered alike."""
    roles: Ints
    """The roles of the callers that are answered so, as a bit mask (`ROLE_BIT`)."""
    masks: Ints
    """(rows, levels); unused ones are 0."""
    effects: Ints
    """(rows, levels + 1); the last applies where no mask matches."""

    def chosen(self, kept: Bools) -> Rows:
        """Return some of the rows."""
        before = np.concatenate([[0], np.cumsum(kept)])
        first = before[self.first]
        counts = before[self.first + self.counts] - first
        return Rows(first, counts, self.submission[kept], self.roles[kept], self.masks[kept], self.effects[kept])


class _Row(NamedTuple):
    """One row of `Rows`, before it is in the arrays."""

    submission: int
    roles: int
    masks: list[int]
    effects: list[int]

    def shared_with(self, roles: int) -> _Row:
        return self._replace(roles=self.roles | roles)


class GateTable:
    """The answers in every situation, computed on first use."""

    def __init__(self, alphabet: Alphabet) -> None:
        self._policy = alphabet.policy
        self._alphabet = alphabet
        self._cells: dict[tuple[Operation, VmState, str], tuple[tuple[int, Rule], ...]] = {}
        self._number = {rule.id: number for number, rule in enumerate(self._policy.rules)}
        self._tests: dict[int, Tests] = {}
        self._holding: dict[tuple[Any, ...], bool] = {}
        self._numbers: dict[Situation, int] = {}
        self._submissions = {submission: number for number, submission in enumerate(alphabet.submissions)}
        self._first = [0]
        self._new: list[_Row] = []
        """The rows that are not in the arrays yet."""
        self._roles = [
            sum(ROLE_BIT[role] for role in alphabet.roles_of(submission)) for submission in alphabet.submissions
        ]
        none = np.zeros(0, np.int64)
        self._rows = Rows(none, none, none, none, np.zeros((0, 0), np.int64), np.zeros((0, 1), np.int64))
        self._answers: dict[tuple[int, Situation], tuple[GateAnswer, ...]] = {}

    def add(self, situation: Situation) -> int:
        """Add a situation, if it is new, and return its number."""
        known = self._numbers.get(situation)
        if known is not None:
            return known
        check_time(self._alphabet.until_s)
        self._first.append(self._first[-1])
        if situation.vm_state is not VmState.DELETED:
            rows = self._rows_of(situation)
            self._new += rows
            self._first[-1] += len(rows)
        self._numbers[situation] = len(self._first) - 2
        return self._numbers[situation]

    def _rows_of(self, situation: Situation) -> list[_Row]:
        """Return a row for each submission that is not plainly refused; one for callers that are answered alike."""
        rows: dict[tuple[Any, ...], _Row] = {}
        for number, submission in enumerate(self._alphabet.submissions):
            answers = self.answers(submission, situation)
            masks, effects = _merged([(one.mask, self._effect(submission, situation, one)) for one in answers])
            if any(effects):
                roles = self._roles[number]
                if situation.vm_state is VmState.SOFT_DELETED and submission.operation is Operation.DELETE:
                    roles = _EVERY_ROLE  # The server reclaims what is soft-deleted, for whoever did that.
                alone = number if GateEffect.UNCERTAIN in effects else -1
                key = (submission._replace(caller=()), alone, *masks, *effects)
                first = rows.get(key)
                rows[key] = _Row(number, roles, masks, effects) if first is None else first.shared_with(roles)
        return list(rows.values())

    def rows(self) -> Rows:
        """Return the rows of all situations added so far."""
        levels = max((len(row.masks) for row in self._new), default=0)
        self._rows = _widened(self._rows, levels)
        levels = self._rows.masks.shape[1]
        masks = np.zeros((len(self._new), levels), np.int64)
        effects = np.zeros((len(self._new), levels + 1), np.int64)
        for number, row in enumerate(self._new):
            masks[number, : len(row.masks)] = row.masks
            effects[number, : len(row.masks)] = row.effects[:-1]
            effects[number, levels] = row.effects[-1]
        first = np.array(self._first, np.int64)
        self._rows = Rows(
            first[:-1],
            np.diff(first),
            np.concatenate([self._rows.submission, np.array([row.submission for row in self._new], np.int64)]),
            np.concatenate([self._rows.roles, np.array([row.roles for row in self._new], np.int64)]),
            np.concatenate([self._rows.masks, masks]),
            np.concatenate([self._rows.effects, effects]),
        )
        self._new.clear()
        return self._rows

    def answers(self, submission: SubmissionKind, situation: Situation) -> tuple[GateAnswer, ...]:
        """Return the rules that may decide a submission, in order; the last does not depend on what is outstanding."""
        key = (self._submissions[submission], situation)
        known = self._answers.get(key)
        if known is None:
            known = self._answers[key] = tuple(self._ask(submission, situation))
        return known

    def _ask(self, submission: SubmissionKind, situation: Situation) -> list[GateAnswer]:
        if submission.operation is Operation.EVACUATE and situation.host_reachable:
            return [GateAnswer(_ALWAYS, HOST_NOT_FENCED)]
        found = []
        for number, rule in self._cell(submission.operation, situation.vm_state, situation.task_state):
            if self._holds(number, rule, submission, situation):
                mask = _ALWAYS if rule.outstanding is None else outstanding_mask(rule.outstanding)
                found.append(GateAnswer(mask, rule))
                if rule.outstanding is None:
                    break
        return found

    def _cell(self, operation: Operation, vm_state: VmState, task_state: str) -> tuple[tuple[int, Rule], ...]:
        key = (operation, vm_state, task_state)
        known = self._cells.get(key)
        if known is None:
            cell = self._policy.cell(*key)
            known = self._cells[key] = tuple((self._number.get(rule.id, -1), rule) for rule in cell)
        return known

    def _holds(self, number: int, rule: Rule, submission: SubmissionKind, situation: Situation) -> bool:
        """Return whether the conditions of a rule hold, whatever is outstanding."""
        if number < 0:
            return True
        key = (number, submission.caller, submission.hard, situation._replace(**_ANYWHERE))
        known = self._holding.get(key)
        if known is None:
            tests = self._tests.get(number)
            if tests is None:
                tests = self._tests[number] = compiled_tests(msgspec.structs.replace(rule, outstanding=None))
            view = View(
                operation=submission.operation,
                vm_state=VmState.ACTIVE,
                locked=situation.lock_role is not None,
                locked_above=situation.lock_role is not None
                and not dict(submission.caller)["role"].includes(situation.lock_role),
                host_reachable=situation.host_reachable,
                held=situation.held,
                tags=situation.tags,
                hard=submission.hard,
                silent_ms=situation.silent_ms,
                running_ms=situation.running_ms,
                launched=situation.launched,
                **dict(submission.caller),
            )
            known = self._holding[key] = all(test(value(view)) for value, test in tests)
        return known

    def _effect(self, submission: SubmissionKind, situation: Situation, answer: GateAnswer) -> int:
        rule = answer.rule
        match rule.verdict:
            case Verdict.DENY | Verdict.REDUNDANT:
                return GateEffect.REFUSED if rule.id and rule.code else GateEffect.UNEXPLAINED
            case Verdict.AFTER:
                if _age_ms(rule, situation) < (rule.threshold_ms or 0):
                    holds = self._retry_time_holds(submission, situation, rule)
                    return GateEffect.REFUSED_UNTIL if holds else GateEffect.UNCERTAIN
                effect = GateEffect.TAKE_OVER
            case Verdict.PREEMPT:
                effect = GateEffect.PREEMPT
            case Verdict.ADMIT:
                effect = GateEffect.ADMIT
            case _:
                assert_never(rule.verdict)
        if CATALOGUE[submission.operation].lane is Lane.RECORD:
            record = _PLAIN_RECORDS.get(submission.operation, GateEffect.RECORD_ONLY)
            if record is not GateEffect.LOCK:
                return record
            role: Role = dict(submission.caller)["role"]
            if self._alphabet.locks_by_least and role not in self._alphabet.lock_levels:
                return GateEffect.RECORD_ONLY
            return record | self._alphabet.lock_level(role) << EFFECT_BITS
        kind = self._alphabet.kind(submission, in_turn=rule.in_turn, preempts=effect is not GateEffect.ADMIT)
        return effect | self._alphabet.kind_number[kind] << EFFECT_BITS

    def _retry_time_holds(self, submission: SubmissionKind, situation: Situation, rule: Rule) -> bool:
        """Return whether this rule surely decides just before and just after its threshold.

        It does if no rule precedes it then that does not precede it now.
        """
        now = {answer.rule.id for answer in _until(self.answers(submission, situation), rule)}
        threshold = rule.threshold_ms or 0
        moments = []
        for at_ms in (threshold - 1, threshold):
            if rule.measured_from is MeasuredFrom.LAST_PROGRESS:
                # The exact running time does not matter: a rule that can hold here sees it only as its threshold.
                moments.append(situation._replace(silent_ms=at_ms, running_ms=max(situation.running_ms, at_ms)))
            else:
                moments += [
                    situation._replace(silent_ms=ms, running_ms=at_ms) for ms in self._silences(situation, at_ms)
                ]
        for then in moments:
            answers = self.answers(submission, then)
            before = {answer.rule.id for answer in _until(answers, rule)}
            if not before <= now or all(answer.rule is not rule for answer in answers):
                return False
        return True

    def _silences(self, situation: Situation, at_ms: int) -> list[int]:
        """Return one silence of each class that is possible after running for `at_ms`."""
        moments = {
            moment
            for rule in self._policy.rules
            for moment in (rule.silent_ms_min, rule.threshold_ms)
            if moment is not None and situation.silent_ms < moment <= at_ms
        }
        return sorted({situation.silent_ms, *moments})


def _widened(rows: Rows, levels: int) -> Rows:
    """Return the rows padded to at least `levels` masks."""
    more = levels - rows.masks.shape[1]
    if more <= 0:
        return rows
    room = np.zeros((len(rows.masks), more), np.int64)
    effects = np.concatenate([rows.effects[:, :-1], room, rows.effects[:, -1:]], axis=1)
    return rows._replace(masks=np.concatenate([rows.masks, room], axis=1), effects=effects)


def _until(answers: tuple[GateAnswer, ...], rule: Rule) -> tuple[GateAnswer, ...]:
    for number, answer in enumerate(answers):
        if answer.rule is rule:
            return answers[:number]
    return answers


def outstanding_mask(operations: frozenset[Operation]) -> int:
    """Return the bits of which one is set if a condition on outstanding operations holds."""
    return sum(BIT[operation] for operation in operations) if operations else NONE_OUTSTANDING


def _age_ms(rule: Rule, situation: Situation) -> int:
    return situation.silent_ms if rule.measured_from is MeasuredFrom.LAST_PROGRESS else situation.running_ms


def _merged(answers: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Merge neighbours with the same effect. Return masks and effects; the last effect has no mask."""
    masks: list[int] = []
    effects: list[int] = []
    for mask, effect in answers:
        if effects and effects[-1] == effect:
            masks[-1] |= mask
        else:
            masks.append(mask)
            effects.append(effect)
    return masks[:-1], effects
