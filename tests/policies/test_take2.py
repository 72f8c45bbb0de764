"""The `take2` policy is the text of 2012: its two examples to the letter, and no state without a way out."""

from __future__ import annotations

import pytest
from policy_samples import Play, instance, said, serving

from interlock.core.lifecycle import progress
from interlock.core.operations import CATALOGUE, TASK_OPERATION, TASK_STATES, Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.records import Admitted, Denied, Submission
from interlock.core.request_queue import permits
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.explanation.explainer import explain
from interlock.policies.language.loader import compile_named

O = Operation  # noqa: E741
V = VmState
TOLD_TO_THE_MIGRATION = (O.LIVE_MIGRATE_ABORT, O.LIVE_MIGRATE_FORCE_COMPLETE)
REFUSED = {O.START, O.UNPAUSE, O.RESUME, O.UNRESCUE}
STUCK = {O.DELETE, O.REBOOT, O.REBUILD}
REBOOT_PHASES = CATALOGUE[O.REBOOT].phases + CATALOGUE[O.REBOOT].hard_phases


@pytest.fixture(scope="module")
def take2() -> CompiledPolicy:
    return compile_named("take2")


@pytest.mark.parametrize("operation", list(O))
def test_active_with_no_task_refuses_four_operations_and_allows_the_rest(
    take2: CompiledPolicy, operation: Operation
) -> None:
    kind, _ = said(Play(take2, instance(V.ACTIVE)).submit(operation, role=Role.ADMIN))
    assert kind == ("denied" if operation in REFUSED else "admitted")


@pytest.mark.parametrize("phase", REBOOT_PHASES)
@pytest.mark.parametrize("operation", list(O))
def test_active_and_rebooting_allows_three_operations_once_three_minutes_have_passed(
    take2: CompiledPolicy, operation: Operation, phase: str
) -> None:
    just_before = Play(take2, serving(V.ACTIVE, phase, age_ms=179_999))
    answer = just_before.submit(operation, role=Role.ADMIN)
    assert isinstance(answer, Denied)
    assert answer.allowed_at_ms == (just_before.now_ms + 1 if operation in STUCK else None)
    then = Play(take2, serving(V.ACTIVE, phase, age_ms=180_000)).submit(operation, role=Role.ADMIN)
    if operation in STUCK:
        assert isinstance(then, Admitted)
        assert (then.supersedes, then.cancels) == (("r0",), ())
    else:
        assert isinstance(then, Denied)


def test_progress_counts_as_a_change(take2: CompiledPolicy) -> None:
    play = Play(take2, instance(V.ACTIVE))
    play.submit(O.REBOOT)
    play.take()
    play.advance(170_000)
    play.instance = progress(play.instance, "r1", 0, play.now_ms, phase="reboot_started").instance
    play.advance(170_000)
    assert said(play.submit(O.DELETE)) == ("denied", "reboot_in_progress")
    play.advance(10_000)
    assert said(play.submit(O.DELETE)) == ("admitted", None)


@pytest.mark.parametrize("vm_state", [state for state in V if state is not V.DELETED])
def test_delete_is_reached_from_every_state_within_three_minutes(take2: CompiledPolicy, vm_state: VmState) -> None:
    assert said(Play(take2, instance(vm_state)).submit(O.DELETE)) == ("admitted", None)
    for task in TASK_STATES:
        play = Play(take2, serving(vm_state, task))
        refused = play.submit(O.DELETE)
        assert isinstance(refused, Denied), task
        assert refused.allowed_at_ms is not None
        assert refused.allowed_at_ms - play.now_ms <= 180_000
        play.advance(refused.allowed_at_ms - play.now_ms)
        admitted = play.submit(O.DELETE)
        assert isinstance(admitted, Admitted), task
        assert admitted.cancels == ()
        taken = play.take()
        assert taken is not None
        assert taken.id == admitted.request.id


def test_a_hanging_component_change_does_not_keep_an_instance_alive(take2: CompiledPolicy) -> None:
    play = Play(take2, instance(V.ACTIVE))
    play.submit(O.ATTACH_VOLUME)
    play.take()
    waiting = play.submit(O.DELETE)
    assert isinstance(waiting, Admitted)
    assert play.take() is None
    play.advance(180_000)
    takeover = play.submit(O.DELETE)
    assert isinstance(takeover, Admitted)
    assert takeover.supersedes == ("r1",)
    taken = play.take()
    assert taken is not None
    assert taken.operation is O.DELETE


def test_nothing_preempts_and_nothing_is_queued_behind_a_task(take2: CompiledPolicy) -> None:
    assert not any(rule.verdict is Verdict.PREEMPT for rule in take2.rules)
    for task in TASK_STATES:
        for vm_state in set(V) - {V.DELETED}:
            for operation in O:
                if operation in TOLD_TO_THE_MIGRATION and task == "migrating":
                    continue
                answer = Play(take2, serving(vm_state, task)).submit(operation, role=Role.ADMIN)
                assert not isinstance(answer, Admitted), (vm_state, task, operation)


def test_the_same_can_be_asked_for_again_in_the_end(take2: CompiledPolicy) -> None:
    for task in TASK_STATES:
        operation = TASK_OPERATION[task]
        for vm_state in CATALOGUE[operation].sources:
            play = Play(take2, serving(vm_state, task, age_ms=1_800_000))
            answer = play.submit(operation, host_reachable=operation is not O.EVACUATE)
            if operation is O.CREATE:
                continue
            if vm_state is V.ACTIVE and operation in REFUSED:
                continue
            assert isinstance(answer, Admitted), (task, vm_state)
            assert answer.cancels == ()


def test_outside_the_two_examples_only_what_can_be_performed_is_allowed(take2: CompiledPolicy) -> None:
    for vm_state in set(V) - {V.ACTIVE, V.DELETED}:
        for operation in O:
            play = Play(take2, instance(vm_state))
            if isinstance(play.submit(operation, role=Role.ADMIN), Admitted):
                assert vm_state in CATALOGUE[operation].sources, (vm_state, operation)


def test_readers_change_nothing_and_only_administrators_reset(take2: CompiledPolicy) -> None:
    assert said(Play(take2, instance(V.ACTIVE)).submit(O.STOP, role=Role.READER)) == ("denied", "role_required")
    assert said(Play(take2, instance(V.ACTIVE)).submit(O.RESET_STATE)) == ("denied", "role_required")
    assert permits(next(rule for rule in take2.rules if rule.id == "active-allowed"))


def test_behind_a_queued_deletion_the_answer_is_that_the_vm_will_be_deleted(take2: CompiledPolicy) -> None:
    play = Play(take2, instance(V.ACTIVE))
    assert said(play.submit(O.DELETE)) == ("admitted", None)
    answer = play.submit(O.STOP)
    assert isinstance(answer, Denied)
    assert (answer.reason, answer.rule, answer.foreseen) == ("deleting", "to-be-deleted", True)
    assert (answer.because or "").startswith("A deletion of the VM is outstanding: the VM will be deleted")
    assert answer.blocked_by is not None
    assert answer.blocked_by.operation is O.DELETE
    again = Submission(request_id="r9", operation=O.STOP, requested_by="me")
    explained = explain(play.instance, again, take2, play.now_ms)
    assert [tried.rule for tried in explained.tried_foreseen] == ["to-be-deleted"]
    taken = play.take()
    assert taken is not None
    play.finish(taken.id)
    assert said(play.submit(O.STOP)) == ("denied", "deleted")
