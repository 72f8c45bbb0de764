"""Symmetry reduction: classes of operations and phases that neither a policy nor the catalogue distinguishes.

The model checker explores one member of each class. Why that loses no violation:

* Operations: their rows of the gate, target states, lanes and compatibility are equal, so that exchanging one for the
  other in every request and submission maps transitions to transitions. What differs is only whether the same operation
  is outstanding already, of which rules see no more than the mask; a preempting operation, which is queued only once,
  is a class of its own.
* Phases: a rule sees a phase only through the task states that it names. A phase that no rule distinguishes from the
  one before leads to the same answers, and a report of it is a sign of life.
* Callers (`Alphabet.callers`): a rule sees a caller only through whether all of its conditions on callers hold, and
  that is equal. A queued request is judged by `judge_in` alone, on a settled instance, where rules about busy, locked
  or blocked instances do not hold; callers that only such rules distinguish are queued as one.
* Locks: where every rule about a lock above the caller's role denies, a lock with a higher role leaves fewer answers
  that admit to some and the same to others, so that no state is reached that a lock with the least role does not lead
  to, and whoever can delete under that can delete with the higher role.
* Rules about held requests that only refuse, and decide no deletion and no reset, are left out: a held request is
  admitted like a submission at that time, so that no state is added, and no deletion is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from interlock.core.operations import CATALOGUE, Entry, Lane, Operation
from interlock.core.policy import CompiledPolicy, Verdict


def distinct_operations(
    policy: CompiledPolicy, operations: Iterable[Operation], *, hosts_vary: bool = True
) -> tuple[Operation, ...]:
    """Return the first operation of each class that neither the policy nor the catalogue distinguishes.

    Evacuation is left out where the host is always reachable: it is refused there before any rule (`HOST_NOT_FENCED`).
    """
    first: dict[Any, Operation] = {}
    for operation in operations:
        if hosts_vary or operation is not Operation.EVACUATE:
            first.setdefault(_signature(policy, operation), operation)
    return tuple(first.values())


def _signature(policy: CompiledPolicy, operation: Operation) -> Any:
    """Return everything by which a decision could depend on the operation."""
    entry = CATALOGUE[operation]
    # The same preempting request is queued only once, so that two equal operations differ from one submitted twice.
    preempts = any(rule.verdict is Verdict.PREEMPT and operation in rule.operations for rule in policy.rules)
    if entry.lane is Lane.RECORD or preempts:
        return operation
    soft, hard = distinct_phases(policy, entry)
    return (
        (entry.lane, entry.to, entry.on_failure, entry.remembers, entry.interruptible, entry.compatible_with),
        entry.sources if entry.lane is Lane.STATE else None,
        tuple(operation in other.compatible_with for other in CATALOGUE.values()),
        tuple((operation in rule.operations, operation in (rule.outstanding or ())) for rule in policy.rules),
        tuple(_phase_signature(policy, phase) for phase in soft),
        tuple(_phase_signature(policy, phase) for phase in hard),
    )


def distinct_phases(policy: CompiledPolicy, entry: Entry) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the phases and the hard phases, without those that no rule distinguishes from the one before.

    The hard phases are empty if no rule distinguishes them from the soft ones.
    """
    soft, hard = _distinct(policy, entry.phases), _distinct(policy, entry.hard_phases)
    alike = [_phase_signature(policy, phase) for phase in soft] == [_phase_signature(policy, phase) for phase in hard]
    return soft, () if alike else hard


def _distinct(policy: CompiledPolicy, phases: tuple[str, ...]) -> tuple[str, ...]:
    kept: list[str] = []
    for phase in phases:
        if not kept or _phase_signature(policy, phase) != _phase_signature(policy, kept[-1]):
            kept.append(phase)
    return tuple(kept)


def _phase_signature(policy: CompiledPolicy, phase: str) -> tuple[bool, ...]:
    return tuple(phase in rule.task_states for rule in policy.rules if rule.task_states is not None)
