"""Lint: states and circumstances in which nobody can delete an instance (law 5).

Deletion is reached by delete, by force_delete, or by soft_delete where a soft-deleted instance can be deleted. It is
enough that a caller of some role can. Circumstances are the values of the instance and of its queue that rules about
deletion distinguish: tags, held and outstanding requests, locks, the host. A list of blocked operations is not varied,
since who may change the VM may change it, and neither is time: it has passed. Where tags only keep an instance from
being deleted, they can be removed, and a host can come back: that is a warning.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Final, NamedTuple

from interlock.core.conditions import ABOUT, Condition, Subject
from interlock.core.durations import DURATION_MAX_MS
from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, Operation
from interlock.core.policy import NO_RULE, Rule, Verdict
from interlock.core.roles import Role
from interlock.core.states import LEFT_AT_END, NO_TASK, VmState
from interlock.policies.lint.condition_sets import CHOICES, SETS, TASKS, Literal
from interlock.policies.lint.exit_lints import DELETIONS, Pair, WaysOut
from interlock.policies.lint.finding_kinds import finding
from interlock.policies.lint.findings import Finding, Severity, some, states_text
from interlock.policies.lint.reachability import Cell, Reaching, ViewClass, can_be_together, mask_of

_ROUTES: Final = (*DELETIONS, Operation.SOFT_DELETE)
_FIXED: Final = frozenset({"blocked", "locked_above", "silent_ms"})
"""What is not varied. No lock is above an admin's."""


class Circumstance(NamedTuple):
    """Values of an instance and its queue that are not as usual."""

    words: tuple[str, ...] = ()
    values: tuple[tuple[str, object], ...] = ()
    """Fields of the view, with another value or a member."""
    rules: int = -1
    """The rules that distinguish them, one bit each."""


_USUAL: Final = Circumstance()


