"""Which VMs with outstanding requests could not be deleted any more after a policy switch."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from interlock.core import admission, lifecycle
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.policy_switches import Outstanding
from interlock.core.records import Admitted, Held, Instance, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies import outstanding_work
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.language.loader import compile_named
from interlock.policies.outstanding_work import BlockedInstance, SwitchCheck
from tiers import tier

O = Operation  # noqa: E741
STANDARD = compile_named("standard")


def vm(name: str = "web", **fields: object) -> Instance:
    values = {"vm_state": VmState.ACTIVE, "launched_at_ms": 1, "updated_at_ms": 1_000, **fields}
    return Instance(id=name, name=name, project="p", host="h", **values)  # type: ignore[arg-type]


def asked(instance: Instance, operation: Operation, hold_ms: int | None = None) -> Instance:
    """The instance after an admin's submission at second one, which standard admits or holds."""
    number = len(instance.outstanding) + len(instance.held)
    submission = Submission(
        request_id=f"r{number}", operation=operation, requested_by="x", role=Role.ADMIN, hold_ms=hold_ms
    )
    change = admission.admit(instance, submission, STANDARD, 1_000)
    assert isinstance(change.answer, Admitted | Held), change.answer
    return change.instance


def in_flight(operation: Operation, name: str = "web", **fields: object) -> Instance:
    return lifecycle.take(asked(vm(name, **fields), operation), None, 1_000).instance


def blocked(
    new: CompiledPolicy, instances: Iterable[Instance], outstanding: Outstanding = Outstanding.KEEP
) -> tuple[BlockedInstance, ...]:
    return SwitchCheck(PolicyInForce(STANDARD), new, outstanding, lambda _: True).blocked(instances, 2_000)


def site(*rules: Rule) -> CompiledPolicy:
    """Standard with rules before its own."""
    return CompiledPolicy(Policy(name="site", rules=(*rules, *STANDARD.policy.rules)))


def rule(identity: str, operations: set[Operation], verdict: Verdict, **more: object) -> Rule:
    return Rule(id=identity, operations=frozenset(operations), verdict=verdict, **more)  # type: ignore[arg-type]


def waiting_for(operation: Operation) -> CompiledPolicy:
    """Deletions wait for an operation that nobody may submit any more, and nobody resets a state."""
    tasks = frozenset(CATALOGUE[operation].phases)
    others = frozenset(Operation) - {O.DELETE, O.FORCE_DELETE}
    return site(
        rule("nobody", {operation}, Verdict.DENY),
        rule("no-reset", {O.RESET_STATE}, Verdict.DENY),
        rule("waits", {O.DELETE, O.FORCE_DELETE}, Verdict.ADMIT, task_states=tasks, outstanding=others),
    )


@pytest.mark.parametrize("name", tier(("take2", "propolis"), ("take2", "propolis", "nova", "standard")))
def test_a_switch_to_a_built_in_policy_takes_no_vm_its_way_to_be_deleted(name: str) -> None:
    served = []
    for operation in Operation:
        answer = admission.judge(
            vm(), Submission(request_id="r", operation=operation, requested_by="x", role=Role.ADMIN), STANDARD, 1_000
        )
        if isinstance(answer, Admitted) and answer.request.taken_at_ms is None and answer.request.ended_at_ms is None:
            served.append(in_flight(operation, operation.value))
    assert len(served) > 15
    assert blocked(compile_named(name), served) == ()


def test_the_operation_that_hangs_and_what_makes_it_hopeless_are_named() -> None:
    (found,) = blocked(waiting_for(O.REBUILD), [in_flight(O.REBUILD), in_flight(O.STOP, "other")])
    assert (found.name, found.operation, found.rejudge_helps) == ("web", O.REBUILD, False)
    assert found.because == (
        "in active while rebuild is in flight, delete is admitted (rule 'waits'), and then "
        "nothing that any role may submit leads to its deletion."
    )


def test_a_request_in_the_queue_blocks_the_switch_unless_it_is_judged_again() -> None:
    queued = asked(in_flight(O.REBOOT), O.REBUILD)
    (found,) = blocked(waiting_for(O.REBUILD), [queued])
    assert found.rejudge_helps
    assert blocked(waiting_for(O.REBUILD), [queued], Outstanding.REJUDGE) == ()


def test_a_tag_that_a_rule_names_counts() -> None:
    """Under the rule nobody may do anything to a VM with that tag."""
    shut = site(rule("legal-hold", set(Operation), Verdict.DENY, tags=frozenset({"legal-hold"})))
    served = [in_flight(O.REBOOT, "free"), in_flight(O.REBOOT, "held", tags=("legal-hold",))]
    assert [one.name for one in blocked(shut, served)] == ["held"]


def test_a_held_request_that_a_rule_names_counts() -> None:
    shut = site(rule("one-held", set(Operation), Verdict.DENY, held=frozenset({O.UNRESCUE}), silent_ms_min=0))
    waiting = asked(vm(), O.UNRESCUE, hold_ms=36_000_000)
    assert waiting.held
    assert blocked(shut, [waiting]) == ()  # the hold ends at a time that can be named
    assert blocked(shut, [vm("idle")]) == ()


def test_one_vm_of_each_class_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    trap = outstanding_work._Search.trap

    def counted(self: outstanding_work._Search, instance: Instance, now_ms: int) -> str | None:
        searched.append(instance.name)
        return trap(self, instance, now_ms)

    monkeypatch.setattr(outstanding_work._Search, "trap", counted)
    many = [in_flight((O.REBOOT, O.STOP)[n % 2], f"vm{n}", tags=(f"own-{n}",)) for n in range(1_000)]
    check = SwitchCheck(PolicyInForce(STANDARD), compile_named("take2"), Outstanding.KEEP, lambda _: True)
    assert check.blocked(many, 2_000) == ()
    assert check.blocked(many, 2_500) == ()
    assert searched == ["vm0", "vm1"]


def test_a_check_ends_at_its_limit_of_time() -> None:
    check = SwitchCheck(PolicyInForce(STANDARD), STANDARD, Outstanding.KEEP, lambda _: True)
    with pytest.raises(TimeoutError):
        check.blocked([in_flight(O.STOP)], 2_000, until_s=time.monotonic())
