"""Lint: states of an instance without exit, and states in which it cannot be deleted.

Looks at single decisions; `exploring` checks what a hung operation does to a queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from operator import not_
from typing import Final

from interlock.core.durations import DURATION_MAX_MS
from interlock.core.operations import CATALOGUE, TASK_OPERATION, Lane, Operation
from interlock.core.policy import NO_RULE, MeasuredFrom, Rule, Verdict
from interlock.core.roles import Role
from interlock.core.state_stack import evacuated
from interlock.core.states import LEFT_AT_END, NO_TASK, Target, VmState
from interlock.policies.lint.condition_sets import TASKS, places
from interlock.policies.lint.finding_kinds import finding
from interlock.policies.lint.findings import Finding, states_text
from interlock.policies.lint.reachability import Cell, Reaching, ViewClass, can_be_together, mask_of

Pair = tuple[VmState, str]

DELETIONS: Final = (Operation.DELETE, Operation.FORCE_DELETE)
_ENDS: Final = frozenset({VmState.DELETED, VmState.MIGRATED_OUT})
_STATES: Final = tuple(state for state in VmState if state is not VmState.DELETED)
_COMPONENTS: Final = tuple(operation for operation, entry in CATALOGUE.items() if entry.lane is Lane.COMPONENT)


_VIEWS_MAX: Final = 30


class WaysOut:
    """The exit lint of one policy."""

    def __init__(self, reaching: Reaching, limits: Callable[[Operation], bool]) -> None:
        """`limits` says whether every request for an operation has a limit of its total time."""
        self._limits = limits
        self._held: dict[tuple[str, bool, int], int] = {}
        self._view_classes: dict[Operation | None, tuple[int, ViewClass | None]] = {}
        self._views: dict[Operation | None, list[int]] = {}
        """The rules that hold in views that some rule permitted, by the operation in service: others may be alike."""
        self._reaching = reaching
        self._rules = reaching.rules

    @cached_property
    def permitted(self) -> dict[Pair, set[Operation]]:
        """The operations that a caller of some role may perform, now or later, in each (vm_state, task_state).

        For an unlocked instance that blocks nothing, with only the task in service outstanding.
        """
        found: dict[Pair, set[Operation]] = {(state, task): set() for state in _STATES for task in TASKS}
        for (state, task), operations in found.items():
            if can_be_together(state, task):
                operations.update(each for each in Operation if self._ever(Cell(each, state, task)))
        return found

    def _ever(self, cell: Cell) -> bool:
        ordinary, plain = self._plain(cell.task_state)
        first = self._reaching.first(cell, ordinary)
        if first is not None and self._permitting >> first & 1:
            return True
        views = self._views.setdefault(TASK_OPERATION.get(cell.task_state), [])
        if any(self._at_once >> first & 1 for held in views if (first := self._reaching.first(cell, held)) is not None):
            return True
        found = 0 if plain is None else self._reaching.permits(cell, plain, self._permitting, "plain")
        if found and len(views) < _VIEWS_MAX:
            views.append(found)
        return found > 0

    @cached_property
    def _at_once(self) -> int:
        """The rules that permit whatever the silence, one bit each."""
        return mask_of(
            number for number in places(self._permitting) if self._rules[number].verdict is not Verdict.AFTER
        )

    def _plain(self, task: str) -> tuple[int, ViewClass | None]:
        """Return submissions to an instance that blocks nothing, and the rules that hold for an ordinary one at last.

        Only the task in service is outstanding. After the longest silence, a rule with a threshold permits.
        """
        operation = TASK_OPERATION.get(task)
        if operation not in self._view_classes:
            space = self._reaching.space
            served = [operation] if operation else _COMPONENTS
            plain = (space.choice("blocked", not_), space.only("outstanding", served))
            last = (space.choice("role", Role.ADMIN.__eq__), space.silent_for(DURATION_MAX_MS))
            ordinary = self._reaching.held_when(task, *plain, *last)
            self._view_classes[operation] = (ordinary, self._reaching.view_class(task, *plain))
        return self._view_classes[operation]

    @cached_property
    def _permitting(self) -> int:
        """The rules that permit their operations now or later, one bit each."""
        refusals = (Verdict.DENY, Verdict.REDUNDANT)
        return mask_of(number for number, rule in enumerate(self._rules) if rule.verdict not in refusals)

    @cached_property
    def inhabited(self) -> frozenset[VmState]:
        """The vm_states that are reachable under the policy without `reset_state`."""
        found = {VmState.BUILDING}
        pending = [VmState.BUILDING]
        while pending:
            state = pending.pop()
            for there in self._led_to(state, found) - found:
                found.add(there)
                pending.append(there)
            if not pending:
                # Operations that restore a past vm_state depend on all that were found: iterate to a fixpoint.
                pending = [one for one in found if self._led_to(one, found) - found]
        return frozenset(found)

    def _led_to(self, state: VmState, found: Iterable[VmState]) -> set[VmState]:
        there = {VmState.STOPPED, VmState.ERROR} if state in LEFT_AT_END else set()
        for operation in self.permitted_in(state):
            entry = CATALOGUE[operation]
            if entry.on_failure is not None:
                there.add(entry.on_failure)
            match entry.to:
                case Target.SAME:
                    pass
                case Target.REPAIRED:
                    there |= {VmState.ACTIVE} if state is VmState.ERROR else set()
                case Target.EVACUATED:
                    there.add(evacuated(state, ())[0])
                case Target.PRIOR | Target.PRESENT:
                    there |= {VmState.ACTIVE, *(each for each in found if each not in _ENDS)}
                case target:
                    there.add(target)
        return there

    def permitted_in(self, state: VmState) -> set[Operation]:
        """Return what is permitted in a vm_state, during some task or none."""
        if state is VmState.DELETED:
            return set()
        tasks = (task for task in TASKS if can_be_together(state, task))
        return set[Operation]().union(*(self.permitted[state, task] for task in tasks))

    def findings(self) -> Iterator[Finding]:
        only_deletion: set[Pair] = set()
        dead_ends: set[Pair] = set()
        for (state, task), operations in self.permitted.items():
            if not can_be_together(state, task):
                continue
            useful = {operation for operation in operations if CATALOGUE[operation].lane is not Lane.RECORD}
            if not useful and Operation.RESET_STATE not in operations:
                continue  # `deletion_lints` finds it
            if task != NO_TASK and not useful.difference(DELETIONS) and TASK_OPERATION[task] not in DELETIONS:
                only_deletion.add((state, task))
            elif (
                task == NO_TASK
                and state in self.inhabited - _ENDS
                and not any(map(_leads_on, useful.difference(DELETIONS)))
            ):
                dead_ends.add((state, task))
        if dead_ends:
            message = (
                f"Operations lead to {states_text(dead_ends)}, and from there only a deletion or a reset leads on."
            )
            yield finding("dead-end", self.about(self._refuser(dead_ends)), message)
        if only_deletion:
            states = states_text(only_deletion)
            message = f"If the task hangs, only a deletion or a reset gets the instance out of {states}."
            yield finding("only-deletion", self.about(self._refuser(only_deletion)), message)
        waiting = self._during_tasks(self._only_waits)
        if waiting:
            message = f"Delete only waits its turn in {states_text(waiting)}: if the task hangs, it waits for ever."
            yield finding("delete-waits", self.about(next(iter(waiting.values()))), message)
        silent = self._during_tasks(self._needs_silence)
        if silent:
            message = (
                f"Delete is denied in {states_text(silent)} as long as the task makes progress, be it for ever. Then "
                "only a reset leads on."
            )
            yield finding("delete-needs-silence", self.about(next(iter(silent.values()))), message)

    def about(self, rule: Rule | None) -> Rule | str:
        """Return the rule that a finding is about; if none of the policy's decides, the place of the first."""
        return rule if rule is not None and rule.source else self._rules[0].source

    def _during_tasks(self, found: Callable[[VmState, str], Rule | None]) -> dict[Pair, Rule]:
        """Return the states and tasks for which a rule is found, with this."""
        pairs = (pair for pair in self.permitted if pair[1] != NO_TASK and can_be_together(*pair))
        return {pair: rule for pair in pairs if (rule := found(*pair)) is not None}

    def _refuser(self, pairs: set[Pair], operations: Iterable[Operation] = Operation) -> Rule | None:
        """Return the rule that denies most in some states."""
        refused: Counter[str] = Counter()
        for state, task in pairs:
            for operation in operations:
                rule = self.decided(operation, state, task)
                if rule.verdict is Verdict.DENY:
                    refused[rule.id] += 1
        most = max(refused.values(), default=0)
        return next((rule for rule in (*self._rules, NO_RULE) if most and refused[rule.id] == most), None)

    def _needs_silence(self, state: VmState, task: str) -> Rule | None:
        """Return the rule that lets a deletion take over after silence only, if none lets it in before.

        None if the task is limited: it cannot make progress for ever.
        """
        if TASK_OPERATION[task] in DELETIONS or self._limits(TASK_OPERATION[task]):
            return None
        rules = [self.decided(one, state, task, silent_ms=0) for one in (*DELETIONS, Operation.SOFT_DELETE)]
        taking_over = [one for one in rules if one.verdict is Verdict.AFTER]
        # A deletion that is admitted behind the task is found by `_only_waits`.
        queued = any(one.verdict is Verdict.ADMIT for one in rules[: len(DELETIONS)])
        if queued or any(one.verdict is Verdict.PREEMPT for one in rules):
            return None
        if any(one.measured_from is MeasuredFrom.TASK_STARTED for one in taking_over):
            return None
        return next(iter(taking_over), None)

    def decided(
        self, operation: Operation, state: VmState, task: str, *, hard: bool = False, silent_ms: int = DURATION_MAX_MS
    ) -> Rule:
        """Return the rule for an administrator, with only a task outstanding that was silent for `silent_ms`."""
        key = (task if task == NO_TASK else TASK_OPERATION[task], hard, silent_ms)
        if key not in self._held:
            space = self._reaching.space
            plain = (
                space.choice("role", Role.ADMIN.__eq__),
                space.choice("hard", hard.__eq__),
                space.silent_for(silent_ms),
            )
            self._held[key] = self._reaching.held_when(task, *plain)
        number = self._reaching.first(Cell(operation, state, task), self._held[key])
        return NO_RULE if number is None else self._rules[number]

    def _only_waits(self, state: VmState, task: str) -> Rule | None:
        """Return the rule that queues a deletion, if none lets it preempt or take over."""
        rules = [self.decided(operation, state, task) for operation in DELETIONS]
        if any(rule.verdict in (Verdict.PREEMPT, Verdict.AFTER) for rule in rules):
            return None
        return next((rule for rule in rules if rule.verdict is Verdict.ADMIT), None)


def _leads_on(operation: Operation) -> bool:
    entry = CATALOGUE[operation]
    return entry.lane is Lane.STATE and entry.to is not Target.SAME and entry.to not in _ENDS
