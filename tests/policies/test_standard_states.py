"""What `standard` answers in each state of an instance of which nothing is being done."""

from __future__ import annotations

import pytest
from policy_samples import Play, instance, said, serving

from interlock.core.operations import CATALOGUE, Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.records import Instance
from interlock.core.request_queue import permits
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.core.views import View
from interlock.policies.language.loader import compile_named

O = Operation  # noqa: E741
V = VmState


@pytest.fixture(scope="module")
def standard() -> CompiledPolicy:
    return compile_named("standard")


def ask(policy: CompiledPolicy, start: Instance, operation: Operation, **how: bool | str) -> tuple[str, str | None]:
    return said(Play(policy, start).submit(operation, **how))  # type: ignore[arg-type]


def test_nothing_is_admitted_that_the_catalogue_says_cannot_be_performed(standard: CompiledPolicy) -> None:
    """One exception, on purpose: a start of what was resized while stopped, so that it can be asked for in one go."""
    excepted = {(O.START, V.RESIZED)}
    for vm_state in V:
        for operation in O:
            for hard in (False, True):
                rule = standard.decide(View(operation=operation, vm_state=vm_state, role=Role.ADMIN, hard=hard))
                if permits(rule) and (operation, vm_state) not in excepted:
                    assert vm_state in CATALOGUE[operation].sources, (operation, vm_state)


@pytest.mark.parametrize(
    ("vm_state", "operation", "expected"),
    [
        (V.ACTIVE, O.START, ("redundant", "already_active")),
        (V.ACTIVE, O.UNPAUSE, ("redundant", "already_active")),
        (V.ACTIVE, O.RESUME, ("redundant", "already_active")),
        (V.ACTIVE, O.UNRESCUE, ("denied", "not_in_this_state")),
        (V.STOPPED, O.STOP, ("redundant", "already_stopped")),
        (V.STOPPED, O.REBOOT, ("denied", "hard_reboot_only")),
        (V.PAUSED, O.PAUSE, ("redundant", "already_paused")),
        (V.PAUSED, O.START, ("denied", "not_in_this_state")),
        (V.SUSPENDED, O.SUSPEND, ("redundant", "already_suspended")),
        (V.ERROR, O.START, ("admitted", None)),
        (V.ERROR, O.STOP, ("admitted", None)),
        (V.ERROR, O.RESCUE, ("admitted", None)),
        (V.BUILDING, O.START, ("admitted", None)),
        (V.BUILDING, O.STOP, ("admitted", None)),
        (V.BUILDING, O.ATTACH_VOLUME, ("denied", "not_in_this_state")),
        (V.MIGRATED_OUT, O.START, ("denied", "migrated_out")),
        (V.SOFT_DELETED, O.RESTORE, ("admitted", None)),
        (V.DELETED, O.DELETE, ("denied", "deleted")),
    ],
)
def test_a_settled_instance_answers(
    standard: CompiledPolicy, vm_state: VmState, operation: Operation, expected: tuple[str, str | None]
) -> None:
    assert ask(standard, instance(vm_state), operation) == expected


def test_what_is_evacuated_must_be_out_of_reach(standard: CompiledPolicy) -> None:
    assert ask(standard, instance(V.ACTIVE), O.EVACUATE) == ("denied", "host_reachable")
    play = Play(standard, serving(V.ACTIVE, "rebooting"))
    assert said(play.submit(O.EVACUATE, host_reachable=False)) == ("admitted", None)
    play.advance(1)
    taken = play.take()
    assert taken is not None
    assert taken.operation is O.EVACUATE


def test_every_refusal_has_a_reason_of_its_own_and_says_why(standard: CompiledPolicy) -> None:
    for rule in standard.rules:
        if rule.verdict is not Verdict.ADMIT and rule.verdict is not Verdict.PREEMPT:
            assert rule.reason, rule.id
            assert rule.because, rule.id
