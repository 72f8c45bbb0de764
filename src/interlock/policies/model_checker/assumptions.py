"""What a search holds fixed, as sentences that are shown with its result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from interlock.core.conditions import CONDITIONS, Condition, Subject
from interlock.core.operations import Operation
from interlock.core.policy import Rule
from interlock.core.states import VmState
from interlock.policies.laws import LAWS, SEARCHED_LAWS
from interlock.policies.model_checker.actions import EXPLORED, RESET_TARGETS
from interlock.policies.model_checker.model import Model

_NAMED_MAX: Final = 3
"""How many rules are named for one assumption."""


def assumptions(model: Model, tried: Iterable[Operation], outstanding_max: int) -> tuple[str, ...]:
    """Return what the search of a model holds fixed, one sentence each.

    `tried` are the operations that were asked for. A condition that no rule has is no assumption.
    """
    return tuple(_sentences(model, frozenset(tried), outstanding_max))


def _sentences(model: Model, tried: frozenset[Operation], outstanding_max: int) -> Iterator[str]:
    alphabet = model.alphabet
    rules = alphabet.policy.rules
    yield f"An instance begins in {_or(model.starts)} with nothing outstanding."
    requests = "request is" if outstanding_max == 1 else "requests are"
    yield f"At most {outstanding_max} {requests} outstanding, and one deletion more."
    yield f"Every caller has the role {alphabet.role}."
    for condition in CONDITIONS:
        if condition.reads not in EXPLORED and condition.subject is not Subject.CALLER:
            about = [rule for rule in rules if condition.of(rule) is not None]
            if about:
                yield _fixed(condition, about)
    submitted = {submission.operation for submission in alphabet.submissions}
    if Operation.EVACUATE in tried - submitted:
        yield "The host stays reachable, and nobody submits an evacuation."
    left_out = frozenset(Operation) - tried
    if left_out:
        yield f"Nobody submits {', '.join(operation.value for operation in Operation if operation in left_out)}."
    if Operation.RESET_STATE in submitted:
        yield f"reset_state leads to {_or(RESET_TARGETS)} only."
    if model.faults_max is not None:
        yield f"At most {model.faults_max} operations fail or guests end."
    yield "A worker that makes no progress stays silent; one that makes progress ends."
    yield "The deletion that is served last succeeds."
    if any(not rule.in_turn for rule in rules):
        yield "A request that a rule with `in_turn = false` admits may be cancelled: law 2 is not checked for it."
    elsewhere = [str(law) for law in LAWS if law not in SEARCHED_LAWS]
    yield f"Laws {', '.join(elsewhere)} depend on the core and not on the policy: the tests of the core check them."


def _or(states: Iterable[VmState]) -> str:
    return " or ".join(state.value for state in states)


def _fixed(condition: Condition, about: list[Rule]) -> str:
    """Return the sentence about a condition whose value does not vary, with the rules that name another value."""
    named = [rule.id for rule in about[:_NAMED_MAX]]
    more = f" and {len(about) - _NAMED_MAX} more" if len(about) > _NAMED_MAX else ""
    value = condition.kind.found(condition.usual)
    return f"`{condition.key}` is always {value}; it is a condition of {', '.join(named)}{more}."
