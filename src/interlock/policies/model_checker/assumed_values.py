"""Conditions that a search does not vary: each is replaced by its answer to the value that the search assumes."""

from __future__ import annotations

import msgspec

from interlock.core.conditions import CONDITIONS, Condition
from interlock.core.policy import CompiledPolicy, Rule
from interlock.core.states import VmState


def with_assumed_values(policy: CompiledPolicy) -> tuple[CompiledPolicy, tuple[str, ...]]:
    """Return the policy without the conditions on values that are assumed, and the assumptions as sentences.

    A rule keeps the vm_states in which its conditions hold for the assumed values; without any it is left out. So a
    counterexample is one of the whole policy, for instances and requests with those values.
    """
    assumed = [one for one in CONDITIONS if one.assumed is not None and one.wanted(policy.rules)]
    if not assumed:
        return policy, ()
    rules = tuple(kept for rule in policy.rules if (kept := _with_answers(rule, assumed)) is not None)
    compiled = CompiledPolicy(msgspec.structs.replace(policy.policy, rules=rules))
    return compiled, tuple(dict.fromkeys(one.assumption for one in assumed))


def _with_answers(rule: Rule, assumed: list[Condition]) -> Rule | None:
    """Return a rule without the conditions that are assumed; None if it cannot hold then."""
    about = [(one, wanted) for one in assumed if (wanted := one.of(rule)) is not None]
    states = frozenset(VmState) - {VmState.DELETED} if rule.vm_states is None else rule.vm_states
    left = frozenset(state for state in states if all(_holds(one, wanted, state) for one, wanted in about))
    if not left:
        return None
    fields = {one.field: None for one, _ in about}
    return msgspec.structs.replace(rule, vm_states=rule.vm_states if left == states else left, **fields)


def _holds(condition: Condition, wanted: object, vm_state: VmState) -> bool:
    assert condition.assumed is not None, "the condition is one of those that are assumed"
    return bool(condition.kind.test(wanted)(condition.assumed(vm_state)))
