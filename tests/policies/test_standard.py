"""What people who live with the `standard` policy can rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
from policy_samples import Play, instance, said, serving

from interlock.core.operations import CATALOGUE, TASK_OPERATION, TASK_STATES, Lane, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Denied, GuestEvent, Instance, Outcome, Redundant, Status
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named

O = Operation  # noqa: E741
V = VmState
STATE_CHANGES = [operation for operation in O if CATALOGUE[operation].lane is Lane.STATE]
ENDS = {O.DELETE, O.FORCE_DELETE}
MINUTE_MS = 60_000


@pytest.fixture(scope="module")
def standard() -> CompiledPolicy:
    return compile_named("standard")


def ask(policy: CompiledPolicy, start: Instance, operation: Operation, **how: bool | str) -> tuple[str, str | None]:
    return said(Play(policy, start).submit(operation, **how))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize("operation", list(O))
def test_a_reader_changes_nothing(standard: CompiledPolicy, operation: Operation) -> None:
    assert ask(standard, instance(V.ACTIVE), operation, role="reader") == ("denied", "role_required")


def test_only_an_administrator_resets_a_state(standard: CompiledPolicy) -> None:
    assert ask(standard, instance(V.ACTIVE), O.RESET_STATE) == ("denied", "role_required")
    assert ask(standard, instance(V.ACTIVE), O.RESET_STATE, role="admin") == ("admitted", None)


@pytest.mark.parametrize("operation", list(O))
def test_a_lock_stops_its_owner_and_not_an_administrator(standard: CompiledPolicy, operation: Operation) -> None:
    locked = instance(V.ACTIVE, locked_by="me")
    if operation is O.RESET_STATE:
        assert ask(standard, locked, operation) == ("denied", "role_required")
    elif operation in {O.LOCK, O.UNLOCK, O.SNAPSHOT, O.BACKUP}:
        assert ask(standard, locked, operation) != ("denied", "locked")
    else:
        assert ask(standard, locked, operation) == ("denied", "locked")
    assert ask(standard, locked, operation, role="admin") != ("denied", "locked")


def test_a_blocked_operation_is_denied_to_everybody_and_the_others_are_not(standard: CompiledPolicy) -> None:
    protected = instance(V.ACTIVE, blocked_operations=(O.DELETE,))
    for role in ("member", "admin"):
        assert ask(standard, protected, O.DELETE, role=role) == ("denied", "operation_blocked")
        assert ask(standard, protected, O.STOP, role=role) == ("admitted", None)


# ---------------------------------------------------------------------------------------------------------- delete


@pytest.mark.parametrize("vm_state", [state for state in V if state is not V.DELETED])
def test_delete_is_admitted_in_every_state_and_before_everything_else(
    standard: CompiledPolicy, vm_state: VmState
) -> None:
    for task in TASK_STATES:
        if TASK_OPERATION[task] in ENDS:
            continue
        play = Play(standard, serving(vm_state, task))
        answer = play.submit(O.DELETE)
        assert isinstance(answer, Admitted)
        assert answer.supersedes == ("r0",)
        play.advance(10_000)  # what was in flight never confirms
        taken = play.take()
        assert taken is not None
        assert taken.operation is O.DELETE
        play.finish(taken.id)
        assert play.instance.vm_state is V.DELETED
        assert not play.instance.outstanding


def test_a_second_delete_is_redundant_until_the_first_has_been_silent_for_five_minutes(
    standard: CompiledPolicy,
) -> None:
    play = Play(standard, instance(V.ACTIVE))
    play.submit(O.DELETE)
    assert said(play.submit(O.DELETE)) == ("redundant", "already_deleting")
    play.take()
    answer = play.submit(O.FORCE_DELETE)
    assert isinstance(answer, Redundant)
    assert answer.allowed_at_ms == play.now_ms + 5 * MINUTE_MS
    play.advance(5 * MINUTE_MS)
    takeover = play.submit(O.DELETE)
    assert isinstance(takeover, Admitted)
    assert takeover.supersedes == ("r1",)
    assert takeover.cancels == ()


@pytest.mark.parametrize("outstanding", [O.DELETE, O.FORCE_DELETE, O.SOFT_DELETE])
def test_nothing_else_is_admitted_once_a_delete_is_outstanding(
    standard: CompiledPolicy, outstanding: Operation
) -> None:
    play = Play(standard, instance(V.ACTIVE))
    play.submit(outstanding)
    for _ in range(2):
        for operation in O:
            if operation not in {*ENDS, outstanding, O.RESET_STATE}:
                assert said(play.submit(operation)) == ("denied", "deleting"), operation
        play.take()


def test_what_a_site_lets_take_over_does_not_come_in_front_of_a_delete_that_waits(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        """
        [policy]
        name = "site"
        extends = "standard"

        [[rule]]
        id = "reboot-during-pause"
        operations = ["reboot"]
        task_state = ["@pause"]
        verdict = "after"
        threshold = "3m"
        reason = "in_progress"
        """
    )
    play = Play(compile_named(site), serving(V.ACTIVE, "pausing"))
    play.advance(3 * MINUTE_MS)
    assert isinstance(play.submit(O.DELETE), Admitted)
    assert said(play.submit(O.REBOOT)) == ("denied", "deleting")


# -------------------------------------------------------------------------------------------------- the same again


@pytest.mark.parametrize("operation", [operation for operation in STATE_CHANGES if operation not in ENDS])
def test_the_same_state_change_twice_is_redundant_while_it_lives_and_takes_over_once_it_does_not(
    standard: CompiledPolicy, operation: Operation
) -> None:
    for vm_state in CATALOGUE[operation].sources:
        play = Play(standard, serving(vm_state, CATALOGUE[operation].phases[0]))
        early = play.submit(operation, host_reachable=operation is not Operation.EVACUATE)
        assert isinstance(early, Redundant), (operation, vm_state)
        assert early.allowed_at_ms is not None
        assert early.request is not None
        play.advance(early.allowed_at_ms - play.now_ms - 1)
        assert isinstance(play.submit(operation, host_reachable=operation is not Operation.EVACUATE), Redundant)
        play.advance(1)
        late = play.submit(operation, host_reachable=operation is not Operation.EVACUATE)
        assert isinstance(late, Admitted)
        assert late.supersedes == ("r0",)
        assert late.cancels == ()
        taken = play.take()
        assert taken is not None
        assert taken.id == late.request.id


@pytest.mark.parametrize(
    ("operation", "threshold_ms"),
    [
        (O.START, 3 * MINUTE_MS),
        (O.REBOOT, 3 * MINUTE_MS),
        (O.STOP, 3 * MINUTE_MS),
        (O.PAUSE, MINUTE_MS),
        (O.SNAPSHOT, 10 * MINUTE_MS),
        (O.LIVE_MIGRATE, 10 * MINUTE_MS),
    ],
)
def test_a_stuck_operation_can_be_asked_for_again_after_a_time_that_fits_it(
    standard: CompiledPolicy, operation: Operation, threshold_ms: int
) -> None:
    vm_state = V.STOPPED if operation is O.START else V.ACTIVE
    play = Play(standard, serving(vm_state, CATALOGUE[operation].phases[0], age_ms=20_000))
    answer = play.submit(operation)
    assert isinstance(answer, Redundant)
    assert answer.allowed_at_ms == play.now_ms - 20_000 + threshold_ms


def test_a_hard_stop_does_not_wait_for_a_soft_one(standard: CompiledPolicy) -> None:
    play = Play(standard, serving(V.ACTIVE, "powering_off"))
    assert said(play.submit(O.STOP)) == ("redundant", "already_in_progress")
    answer = play.submit(O.STOP, hard=True)
    assert isinstance(answer, Admitted)
    assert (answer.supersedes, answer.cancels) == (("r0",), ())
    again = play.submit(O.STOP, hard=True)
    assert isinstance(again, Redundant), "what preempts knows no limit, so it must not pile up"
    assert again.request == answer.request
    play.advance(2_000)
    taken = play.take()
    assert taken is not None
    assert taken.phase == "powering_off_hard"
    assert said(play.submit(O.STOP, hard=True)) == ("redundant", "already_in_progress")


def test_a_hard_reboot_takes_over_from_a_soft_one_a_minute_after_that_began(standard: CompiledPolicy) -> None:
    play = Play(standard, serving(V.ACTIVE, "rebooting", age_ms=30_000))
    answer = play.submit(O.REBOOT, hard=True)
    assert isinstance(answer, Denied)
    assert (answer.reason, answer.allowed_at_ms) == ("reboot_in_progress", play.now_ms + 30_000)
    play.advance(30_000)
    assert isinstance(play.submit(O.REBOOT, hard=True), Admitted)


# ------------------------------------------------------------------------------------------------ stop, and a start


@pytest.mark.parametrize(("vm_state", "task"), [(V.STOPPED, "powering_on"), (V.BUILDING, "spawning")])
@pytest.mark.parametrize("ending", [Outcome.INTERRUPTED, Outcome.SUCCEEDED, Outcome.FAILED, None])
def test_a_stop_that_interrupts_a_start_is_served_however_the_start_ends(
    standard: CompiledPolicy, vm_state: VmState, task: str, ending: Outcome | None
) -> None:
    play = Play(standard, serving(vm_state, task))
    answer = play.submit(O.STOP)
    assert isinstance(answer, Admitted)
    assert (answer.supersedes, answer.cancels) == (("r0",), ())
    if ending is None:
        play.advance(10_000)
        assert play.requests["r0"].status is Status.SUPERSEDED
    else:
        play.finish("r0", ending)
    taken = play.take()
    assert taken is not None, "the record may say stopped while the guest runs, so the stop must not be dismissed"
    assert taken.id == answer.request.id
    play.finish(taken.id)
    assert play.instance.vm_state is V.STOPPED


def test_a_preempting_stop_is_cancelled_when_a_delete_goes_before_it(standard: CompiledPolicy) -> None:
    play = Play(standard, serving(V.STOPPED, "powering_on"))
    stop = play.submit(O.STOP)
    assert isinstance(stop, Admitted)
    delete = play.submit(O.DELETE)
    assert isinstance(delete, Admitted)
    assert delete.cancels == (stop.request.id,)


def test_a_soft_delete_that_is_asked_for_again_does_not_overtake_a_delete(standard: CompiledPolicy) -> None:
    play = Play(standard, serving(V.ACTIVE, "soft_deleting", age_ms=5 * MINUTE_MS))
    assert said(play.submit(O.DELETE)) == ("admitted", None)
    assert said(play.submit(O.SOFT_DELETE)) == ("denied", "deleting")


def test_a_preempting_stop_is_cancelled_at_once_when_something_else_takes_over(standard: CompiledPolicy) -> None:
    play = Play(standard, serving(V.ACTIVE, "powering_off", age_ms=3 * MINUTE_MS))
    stop = play.submit(O.STOP, hard=True)
    assert isinstance(stop, Admitted)
    takeover = play.submit(O.SOFT_DELETE)
    assert isinstance(takeover, Admitted)
    assert takeover.cancels == (stop.request.id,)


def test_a_stop_behind_a_start_that_waits_is_not_a_preemption(standard: CompiledPolicy) -> None:
    play = Play(standard, instance(V.STOPPED))
    play.submit(O.START)
    answer = play.submit(O.STOP)
    assert isinstance(answer, Admitted)
    assert not answer.request.preempts


def test_a_reboot_is_denied_behind_a_stop_and_a_start_is_not(standard: CompiledPolicy) -> None:
    for start in (instance(V.ACTIVE), serving(V.ACTIVE, "powering_off")):
        play = Play(standard, start)
        if not start.outstanding:
            play.submit(O.STOP)
        assert said(play.submit(O.REBOOT)) == ("denied", "halt_pending")
        assert said(play.submit(O.REBOOT, hard=True)) == ("denied", "halt_pending")
        assert said(play.submit(O.START)) == ("admitted", None)


# -------------------------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize(
    ("vm_state", "operations"),
    [
        (V.ACTIVE, (O.STOP, O.RESIZE, O.START)),
        (V.STOPPED, (O.START, O.PAUSE)),
        (V.STOPPED, (O.START, O.PAUSE, O.UNPAUSE, O.SUSPEND, O.RESUME, O.STOP)),
        (V.ACTIVE, (O.SHELVE, O.SHELVE_OFFLOAD, O.UNSHELVE, O.REBOOT)),
        (V.ERROR, (O.REBUILD, O.REBOOT, O.RESCUE, O.UNRESCUE)),
        (V.STOPPED, (O.START, O.ATTACH_VOLUME, O.SWAP_VOLUME)),
    ],
)
def test_what_makes_sense_one_after_the_other_can_be_queued_in_one_go(
    standard: CompiledPolicy, vm_state: VmState, operations: tuple[Operation, ...]
) -> None:
    play = Play(standard, instance(vm_state))
    for operation in operations:
        assert said(play.submit(operation)) == ("admitted", None), operation
    served = []
    while (taken := play.take()) is not None:
        served.append(taken.operation)
        play.finish(taken.id)
    assert served == list(operations)


def test_what_waits_behind_something_that_fails_is_cancelled_with_the_reason(standard: CompiledPolicy) -> None:
    play = Play(standard, instance(V.STOPPED))
    for operation in (O.START, O.PAUSE, O.ATTACH_VOLUME):
        play.submit(operation)
    play.take()
    play.finish("r1", Outcome.FAILED)
    assert [play.requests[request].reason for request in ("r2", "r3")] == ["not_in_this_state"] * 2
    assert not play.instance.outstanding


def test_a_guest_that_powers_itself_off_cancels_what_needs_it(standard: CompiledPolicy) -> None:
    play = Play(standard, instance(V.ACTIVE))
    for operation in (O.PAUSE, O.STOP):
        play.submit(operation)
    play.observe(GuestEvent.STOPPED)
    assert play.requests["r1"].reason == "not_in_this_state"
    assert play.requests["r2"].reason == "already_stopped"


@pytest.mark.parametrize("operation", [O.STOP, O.REBOOT, O.REBUILD])
def test_a_remedy_waits_behind_what_lives_and_takes_over_what_is_dead(
    standard: CompiledPolicy, operation: Operation
) -> None:
    alive = Play(standard, serving(V.ACTIVE, "image_uploading", age_ms=14_999))
    assert said(alive.submit(operation)) == ("admitted", None)
    dead = Play(standard, serving(V.ACTIVE, "image_uploading", age_ms=15_000))
    answer = dead.submit(operation)
    assert isinstance(answer, Denied)
    assert answer.reason == "no_sign_of_life"
    assert answer.allowed_at_ms == dead.now_ms + 10 * MINUTE_MS - 15_000
    dead.advance(10 * MINUTE_MS - 15_000)
    takeover = dead.submit(operation)
    assert isinstance(takeover, Admitted)
    assert (takeover.supersedes, takeover.cancels) == (("r0",), ())


def test_every_takeover_is_served_and_not_dismissed(standard: CompiledPolicy) -> None:
    """A request that takes over must not be cancelled by the very judgement that its takeover causes."""
    taken_over = 0
    for task in TASK_STATES:
        for vm_state in CATALOGUE[TASK_OPERATION[task]].sources:
            for operation in STATE_CHANGES:
                play = Play(standard, serving(vm_state, task, age_ms=60 * MINUTE_MS))
                answer = play.submit(operation, host_reachable=operation is not Operation.EVACUATE)
                if not isinstance(answer, Admitted) or not answer.request.preempts:
                    continue
                taken_over += 1
                assert answer.request.id not in answer.cancels, (vm_state, task, operation)
                assert vm_state in CATALOGUE[operation].sources, (vm_state, task, operation)
    assert taken_over > 500


# -------------------------------------------------------------------------------------------------- component changes


def test_a_swap_is_admitted_beside_a_stop_that_may_need_it(standard: CompiledPolicy) -> None:
    play = Play(standard, serving(V.ACTIVE, "powering_off"))
    assert said(play.submit(O.SWAP_VOLUME)) == ("admitted", None)
    taken = play.take(Lane.COMPONENT)
    assert taken is not None
    assert taken.operation is O.SWAP_VOLUME


def test_a_volume_can_be_attached_while_a_start_is_in_progress(standard: CompiledPolicy) -> None:
    play = Play(standard, serving(V.STOPPED, "powering_on"))
    assert said(play.submit(O.ATTACH_VOLUME)) == ("admitted", None)
    assert play.take(Lane.COMPONENT) is not None


def test_component_changes_alone_do_not_open_the_queue_to_everything(standard: CompiledPolicy) -> None:
    play = Play(standard, instance(V.STOPPED))
    play.submit(O.ATTACH_VOLUME)
    assert said(play.submit(O.PAUSE)) == ("denied", "not_in_this_state")
