"""How long a decision takes in policies of other lengths: rules spread over the cells, or piled up in each."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from interlock.bench.decisions import microseconds
from interlock.bench.fleet import scaled
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.states import VmState
from interlock.core.views import View

SHORT: Final = 20
LONG: Final = 1_500
_NUMBER: Final = 20_000
_STATES: Final = tuple(state for state in VmState if state is not VmState.DELETED)
_LAST: Final = Rule(id="last", operations=frozenset(Operation), verdict=Verdict.ADMIT)


def measure(_folder: Path, scale: float = 1.0) -> dict[str, float]:
    number = scaled(_NUMBER, scale)
    return {
        "decide_short_policy_us": _across(spread(SHORT), number),
        "decide_long_policy_us": _across(spread(LONG), number),
        "decide_piled_policy_us": _across(piled(LONG), number),
    }


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


def _across(policy: CompiledPolicy, number: int) -> float:
    """The mean of one decision of each operation in each of two states, so that no cell is a lucky one."""
    views = [
        View(operation=operation, vm_state=vm_state)
        for operation in Operation
        for vm_state in (VmState.ACTIVE, VmState.STOPPED)
    ]

    def decide_all() -> None:
        for view in views:
            policy.decide(view)

    decide_all()
    return round(microseconds(decide_all, max(1, number // (20 * len(views)))) / len(views), 3)
