"""What a policy and the catalogue cannot tell apart, so that a walk needs to look at one of each kind only.

Operations that every rule and every catalogue entry treat alike lead to states that differ in a name only; so do phases
that the same rules mention, and ages between the same two moments that the policy names. Walking is not here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from interlock.core.operations import CATALOGUE, Entry, Lane, Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Rule, Verdict
from interlock.core.records import SERVED, Instance, Request
from interlock.core.states import NO_TASK, VmState


def told_apart(policy: CompiledPolicy, operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """One operation for each group that neither the policy nor the catalogue tells apart; the first of each."""
    first: dict[Any, Operation] = {}
    for operation in operations:
        first.setdefault(_mark(policy, operation), operation)
    return tuple(first.values())


def _mark(policy: CompiledPolicy, operation: Operation) -> Any:
    """Everything by which a decision could depend on the operation."""
    entry = CATALOGUE[operation]
    # The same preempting request waits once only, so that two kinds alike are not the same as one kind twice.
    preempts = any(rule.verdict is Verdict.PREEMPT and operation in rule.operations for rule in policy.rules)
    if entry.lane is Lane.RECORD or preempts:
        return operation
    soft, hard = phases_told_apart(policy, entry)
    return (
        (entry.lane, entry.to, entry.on_failure, entry.remembers, entry.interruptible, entry.compatible_with),
        entry.sources if entry.lane is Lane.STATE else None,
        tuple(operation in other.compatible_with for other in CATALOGUE.values()),
        tuple((operation in rule.operations, operation in (rule.outstanding or ())) for rule in policy.rules),
        tuple(_phase_mark(policy, phase) for phase in soft),
        tuple(_phase_mark(policy, phase) for phase in hard),
    )


def phases_told_apart(policy: CompiledPolicy, entry: Entry) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The phases, and the hard ones, without those that no rule tells from the one before.

    The hard ones are empty where they are like the others from first to last.
    """
    soft, hard = _distinct(policy, entry.phases), _distinct(policy, entry.hard_phases)
    alike = [_phase_mark(policy, phase) for phase in soft] == [_phase_mark(policy, phase) for phase in hard]
    return soft, () if alike else hard


def _distinct(policy: CompiledPolicy, phases: tuple[str, ...]) -> tuple[str, ...]:
    kept: list[str] = []
    for phase in phases:
        if not kept or _phase_mark(policy, phase) != _phase_mark(policy, kept[-1]):
            kept.append(phase)
    return tuple(kept)


def _phase_mark(policy: CompiledPolicy, phase: str) -> tuple[bool, ...]:
    return tuple(phase in rule.task_states for rule in policy.rules if rule.task_states is not None)


class Ages:
    """The moments at which time alone makes a difference, in each state."""

    def __init__(self, policy: CompiledPolicy, operations: Iterable[Operation]) -> None:
        wanted = frozenset(operations)
        self._rules = [rule for rule in policy.rules if rule.operations & wanted and _is_timed(rule)]
        self._bounds: dict[tuple[VmState, str], tuple[list[int], list[int]]] = {}

    def bounds_ms(self, vm_state: VmState, task_state: str) -> tuple[list[int], list[int]]:
        """The ages without life, and the ages since it was taken, from which some rule answers otherwise."""
        key = (vm_state, task_state)
        known = self._bounds.get(key)
        if known is None:
            known = self._bounds[key] = self._collect(*key)
        return known

    def _collect(self, vm_state: VmState, task_state: str) -> tuple[list[int], list[int]]:
        silent: set[int] = set()
        running: set[int] = set()
        for rule in self._rules:
            if rule.vm_states is not None and vm_state not in rule.vm_states:
                continue
            if rule.task_states is not None and task_state not in rule.task_states:
                continue
            if rule.silent_ms_min is not None:
                silent.add(rule.silent_ms_min)
            if rule.threshold_ms is not None:
                (silent if rule.measured_from is MeasuredFrom.LAST_PROGRESS else running).add(rule.threshold_ms)
        return sorted(silent), sorted(running)

    def moments_ms(self, instance: Instance, now_ms: int) -> Iterator[int]:
        """When the age on which a submission is judged now passes its next bounds."""
        silent, running = self.bounds_ms(instance.vm_state, instance.task_state)
        silent_since_ms, running_since_ms = _since_ms(instance)
        yield from (silent_since_ms + bound for bound in silent if silent_since_ms + bound > now_ms)
        yield from (running_since_ms + bound for bound in running if running_since_ms + bound > now_ms)

    def idle_class(self, instance: Instance, now_ms: int) -> tuple[int, int]:
        """Between which bounds the age of an instance is for which nothing is being served."""
        if any(request.status in SERVED for request in instance.outstanding):
            return (0, 0)
        silent, running = self.bounds_ms(instance.vm_state, NO_TASK)
        age_ms = now_ms - instance.updated_at_ms
        return bisect_right(silent, age_ms), bisect_right(running, age_ms)

    def served_class(self, instance: Instance, request: Request, now_ms: int) -> tuple[int, int]:
        """Between which bounds the age of a request is; nothing depends on that of one that waits."""
        if request.status not in SERVED:
            return (0, 0)
        task_state = (request.phase or NO_TASK) if request.lane is Lane.STATE else NO_TASK
        silent, running = self.bounds_ms(instance.vm_state, task_state)
        taken_at_ms = request.taken_at_ms or 0
        return (
            bisect_right(silent, now_ms - (request.last_progress_at_ms or taken_at_ms)),
            bisect_right(running, now_ms - taken_at_ms),
        )


def _is_timed(rule: Rule) -> bool:
    return rule.silent_ms_min is not None or rule.threshold_ms is not None


def _since_ms(instance: Instance) -> tuple[int, int]:
    serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
    if serving is None:
        return instance.updated_at_ms, instance.updated_at_ms
    taken_at_ms = serving.taken_at_ms or 0
    return serving.last_progress_at_ms or taken_at_ms, taken_at_ms
