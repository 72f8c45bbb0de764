"""Policies of any length to measure with, in two shapes: their rules spread over the cells, or piled up in each."""

from __future__ import annotations

from typing import Final

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.states import VmState

SHORT: Final = 20
LONG: Final = 1_500
_STATES: Final = tuple(state for state in VmState if state is not VmState.DELETED)
_LAST: Final = Rule(id="last", operations=frozenset(Operation), verdict=Verdict.ADMIT)


def spread(length: int) -> CompiledPolicy:
    """Each rule is about one operation in one vm_state, and has one further condition."""
    operations = tuple(Operation)
    rules = tuple(
        Rule(
            id=f"rule-{number}",
            operations=frozenset({operations[number % len(operations)]}),
            vm_states=frozenset({_STATES[number // len(operations) % len(_STATES)]}),
            locked=True,
            verdict=Verdict.DENY,
        )
        for number in range(length - 1)
    )
    return CompiledPolicy(Policy(name=f"spread-{length}", rules=(*rules, _LAST)))


def piled(length: int) -> CompiledPolicy:
    """Every rule is about every operation in every state and has a tag of its own: nothing can be looked up."""
    rules = tuple(
        Rule(id=f"rule-{number}", operations=frozenset(Operation), tags=frozenset({f"t{number}"}), verdict=Verdict.DENY)
        for number in range(length - 1)
    )
    return CompiledPolicy(Policy(name=f"piled-{length}", rules=(*rules, _LAST)))
