"""Which component changes are served beside which state changes: all pairs, either one first."""

from __future__ import annotations

import pytest

from interlock.core.lifecycle import take
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.records import Instance, Request, Status

STATE = [operation for operation, entry in CATALOGUE.items() if entry.lane is Lane.STATE]
COMPONENT = [operation for operation, entry in CATALOGUE.items() if entry.lane is Lane.COMPONENT]


def request(operation: Operation, status: Status) -> Request:
    return Request(
        id=operation.value,
        instance_id="vm",
        operation=operation,
        requested_by="tester",
        rule="rule",
        admitted_at_ms=0,
        status=status,
    )


def instance(first: Operation, then: Operation) -> Instance:
    both = (request(first, Status.IN_FLIGHT), request(then, Status.QUEUED))
    return Instance(id="vm", name="vm", project="default", host="here", outstanding=both)


@pytest.mark.parametrize("component", COMPONENT)
@pytest.mark.parametrize("state", STATE)
def test_what_may_be_beside_is_served_and_what_may_not_waits(state: Operation, component: Operation) -> None:
    beside = state in CATALOGUE[component].compatible_with
    served = take(instance(state, component), Lane.COMPONENT, 1).answer
    assert (served is not None) is beside
    served = take(instance(component, state), None, 1).answer
    assert (served is not None) is beside


def test_there_are_pairs_of_both_kinds() -> None:
    pairs = [(state, component) for state in STATE for component in COMPONENT]
    beside = [pair for pair in pairs if pair[0] in CATALOGUE[pair[1]].compatible_with]
    assert {component for _, component in beside} == set(COMPONENT)
    assert 0 < len(beside) < len(pairs)