class Undeletable:
    """The deletion lint of one policy."""

    def __init__(self, reaching: Reaching, ways_out: WaysOut) -> None:
        self._reaching = reaching
        self._ways_out = ways_out
        self._codes: dict[tuple[Pair, int | None, frozenset[str]], str] = {}
        space = reaching.space
        self._last = space.silent_for(DURATION_MAX_MS)
        varied = (one for one in CHOICES if one.subject in _OF_VM and one.reads != "silent_ms")
        self._usual = [(one, space.choice(one.reads, one.usual.__eq__)) for one in varied]
        self._held: dict[tuple[Operation | None, tuple[tuple[str, object], ...], Role], int] = {}
        self._found: dict[Hashable, list[tuple[str, int | None, str]]] = {}
        self._view_classes: dict[
            tuple[Operation | None, tuple[tuple[str, object], ...], Role | None], ViewClass | None
        ] = {}

    def findings(self) -> Iterator[Finding]:
        yield from self._refused()
        yield from self._for_members()

    def is_deletable(
        self, state: VmState, task: str, circumstance: Circumstance = _USUAL, role: Role | None = None
    ) -> bool:
        """Return whether a caller, of any role or of that one, can delete an instance, now or later."""
        if any(self._permits(operation, state, task, circumstance, role) for operation in DELETIONS):
            return True
        if state is VmState.SOFT_DELETED or not self._permits(Operation.SOFT_DELETE, state, task, circumstance, role):
            return False
        # The queue is empty by then; tags and the like stay.
        later = Circumstance(values=tuple(one for one in circumstance.values if one[0] not in _QUEUE))
        return any(self._permits(one, VmState.SOFT_DELETED, NO_TASK, later, None) for one in DELETIONS)

    @cached_property
    def _pairs(self) -> list[Pair]:
        """The states and tasks that are reached, in order."""
        states = [state for state in VmState if state in self._ways_out.inhabited and state is not VmState.DELETED]
        return [(state, task) for state in states for task in TASKS if self._is_served(state, task)]

    def _is_served(self, state: VmState, task: str) -> bool:
        """Return whether a task can be in service in a state: the policy permits its operation there.

        Or where the guest ran before it ended.
        """
        if task == NO_TASK or not can_be_together(state, task):
            return task == NO_TASK
        operation = TASK_OPERATION[task]
        before = (
            CATALOGUE[operation].sources & LEFT_AT_END if state in {VmState.STOPPED, VmState.ERROR} else frozenset()
        )
        return any(operation in self._ways_out.permitted_in(one) for one in {state, *before})

    def _refused(self) -> Iterator[Finding]:
        refused: dict[tuple[str, int | None, str], set[Pair]] = {}
        for pair in self._pairs:
            for key in self._refusals(*pair):
                refused.setdefault(key, set()).add(pair)
        together: dict[tuple[str, int | None, bool, frozenset[Pair]], list[str]] = {}
        for (code, rule, words), pairs in refused.items():
            # A VM that has left the server is only a record.
            left = all(state is VmState.MIGRATED_OUT for state, _ in pairs)
            passing = code == "delete-refused" and (left or words in self._passing)
            together.setdefault((code, rule, passing, frozenset(pairs)), []).append(words)
        for (code, rule, passing, same), several in together.items():
            yield self._finding(code, rule, same, [words for words in several if words], passing=passing)

    def _refusals(self, state: VmState, task: str) -> list[tuple[str, int | None, str]]:
        """Return code, rule and words of each circumstance in which nobody can delete; once for pairs that are alike.

        No rule distinguishes them, and neither does what deletes.
        """
        rules = self._reaching.about_pair(state, task)
        operation = TASK_OPERATION.get(task)
        queue_counts = bool(rules & self._reaching.about_outstanding)
        alike = (
            rules,
            operation if queue_counts or operation in _ROUTES else None,
            state if queue_counts else state is VmState.SOFT_DELETED,
        )
        if alike not in self._found:
            self._found[alike] = [
                (self._code((state, task), rule, one), rule, " and ".join(one.words))
                for one in self._blocking(state, task)
                for rule in (self._refuser(state, task, one),)
            ]
        return self._found[alike]

    def _blocking(self, state: VmState, task: str) -> Iterator[Circumstance]:
        """Yield the simplest circumstances in which nobody can delete."""
        if not self.is_deletable(state, task):
            yield _USUAL
            return
        found: list[set[tuple[str, object]]] = []
        for one in self._circumstances(state, task):
            values = set(one.values)
            if any(simpler <= values for simpler in found) or self.is_deletable(state, task, one):
                continue
            found.append(values)
            if not self._unlocks(state, task, one):
                yield one

    @cached_property
    def _passing(self) -> set[str]:
        """The words of circumstances that end by other means than the operations of an instance."""
        passing = {"tags", "host_reachable"}
        return {
            " and ".join(one.words)
            for state, task in self._pairs
            for one in self._circumstances(state, task)
            if any(field in passing for field, _ in one.values)
        }

    def _finding(
        self, code: str, number: int | None, pairs: frozenset[Pair], words: Sequence[str], *, passing: bool
    ) -> Finding:
        rule = self._rule(number)
        when = f"when the instance is {states_text(pairs)}"
        if words:
            when += f", if {some(words)}" if len(words) == 1 else f", if any of these holds: {some(words)}"
        if code == "no-exit":
            message = f"Nothing is ever admitted, for any role, {when}: it can never leave."
        else:
            message = f"No role can ever delete the instance, at once or by soft_delete, {when}."
        return finding(code, self._ways_out.about(rule), message, severity=Severity.WARNING if passing else None)

    def _for_members(self) -> Iterator[Finding]:
        """Find where some role can delete and a member cannot: allowed, and worth knowing."""
        found: dict[int | None, set[Pair]] = {}
        for state, task in self._pairs:
            deleting = task != NO_TASK and TASK_OPERATION[task] in _ROUTES
            if not deleting and not self.is_deletable(state, task, role=Role.MEMBER) and self.is_deletable(state, task):
                found.setdefault(self._refuser(state, task, _USUAL, Role.MEMBER), set()).add((state, task))
        for number, pairs in found.items():
            message = f"A member can never delete the instance when it is {states_text(pairs)}; another role can."
            yield finding("members-cannot-delete", self._ways_out.about(self._rule(number)), message, remedy=None)

    def _code(self, pair: Pair, rule: int | None, circumstance: Circumstance) -> str:
        """Return `no-exit` if nothing at all is permitted either."""
        key = (pair, rule, frozenset(field for field, _ in circumstance.values))
        if key not in self._codes:
            operations = (one for one in Operation if one not in _FOR_PEOPLE)
            anything = any(self._permits(one, *pair, circumstance, None) for one in operations)
            self._codes[key] = "delete-refused" if anything else "no-exit"
        return self._codes[key]

    def _refuser(self, state: VmState, task: str, circumstance: Circumstance, role: Role = Role.ADMIN) -> int | None:
        """Return the number of the rule that decides about an administrator's, or another's, delete."""
        return self._reaching.first(Cell(Operation.DELETE, state, task), self._point(task, circumstance, role))

    def _rule(self, number: int | None) -> Rule:
        return NO_RULE if number is None else self._reaching.rules[number]

    def _unlocks(self, state: VmState, task: str, circumstance: Circumstance) -> bool:
        """Return whether the instance is only locked, and somebody can unlock it, or could not have locked it here."""
        if ("locked", True) not in circumstance.values:
            return False
        can_lock = self._permits(Operation.LOCK, state, task, _USUAL, None)
        return not can_lock or self._permits(Operation.UNLOCK, state, task, circumstance, None)

    def _permits(
        self, operation: Operation, state: VmState, task: str, circumstance: Circumstance, role: Role | None
    ) -> bool:
        reaching, cell = self._reaching, Cell(operation, state, task)
        good = self._permitting
        deleting = _ROUTES if operation is Operation.SOFT_DELETE else DELETIONS
        if operation in deleting and self._outstanding(task, circumstance) & sum(BIT[one] for one in deleting):
            # The outstanding deletion will succeed, or be taken over in its turn.
            good |= self._redundant
        first = reaching.first(cell, self._point(task, circumstance, role or Role.ADMIN))
        if first is not None and good >> first & 1:
            return True
        views = self._view_class(task, circumstance, role)
        key = (circumstance.values, role)
        return views is not None and reaching.permits(cell, views, good, key) > 0

    @cached_property
    def _permitting(self) -> int:
        refusals = (Verdict.DENY, Verdict.REDUNDANT)
        return mask_of(number for number, rule in enumerate(self._reaching.rules) if rule.verdict not in refusals)

    @cached_property
    def _redundant(self) -> int:
        rules = enumerate(self._reaching.rules)
        return mask_of(number for number, rule in rules if rule.verdict is Verdict.REDUNDANT)

    @staticmethod
    def _outstanding(task: str, circumstance: Circumstance) -> int:
        mask = 0 if task == NO_TASK else BIT[TASK_OPERATION[task]]
        for field, value in circumstance.values:
            if field == "outstanding" and isinstance(value, Operation):
                mask |= BIT[value]
        return mask

    def _point(self, task: str, circumstance: Circumstance, role: Role) -> int:
        """Return the rules that hold for the most ordinary such view."""
        key = (TASK_OPERATION.get(task), circumstance.values, role)
        if key not in self._held:
            self._held[key] = self._reaching.held_when(task, *self._made(task, dict(circumstance.values), role))
        return self._held[key]

    def _view_class(self, task: str, circumstance: Circumstance, role: Role | None) -> ViewClass | None:
        """Return a circumstance after the longest silence; the caller is free but for the role."""
        key = (TASK_OPERATION.get(task), circumstance.values, role)
        if key not in self._view_classes:
            conditions = self._made(task, dict(circumstance.values), role)
            self._view_classes[key] = self._reaching.view_class(task, *conditions)
        return self._view_classes[key]

    def _made(self, task: str, values: dict[str, object], role: Role | None) -> Iterator[Literal]:
        space = self._reaching.space
        yield self._last
        if role is not None:
            yield space.choice("role", role.__eq__)
        for condition, usual in self._usual:
            if condition.reads in values:
                yield space.choice(condition.reads, values[condition.reads].__eq__)
            else:
                yield usual
        for condition in SETS:
            more = [values[condition.reads]] if condition.reads in values else []
            served = [TASK_OPERATION[task]] if condition.reads == "outstanding" and task != NO_TASK else []
            yield space.only(condition.reads, [*served, *more])
            if more:
                yield space.any_of(condition.reads, more)

    def _circumstances(self, state: VmState, task: str) -> Iterator[Circumstance]:
        """Yield the circumstances that rules about deletion distinguish in a state; one list has at most one member."""
        about = self._reaching.program(Cell(Operation.DELETE, VmState.SOFT_DELETED, NO_TASK))
        for operation in _ROUTES:
            about |= self._reaching.program(Cell(operation, state, task))
        admitted = self._ways_out.permitted_in(state)
        flags = [one for one in self._flags if one.rules & about]
        members = [one for one in self._members if one.rules & about and _can_be(one, admitted)]
        yield from flags
        yield from members
        for flag in flags:
            for one in chain(flags[flags.index(flag) + 1 :], members):
                if flag.values[0][0] != one.values[0][0]:
                    yield Circumstance((*flag.words, *one.words), (*flag.values, *one.values))

    @cached_property
    def _flags(self) -> list[Circumstance]:
        """The unusual values of what an instance has one of."""
        varied = [one for one in CHOICES if one.subject in _OF_VM and one.reads not in _FIXED]
        return [
            Circumstance((condition.because(value),), ((condition.reads, value),), self._about(condition))
            for condition in varied
            if self._about(condition)
            for value in self._reaching.space.values(condition)
            if value != condition.usual
        ]

    @cached_property
    def _members(self) -> list[Circumstance]:
        """The members of what an instance has many of, such as tags."""
        masks, space = self._reaching.masks, self._reaching.space
        return [
            Circumstance((condition.because(member),), ((condition.reads, member),), rules)
            for place, condition in enumerate(SETS)
            if condition.subject in _OF_VM
            for member, bit in space.members(condition)
            if (rules := masks.naming(place, bit))
        ]

    def _about(self, condition: Condition) -> int:
        """Return the rules with any condition on the same value."""
        rules = enumerate(self._reaching.rules)
        same = ABOUT[condition.reads]
        return mask_of(number for number, rule in rules if any(one.of(rule) is not None for one in same))


def _can_be(circumstance: Circumstance, admitted: Container[Operation]) -> bool:
    """Return whether something can be outstanding or held that keeps the instance from being deleted.

    A held deletion is admitted as soon as it may be.
    """
    ((field, value),) = circumstance.values
    if field == "outstanding":
        return isinstance(value, Operation) and value in admitted
    return field != "held" or value not in _ROUTES


_OF_VM: Final = frozenset({Subject.INSTANCE, Subject.QUEUE})
_QUEUE: Final = frozenset(condition.reads for condition in (*CHOICES, *SETS) if condition.subject is Subject.QUEUE)
_FOR_PEOPLE: Final = frozenset({Operation.LOCK, Operation.UNLOCK, Operation.SET_METADATA, Operation.RENAME})
"""What changes no more than what people read or may do."""
