"""The policy in force gives way to an earlier one for what that one admitted, and for nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Instance, Request
from interlock.core.request_queue import permits
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import View
from interlock.policies.active_policy import Earlier, PolicyInForce
from interlock.policies.language.loader import compile_named

NAMES = ("standard", "take2", "propolis")
COMPILED = {name: compile_named(name) for name in NAMES}


def instance(*admitted_at_ms: int) -> Instance:
    """An instance for which requests wait that were admitted then."""
    waiting = tuple(
        Request(
            id=f"r{place}",
            instance_id="i",
            operation=Operation.REBOOT,
            requested_by="someone",
            rule="some",
            admitted_at_ms=at_ms,
        )
        for place, at_ms in enumerate(admitted_at_ms)
    )
    return Instance(id="i", name="i", project="p", host="h", vm_state=VmState.ACTIVE, outstanding=waiting)


def switched(*untils_ms: int) -> PolicyInForce:
    """`propolis`, after as many others as there are moments until which they were in force."""
    in_force = PolicyInForce(COMPILED["standard"])
    others = [COMPILED["standard"], COMPILED["take2"]]
    earlier = tuple(Earlier(policy, until) for policy, until in zip(others, untils_ms, strict=False))
    in_force.replace(COMPILED["propolis"], earlier)
    return in_force


@pytest.mark.parametrize(
    ("admitted_at_ms", "bound"),
    [((), False), ((30,), False), ((21, 30), False), ((20,), True), ((30, 5), True)],
)
def test_an_earlier_policy_binds_while_something_waits_that_it_may_have_admitted(
    admitted_at_ms: tuple[int, ...], bound: bool
) -> None:
    in_force = switched(10, 20)
    judged_by = in_force.for_waiting(instance(*admitted_at_ms))
    assert (judged_by is not in_force.compiled) is bound


def test_what_is_asked_for_now_is_never_judged_by_an_earlier_one() -> None:
    in_force = switched(10, 20)
    assert in_force.compiled is COMPILED["propolis"]


def test_a_switch_that_keeps_nothing_leaves_no_earlier_policy() -> None:
    in_force = switched(10, 20)
    in_force.replace(COMPILED["take2"])
    assert in_force.for_waiting(instance(0)) is COMPILED["take2"]


views = st.builds(
    View,
    operation=st.sampled_from(list(Operation)),
    vm_state=st.sampled_from(list(VmState)),
    task_state=st.just(NO_TASK),
    role=st.sampled_from(["member", "admin", "reader"]),
    hard=st.booleans(),
)


@given(view=views, oldest_ms=st.integers(0, 30))
def test_a_request_stays_where_any_policy_that_may_have_admitted_it_permits_it(view: View, oldest_ms: int) -> None:
    in_force = switched(10, 20)
    decided = in_force.for_waiting(instance(30, oldest_ms)).decide(view)
    own = COMPILED["propolis"].decide(view)
    asked: list[CompiledPolicy] = [COMPILED["propolis"]]
    asked += [COMPILED["standard"]] if oldest_ms <= 10 else []
    asked += [COMPILED["take2"]] if oldest_ms <= 20 else []
    assert permits(decided) == any(permits(policy.decide(view)) for policy in asked)
    if permits(own) or not permits(decided):
        assert decided is own


def test_two_instances_with_promises_of_different_age_are_judged_by_different_policies() -> None:
    in_force = switched(10, 20)
    old, young = instance(5), instance(15)
    assert in_force.for_waiting(old) is not in_force.for_waiting(young)
    assert in_force.for_waiting(old) is in_force.for_waiting(replace(old, generation=9))
