"""Whether something can be done about an instance in every state: what leads out of it, and whether it can be deleted.

These are looked at cell by cell, without walking: what a hung operation does to a queue is `exploring`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Final

from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, Landing, Lane, Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict, View
from interlock.core.states import LEFT_AT_END, NO_TASK, VmState
from interlock.policies.durations import DURATION_MAX_MS
from interlock.policies.findings import Finding, Severity, states_text
from interlock.policies.reaching import TASKS, Cell, Reaching, can_be_together
from interlock.policies.regions import Literal

Pair = tuple[VmState, str]

DELETIONS: Final = frozenset({Operation.DELETE, Operation.FORCE_DELETE})
_ENDS: Final = frozenset({VmState.DELETED, VmState.MIGRATED_OUT})
_STATES: Final = tuple(state for state in VmState if state is not VmState.DELETED)
_COMPONENT_KINDS: Final = sum(BIT[entry.operation] for entry in CATALOGUE.values() if entry.lane is Lane.COMPONENT)


class WaysOut:
    """The search for states of one policy out of which nothing leads."""

    def __init__(self, policy: Policy, reaching: Reaching) -> None:
        self._compiled = CompiledPolicy(policy)
        self._reaching = reaching
        self._rules = reaching.rules

    @cached_property
    def permitted(self) -> dict[Pair, set[Operation]]:
        """What an administrator may ever do in each pair of vm_state and task_state, now or after a time.

        The instance is unlocked and blocks nothing, and nothing is outstanding but what is being served.
        """
        found: dict[Pair, set[Operation]] = {(state, task): set() for state in _STATES for task in TASKS}
        for cells in self._reaching.alike:
            if self._ever(cells[0]):
                for cell in cells:
                    found[cell.vm_state, cell.task_state].add(cell.operation)
        return found

    def _ever(self, cell: Cell) -> bool:
        reaching = self._reaching
        served = _COMPONENT_KINDS if cell.task_state == NO_TASK else BIT[TASK_OPERATION[cell.task_state]]
        plain = (reaching.role("admin"), reaching.flag("blocked", value=False), reaching.only_outstanding(served))
        return any(permits_somewhen(reaching, number, cell, *plain) for number in reaching.asked(cell))

    @cached_property
    def inhabited(self) -> frozenset[VmState]:
        """The vm_states that an instance can come to under the policy, unless an administrator puts it there."""
        found = {VmState.BUILDING}
        pending = [VmState.BUILDING]
        while pending:
            state = pending.pop()
            for there in self._led_to(state, found) - found:
                found.add(there)
                pending.append(there)
            if not pending:
                # What undoes something leads back to wherever that was asked, so look once more at all of them.
                pending = [one for one in found if self._led_to(one, found) - found]
        return frozenset(found)

    def _led_to(self, state: VmState, found: Iterable[VmState]) -> set[VmState]:
        there = {VmState.STOPPED, VmState.ERROR} if state in LEFT_AT_END else set()
        for operation in self._permitted_in(state):
            entry = CATALOGUE[operation]
            if entry.on_failure is not None:
                there.add(entry.on_failure)
            match entry.to:
                case Landing.SAME:
                    pass
                case Landing.REPAIRED:
                    there |= {VmState.ACTIVE} if state is VmState.ERROR else set()
                case Landing.PRIOR | Landing.PRESENT:
                    there |= {VmState.ACTIVE, *(each for each in found if each not in _ENDS)}
                case target:
                    there.add(target)
        return there

    def _permitted_in(self, state: VmState) -> set[Operation]:
        if state is VmState.DELETED:
            return set()
        tasks = (task for task in TASKS if can_be_together(state, task))
        return set[Operation]().union(*(self.permitted[state, task] for task in tasks))

    def findings(self) -> Iterator[Finding]:
        nothing: set[Pair] = set()
        only_deletion: set[Pair] = set()
        dead_ends: set[Pair] = set()
        for (state, task), operations in self.permitted.items():
            if not can_be_together(state, task):
                continue
            useful = {operation for operation in operations if CATALOGUE[operation].lane is not Lane.RECORD}
            if not useful and Operation.RESET_STATE not in operations:
                nothing.add((state, task))
            elif task != NO_TASK and not useful - DELETIONS and TASK_OPERATION[task] not in DELETIONS:
                only_deletion.add((state, task))
            elif task == NO_TASK and state in self.inhabited - _ENDS and not any(map(_leads_on, useful - DELETIONS)):
                dead_ends.add((state, task))
        yield from self._told(
            nothing, Severity.ERROR, "no-exit",
            "Nothing is ever admitted, now or later, when the instance is {}: who comes there stays there.",
            "Admit delete there, and what repairs the instance.",
        )  # fmt: skip
        yield from self._told(
            dead_ends, Severity.WARNING, "dead-end",
            "Operations lead to {}, and from there only a deletion or a reset leads on.",
            "Admit what brings the instance back, such as start or rebuild, if it is meant to come back.",
        )  # fmt: skip
        yield from self._told(
            only_deletion, Severity.NOTE, "only-deletion",
            "If what is being done hangs, only a deletion or a reset gets the instance out of {}.",
            'A rule with verdict = "after" lets something take over from what has shown no life for long.',
        )  # fmt: skip
        yield from self._undeletable(nothing)

    def _told(
        self, pairs: set[Pair], severity: Severity, code: str, message: str, remedy: str
    ) -> Iterator[Finding]:  # fmt: skip
        if pairs:
            rule = self._refuser(pairs)
            yield Finding(
                severity=severity,
                code=code,
                rule=rule.id if rule else None,
                place=self._place(rule),
                message=message.format(states_text(pairs)),
                remedy=remedy,
            )

    def _place(self, rule: Rule | None) -> str:
        return rule.source if rule is not None and rule.source else self._rules[0].source

    def _refuser(self, pairs: set[Pair], operations: Iterable[Operation] = Operation) -> Rule | None:
        """The rule that most often refuses something there."""
        refused: Counter[str] = Counter()
        rules: dict[str, Rule] = {}
        for state, task in pairs:
            for operation in operations:
                rule = self._compiled.decide(_plain(operation, state, task))
                if rule.verdict is Verdict.DENY:
                    refused[rule.id] += 1
                    rules[rule.id] = rule
        return rules[refused.most_common(1)[0][0]] if refused else None

    def _undeletable(self, known: set[Pair]) -> Iterator[Finding]:
        """Where an instance cannot be deleted, which is the one thing that must work everywhere (law 5)."""
        refused: dict[tuple[str, str], set[Pair]] = {}
        waiting: dict[Pair, Rule] = {}
        for state in _STATES:
            for task in TASKS:
                if (state, task) in known or not can_be_together(state, task):
                    continue
                for condition, views in self._circumstances(state, task):
                    rules = [self._compiled.decide(view) for view in views]
                    if not any(map(_gets_there, rules, views)):
                        refused.setdefault((rules[0].id, condition), set()).add((state, task))
                if task != NO_TASK and (rule := self._only_waits(state, task)) is not None:
                    waiting[state, task] = rule
        by_id = {rule.id: rule for rule in self._rules}
        for (rule_id, condition), pairs in refused.items():
            yield Finding(
                severity=Severity.ERROR,
                code="delete-refused",
                rule=rule_id,
                place=self._place(by_id.get(rule_id)),
                message=f"Neither delete nor force_delete is ever admitted when the instance is {states_text(pairs)}"
                f"{condition}.",
                remedy='Admit delete there: verdict = "preempt" at once, or "after" with a threshold.',
            )
        if waiting:
            first = next(iter(waiting.values()))
            yield Finding(
                severity=Severity.WARNING,
                code="delete-waits",
                rule=first.id,
                place=self._place(first),
                message=f"Delete only waits its turn in {states_text(waiting)}: if what is being done hangs, it waits "
                "for ever.",
                remedy='Give delete the verdict "preempt", or "after" with a threshold.',
            )

    def decided(
        self, operation: Operation, state: VmState, task: str, *, hard: bool, silent_ms: int = DURATION_MAX_MS
    ) -> Rule:
        """The rule for an administrator there, with nothing outstanding but what has been silent for so long."""
        return self._compiled.decide(_plain(operation, state, task, hard=hard, silent_ms=silent_ms))

    def _circumstances(self, state: VmState, task: str) -> Iterator[tuple[str, list[View]]]:
        """What may be the case there, in words, and the views of everybody who could delete."""
        wanted = {number for operation in DELETIONS for number in self._asked(operation, state, task)}
        kinds = {kind for number in wanted for kind in self._rules[number].outstanding or ()}
        for launched in (True, False):
            if not launched and all(self._rules[number].launched is None for number in wanted):
                continue
            for reachable in (True, False):
                if not reachable and all(self._rules[number].host_reachable is None for number in wanted):
                    continue
                for kind in (None, *(one for one in Operation if one in kinds)):
                    words = [] if launched else [" and has never run"]
                    words += [] if reachable else [" and its host is out of reach"]
                    words += [] if kind is None else [f" and {kind.value} is outstanding"]
                    more = 0 if kind is None else BIT[kind]
                    yield (
                        "".join(words),
                        [
                            _plain(operation, state, task, more=more, launched=launched, reachable=reachable, hard=hard)
                            for operation in (Operation.DELETE, Operation.FORCE_DELETE)
                            for hard in (False, True)
                        ],
                    )

    def _asked(self, operation: Operation, state: VmState, task: str) -> tuple[int, ...]:
        return self._reaching.asked(Cell(operation, state, task))

    def _only_waits(self, state: VmState, task: str) -> Rule | None:
        """The rule that lets a deletion wait there, if none does better."""
        rules = [self._compiled.decide(_plain(operation, state, task)) for operation in DELETIONS]
        if any(rule.verdict in (Verdict.PREEMPT, Verdict.AFTER) for rule in rules):
            return None
        return next((rule for rule in rules if rule.verdict is Verdict.ADMIT), None)


def permits_somewhen(reaching: Reaching, number: int, cell: Cell, *more: Literal) -> View | None:
    """A view in which a rule lets the operation through, at once or when its threshold has passed."""
    rule = reaching.rules[number]
    if rule.verdict in (Verdict.ADMIT, Verdict.PREEMPT):
        return reaching.decides(number, cell, *more)
    if rule.verdict is not Verdict.AFTER:
        return None
    if rule.measured_from is MeasuredFrom.LAST_PROGRESS:
        more = (*more, reaching.silent_for(rule.threshold_ms or 0))
    return reaching.decides(number, cell, *more)


def _gets_there(rule: Rule, view: View) -> bool:
    if rule.verdict is Verdict.REDUNDANT:
        # It is on its way: the deletion that is outstanding already will get there, or be taken over in its turn.
        return bool(view.outstanding & sum(BIT[operation] for operation in DELETIONS))
    return rule.verdict is not Verdict.DENY


def _leads_on(operation: Operation) -> bool:
    entry = CATALOGUE[operation]
    return entry.lane is Lane.STATE and entry.to is not Landing.SAME and entry.to not in _ENDS


def _plain(
    operation: Operation,
    state: VmState,
    task: str,
    *,
    more: int = 0,
    launched: bool = True,
    reachable: bool = True,
    hard: bool = False,
    silent_ms: int = DURATION_MAX_MS,
) -> View:
    """What an administrator's submission looks like, unless said otherwise when nobody has shown life for ever."""
    served = 0 if task == NO_TASK else BIT[TASK_OPERATION[task]]
    return View(
        operation=operation,
        vm_state=state,
        task_state=task,
        outstanding=served | more,
        role="admin",
        host_reachable=reachable,
        hard=hard,
        silent_ms=silent_ms,
        running_ms=silent_ms,
        launched=launched,
    )
