"""What happens to a request after it was admitted, and to an instance of whose guest something is heard."""

from __future__ import annotations

from typing import Any

import pytest
from core_samples import (
    GRACE_MS,
    ORDINARY,
    START_MS,
    STUCK_MS,
    O,
    V,
    accepted,
    ask,
    instance_in,
    kinds_told,
    queue,
    serving,
    waiting_for,
)

from interlock.core.admission import admit
from interlock.core.errors import BrokenInvariant
from interlock.core.lifecycle import (
    adopt,
    apply_update,
    cancel,
    expire,
    finish,
    next_deadline_ms,
    observe,
    progress,
    take,
)
from interlock.core.operations import Lane, Operation
from interlock.core.outcomes import end_of, fail_overdue, fenced_for_limit_at_ms
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    Cancellation,
    Change,
    Disk,
    GuestEvent,
    Image,
    Instance,
    InstanceUpdate,
    Outcome,
    Request,
    Spec,
    StaleFence,
    Status,
    TransferProgress,
)
from interlock.core.request_queue import Draft, replace
from interlock.core.states import PowerState, VmState

POLICY = CompiledPolicy(ORDINARY)


def report(instance: Instance, outcome: Outcome, fence: int = 1) -> Change[Request | StaleFence]:
    return finish(instance, "r0", fence, outcome, POLICY, START_MS + 5, message="so it was")


# ---------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("vm_state", [V.BUILDING, V.ACTIVE, V.STOPPED])
def test_what_has_arrived_at_another_host_is_what_it_was(vm_state: VmState) -> None:
    """Its record goes along, so that it is gone from nowhere that anybody sees."""
    before = replace(serving(O.MIGRATE), vm_state=vm_state)
    change = finish(before, "r0", 1, Outcome.SUCCEEDED, POLICY, START_MS + 5, arrived=True)
    assert change.instance.vm_state is vm_state
    assert not change.instance.outstanding
    assert report(before, Outcome.SUCCEEDED).instance.vm_state is V.MIGRATED_OUT


def test_nothing_but_a_migration_arrives() -> None:
    change = finish(serving(O.STOP), "r0", 1, Outcome.SUCCEEDED, POLICY, START_MS + 5, arrived=True)
    assert change.instance.vm_state is V.STOPPED


def test_a_success_leads_where_the_catalogue_says() -> None:
    """The driver says that it handled a request, not which state that leads to (change 880)."""
    change = report(serving(O.STOP), Outcome.SUCCEEDED)
    assert change.instance.vm_state is V.STOPPED
    assert change.instance.task_state == "none"
    assert not change.instance.outstanding
    assert accepted(change).status is Status.SUCCEEDED
    assert kinds_told(change) == ["instance.state", "request.succeeded"]


def test_a_failed_start_leads_to_error_and_keeps_what_was_said() -> None:
    """The instance says why it is in error, for people."""
    change = report(serving(O.START, V.STOPPED), Outcome.FAILED)
    assert (change.instance.vm_state, change.instance.error) == (V.ERROR, "so it was")
    assert accepted(change).reason == "failed"


def test_a_failed_pause_leaves_the_state_as_it_was() -> None:
    """Where the catalogue names no state for a failure."""
    assert report(serving(O.PAUSE), Outcome.FAILED).instance.vm_state is V.ACTIVE


def test_an_error_is_forgotten_once_the_instance_is_well() -> None:
    """None in every other state."""
    instance = serving(O.START, V.ERROR)
    change = finish(instance, "r0", 1, Outcome.SUCCEEDED, POLICY, START_MS)
    assert change.instance.error is None


def test_an_unknown_outcome_is_not_an_end() -> None:
    """Law 10: it waits in unknown until the hypervisor has been inspected, and only then ends."""
    change = report(serving(O.START, V.STOPPED), Outcome.UNKNOWN)
    assert change.instance.outstanding[0].status is Status.UNKNOWN
    assert change.instance.vm_state is V.STOPPED
    assert accepted(report(change.instance, Outcome.SUCCEEDED)).status is Status.SUCCEEDED


def test_an_unknown_outcome_is_no_sign_of_life() -> None:
    """What gives no answer may be taken over."""
    change = finish(serving(O.REBOOT), "r0", 1, Outcome.UNKNOWN, POLICY, START_MS + 50)
    assert change.instance.outstanding[0].last_progress_at_ms == START_MS


def test_what_waits_behind_a_failure_is_judged_again() -> None:
    """Law 2: a start behind a failed stop makes no sense; the reason says so."""
    instance = queue(serving(O.STOP), POLICY, O.RESCUE, O.UNRESCUE, O.START)
    change = report(instance, Outcome.FAILED)
    assert waiting_for(change.instance) == ["rescue", "unrescue"]
    cancelled = next(request for request in change.requests if request.operation is O.START)
    assert cancelled.status is Status.CANCELLED
    assert cancelled.message is not None
    assert "active" in cancelled.message


def test_what_waits_behind_a_success_stays() -> None:
    """Law 2: the promise."""
    instance = queue(serving(O.STOP), POLICY, O.RESCUE, O.UNRESCUE, O.START)
    assert waiting_for(report(instance, Outcome.SUCCEEDED).instance) == ["rescue", "unrescue", "start"]


def test_an_interruption_ends_as_superseded_or_as_cancelled_by_who_asked_for_it() -> None:
    """Its owner cancelled it, or another request preempted it."""
    own = cancel(serving(O.REBOOT), "r0", POLICY, "ada", START_MS).instance
    assert accepted(report(own, Outcome.INTERRUPTED)).status is Status.CANCELLED
    preempted = admit(serving(O.REBOOT), ask(O.DELETE, "d"), POLICY, START_MS).instance
    assert accepted(report(preempted, Outcome.INTERRUPTED)).status is Status.SUPERSEDED


TOO_LONG = {"overdue": True, "served_at_most_ms": 60_000}


@pytest.mark.parametrize(
    ("outcome", "more", "status", "reason", "message"),
    [
        (Outcome.SUCCEEDED, {}, Status.SUCCEEDED, None, None),
        (Outcome.FAILED, {}, Status.FAILED, "failed", None),
        (Outcome.UNTOUCHED, {}, Status.FAILED, "failed", None),
        (Outcome.INTERRUPTED, {}, Status.CANCELLED, "interrupted", "Interrupted and rolled back."),
        (
            Outcome.INTERRUPTED,
            {"interrupted_for": "r9"} | TOO_LONG,
            Status.SUPERSEDED,
            "superseded",
            "Interrupted by request r9.",
        ),
        *(
            (
                outcome,
                TOO_LONG,
                Status.FAILED,
                "served_too_long",
                "The start was served for 1 minute without an end, its limit (served_at_most).",
            )
            for outcome in (Outcome.INTERRUPTED, Outcome.FAILED, Outcome.UNTOUCHED)
        ),
        (Outcome.SUCCEEDED, TOO_LONG, Status.SUCCEEDED, None, None),
    ],
)
def test_each_end_has_its_reason_and_its_message_unless_the_worker_said_more(
    outcome: Outcome, more: dict[str, Any], status: Status, reason: str | None, message: str | None
) -> None:
    (request,) = serving(O.START, V.STOPPED).outstanding
    assert end_of(replace(request, **more), outcome, None) == (status, reason, message)
    assert end_of(replace(request, **more), outcome, "so it was") == (status, reason, "so it was")


@pytest.mark.parametrize(("operation", "vm_state"), [(O.START, V.STOPPED), (O.REBOOT, V.ACTIVE), (O.RESCUE, V.ACTIVE)])
def test_a_limit_that_is_only_asked_about_ends_as_it_is_recorded(operation: Operation, vm_state: VmState) -> None:
    busy = queue(serving(operation, vm_state), POLICY, O.DELETE)
    drafts = [Draft(busy, START_MS + 5, recording=recording) for recording in (True, False)]
    for draft in drafts:
        fail_overdue(draft, busy.outstanding[0])
    recorded, asked = drafts
    assert asked.conclude() == recorded.conclude() != busy
    assert recorded.events
    assert (asked.events, asked.requests) == ([], {})


def test_what_was_served_too_long_and_preempted_as_well_is_superseded() -> None:
    """Whoever preempted it is named, and nothing is said of its limit."""
    (request,) = serving(O.START, V.STOPPED).outstanding
    waiting = replace(request, interrupt_deadline_ms=START_MS + 5, **TOO_LONG)
    ends = {}
    for interrupted_for in (None, "r9"):
        due = replace(serving(O.START, V.STOPPED), outstanding=(replace(waiting, interrupted_for=interrupted_for),))
        change = expire(due, POLICY, START_MS + 5)
        (ended,) = [one for one in change.requests if one.id == "r0"]
        ends[interrupted_for] = (ended.status, ended.reason, change.instance.vm_state)
    assert ends == {
        None: (Status.FAILED, "served_too_long", V.ERROR),
        "r9": (Status.SUPERSEDED, "superseded", V.STOPPED),
    }


@pytest.mark.parametrize("earliest", ["limit", "interruption", "hold"])
def test_the_next_deadline_is_the_earliest_of_a_limit_an_interruption_and_a_hold(earliest: str) -> None:
    at_ms = {"limit": START_MS + 30, "interruption": START_MS + 30, "hold": START_MS + 30} | {earliest: START_MS + 20}
    limited = replace(serving(O.START, V.STOPPED).outstanding[0], served_at_most_ms=at_ms["limit"] - START_MS)
    stopping = replace(limited, id="r1", served_at_most_ms=1, interrupt_deadline_ms=at_ms["interruption"])
    later = replace(stopping, id="r2", interrupt_deadline_ms=START_MS + 40)
    instance = instance_in(outstanding=(limited, stopping, later), held_due_ms=at_ms["hold"])
    assert next_deadline_ms(instance) == START_MS + 20
    assert next_deadline_ms(instance_in()) is None


def test_what_is_served_for_a_limited_time_is_fenced_a_grace_period_after_its_limit_or_now() -> None:
    (request,) = serving(O.START, V.STOPPED).outstanding
    limited = replace(request, served_at_most_ms=60_000)
    limit_ms = START_MS + 60_000
    assert fenced_for_limit_at_ms(limited, START_MS) == limit_ms + GRACE_MS
    assert fenced_for_limit_at_ms(limited, limit_ms + 7) == limit_ms + 7 + GRACE_MS
    assert fenced_for_limit_at_ms(request, START_MS) is None
    stopping = replace(limited, interrupt_deadline_ms=limit_ms + 3)
    assert fenced_for_limit_at_ms(stopping, START_MS) is None
    assert fenced_for_limit_at_ms(replace(stopping, overdue=True), START_MS) == limit_ms + 3
    assert fenced_for_limit_at_ms(replace(stopping, overdue=True, interrupted_for="r9"), START_MS) is None


def test_an_instance_is_launched_when_its_guest_runs_for_the_first_time() -> None:
    building = serving(O.CREATE, V.BUILDING)
    assert report(building, Outcome.FAILED).instance.launched_at_ms is None
    launched = report(building, Outcome.SUCCEEDED).instance
    assert launched.launched_at_ms == START_MS + 5
    later = observe(launched, GuestEvent.RESET, POLICY, START_MS + 9).instance
    assert later.launched_at_ms == START_MS + 5


# --------------------------------------------------------------------------------------------------------- fence


def stale(change: Change[Request | StaleFence]) -> StaleFence:
    assert isinstance(change.answer, StaleFence)
    return change.answer


def test_a_worker_that_was_taken_over_can_write_nothing() -> None:
    """Law 4: refused and recorded, and nothing changes."""
    instance = admit(serving(O.REBOOT), ask(O.REBOOT, "again"), POLICY, START_MS + STUCK_MS).instance
    for outcome in Outcome:
        change = finish(instance, "r0", 1, outcome, POLICY, START_MS + STUCK_MS + 1)
        assert stale(change).current_fence == 2
        assert change.instance is instance
        assert not change.requests
        assert [(event.kind, event.request_id) for event in change.events] == [("request.fenced", "r0")]
        assert change.events[0].data == {"fence": 1, "current_fence": 2, "attempt": "finish"}
    assert stale(progress(instance, "r0", 1, START_MS)).fence == 1


def test_a_fence_does_not_fit_another_request() -> None:
    """The right to act is for one request."""
    instance = queue(serving(O.STOP), POLICY, O.START)
    assert stale(finish(instance, "q1", 1, Outcome.SUCCEEDED, POLICY, START_MS)).request_id == "q1"
    assert stale(finish(instance, "never", 1, Outcome.SUCCEEDED, POLICY, START_MS)).request_id == "never"


def test_a_request_ends_once() -> None:
    """Law 3: the second report of the same worker comes too late."""
    done = report(serving(O.STOP), Outcome.SUCCEEDED).instance
    assert stale(report(done, Outcome.FAILED)).request_id == "r0"


# ------------------------------------------------------------------------------------------------------ progress


def test_progress_is_life_and_is_told_only_when_it_says_something() -> None:
    """A heartbeat is kept, and is no news."""
    beat = progress(serving(O.REBOOT), "r0", 1, START_MS + 9)
    assert beat.instance.outstanding[0].last_progress_at_ms == beat.instance.updated_at_ms == START_MS + 9
    assert not beat.events
    step = progress(
        beat.instance,
        "r0",
        1,
        START_MS + 10,
        phase="reboot_started",
        moved=TransferProgress(done=1, total=2),
        detail="half",
    )
    assert step.instance.task_state == "reboot_started"
    assert step.events[0].data == {
        "operation": "reboot",
        "phase": "reboot_started",
        "progress": 0.5,
        "detail": "half",
        "bytes_done": 1,
        "bytes_total": 2,
        "bytes_per_s": None,
    }


def test_a_new_phase_starts_without_the_progress_of_the_old_one() -> None:
    """Progress is of the phase."""
    half = progress(
        serving(O.REBOOT), "r0", 1, START_MS, moved=TransferProgress(done=1, total=2), detail="half"
    ).instance
    assert progress(half, "r0", 1, START_MS).instance.outstanding[0].progress == 0.5
    moved = progress(half, "r0", 1, START_MS, phase="reboot_pending").instance.outstanding[0]
    assert (moved.progress, moved.detail) == (None, None)


def test_a_phase_that_the_operation_does_not_have_is_a_bug() -> None:
    """Bugs raise."""
    with pytest.raises(BrokenInvariant):
        progress(serving(O.REBOOT), "r0", 1, START_MS, phase="pausing")


# -------------------------------------------------------------------------------------------------------- cancel


def test_what_waits_is_cancelled_at_once_and_what_stood_on_it_too() -> None:
    """A start that was only possible after the stop goes with it."""
    change = cancel(queue(instance_in(), POLICY, O.STOP, O.START), "q1", POLICY, "ada", START_MS)
    assert change.answer is Cancellation.CANCELLED
    assert not change.instance.outstanding
    assert kinds_told(change) == ["request.cancelled", "request.cancelled"]
    assert {request.id: request.reason for request in change.requests}["q1"] == "cancelled"


def test_what_is_served_is_asked_to_stop_if_it_can() -> None:
    """Once; asking again says the same."""
    change = cancel(serving(O.REBOOT), "r0", POLICY, "ada", START_MS + 3)
    assert change.answer is Cancellation.STOPPING
    assert change.instance.outstanding[0].interrupt_at_ms == START_MS + 3
    again = cancel(change.instance, "r0", POLICY, "ada", START_MS + 4)
    assert again.answer is Cancellation.STOPPING
    assert again.instance is change.instance


@pytest.mark.parametrize("name", ["r0", "unknown"])
def test_what_cannot_be_stopped_or_is_not_there_is_too_late(name: str) -> None:
    """Said plainly, and nothing changes."""
    instance = serving(O.PAUSE)
    change = cancel(instance, name, POLICY, "ada", START_MS)
    assert change.answer is Cancellation.TOO_LATE
    assert change.instance is instance
    assert not change.events


# -------------------------------------------------------------------------------------------------------- expire


def test_what_does_not_confirm_in_time_is_fenced() -> None:
    """Section 3: fenced if it does not confirm within a grace period, and not before."""
    instance = admit(serving(O.PAUSE), ask(O.DELETE, "d"), POLICY, START_MS).instance
    assert next_deadline_ms(instance) == START_MS + GRACE_MS
    early = expire(instance, POLICY, START_MS + GRACE_MS - 1)
    assert early.answer == ()
    assert early.instance is instance
    change = expire(instance, POLICY, START_MS + GRACE_MS)
    assert change.answer == ("r0",)
    assert change.instance.fence == 2
    assert waiting_for(change.instance) == ["delete"]
    assert next_deadline_ms(change.instance) is None
    taken = take(change.instance, None, START_MS + GRACE_MS).answer
    assert taken is not None
    assert taken.operation is O.DELETE


# ------------------------------------------------------------------------------------------------------- observe


def test_a_guest_that_powers_itself_off_is_stopped() -> None:
    """And what waited for it to run is judged again."""
    instance = queue(instance_in(), POLICY, O.PAUSE)
    change = observe(instance, GuestEvent.STOPPED, POLICY, START_MS)
    assert (change.instance.vm_state, change.instance.power_state) == (V.STOPPED, PowerState.SHUTDOWN)
    assert not change.instance.outstanding
    assert kinds_told(change) == ["guest.stopped", "instance.state", "request.cancelled"]


@pytest.mark.parametrize(
    ("event", "power"), [(GuestEvent.CRASHED, PowerState.CRASHED), (GuestEvent.VANISHED, PowerState.NONE)]
)
def test_a_guest_that_crashed_or_vanished_is_in_error(event: GuestEvent, power: PowerState) -> None:
    """Only its owner can say what it should be."""
    instance = observe(instance_in(), event, POLICY, START_MS).instance
    assert (instance.vm_state, instance.power_state) == (V.ERROR, power)
    assert instance.error


@pytest.mark.parametrize(
    ("event", "left"),
    [
        (GuestEvent.STOPPED, ()),
        (GuestEvent.VANISHED, ()),
        (GuestEvent.LEASE_ENDED, ()),
        (GuestEvent.CRASHED, ("v",)),
        (GuestEvent.RESET, ("v",)),
    ],
)
def test_a_pending_detachment_is_complete_once_the_process_of_the_guest_is_gone(
    event: GuestEvent, left: tuple[str, ...]
) -> None:
    """The process of a crashed guest is kept, and has its disks open."""
    image = Image(id="i", name="i", kind="disk", path="/i", size_bytes=512, sha256="0")
    spec = Spec(image=image, disks=(Disk(id="v", path="/v"),))
    change = observe(replace(instance_in(), spec=spec, detaching=("v",)), event, POLICY, START_MS)
    assert change.instance.detaching == left
    assert change.instance.spec is not None
    assert tuple(disk.id for disk in change.instance.spec.disks) == left
    assert [one.data for one in change.events if one.kind == "guest.changed"] == ([] if left else [{"detached": ["v"]}])


@pytest.mark.parametrize("event", [GuestEvent.STOPPED, GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.LEASE_ENDED])
def test_the_end_of_a_guest_that_is_on_record_changes_nothing(event: GuestEvent) -> None:
    """A hypervisor may report it twice, and an inspection may find it just before it is reported."""
    instance = observe(instance_in(), event, POLICY, START_MS).instance
    again = observe(instance, event, POLICY, START_MS + 4)
    assert (again.instance, again.events) == (instance, ())


def test_the_end_of_a_guest_that_is_being_started_again_is_recorded() -> None:
    """The record has the end before: this is another guest's, and its start may yet succeed."""
    stopped = observe(instance_in(), GuestEvent.STOPPED, POLICY, START_MS).instance
    starting = take(admit(stopped, ask(O.START), POLICY, START_MS).instance, None, START_MS).instance
    assert kinds_told(observe(starting, GuestEvent.STOPPED, POLICY, START_MS + 4)) == ["guest.stopped"]


def test_a_crashed_guest_whose_process_is_gone_is_on_record() -> None:
    crashed = observe(instance_in(), GuestEvent.CRASHED, POLICY, START_MS).instance
    assert kinds_told(observe(crashed, GuestEvent.VANISHED, POLICY, START_MS)) == ["guest.vanished"]


def test_a_guest_that_resets_itself_changes_nothing_but_shows_life() -> None:
    """It runs as before."""
    instance = queue(instance_in(), POLICY, O.PAUSE)
    change = observe(instance, GuestEvent.RESET, POLICY, START_MS + 4)
    assert change.instance.vm_state is V.ACTIVE
    assert change.instance.outstanding == instance.outstanding
    assert change.instance.updated_at_ms == START_MS + 4


def test_news_of_a_guest_that_should_not_run_moves_no_state() -> None:
    """A stopped instance is not in error because nothing holds it."""
    assert observe(instance_in(V.STOPPED), GuestEvent.VANISHED, POLICY, START_MS).instance.vm_state is V.STOPPED
    assert observe(instance_in(V.DELETED), GuestEvent.STOPPED, POLICY, START_MS).instance.vm_state is V.DELETED


def test_what_is_in_flight_goes_on_when_the_guest_acts() -> None:
    """Its worker finds what is there."""
    instance = observe(serving(O.STOP), GuestEvent.STOPPED, POLICY, START_MS).instance
    assert waiting_for(instance) == ["stop"]
    assert report(instance, Outcome.SUCCEEDED).instance.vm_state is V.STOPPED


# --------------------------------------------------------------------------------------------------------- adopt


def test_adopting_takes_the_right_from_the_worker_that_is_gone() -> None:
    """It may only be thought gone: under the new fence it can do nothing."""
    change = adopt(serving(O.REBOOT), START_MS + 8)
    request = change.answer[0]
    assert (request.status, request.fence, request.last_progress_at_ms) == (Status.UNKNOWN, 2, START_MS + 8)
    assert change.instance.fence == 2
    assert stale(report(change.instance, Outcome.SUCCEEDED)).current_fence == 2
    assert accepted(report(change.instance, Outcome.SUCCEEDED, fence=2)).status is Status.SUCCEEDED


def test_what_nobody_watched_is_not_taken_over_for_that() -> None:
    """Law 6: how long nobody watched says nothing about the guest."""
    adopted = adopt(serving(O.REBOOT), START_MS + 10 * STUCK_MS).instance
    answer = admit(adopted, ask(O.REBOOT, "again"), POLICY, START_MS + 10 * STUCK_MS + 1).answer
    assert getattr(answer, "allowed_at_ms", None) == START_MS + 11 * STUCK_MS


def test_adopting_an_instance_of_which_nothing_is_served_changes_nothing() -> None:
    """What waits, waits."""
    instance = queue(instance_in(), POLICY, O.STOP)
    change = adopt(instance, START_MS)
    assert change.answer == ()
    assert change.instance is instance


def test_what_is_plugged_in_beside_a_state_change_is_not_undone_by_it() -> None:
    """Both keep a spec that they made from the one they had read when they began."""
    read = Spec(image=Image(id="i", name="i", kind="disk", path="/i", size_bytes=512, sha256="0"))
    plugged = replace(read, disks=(Disk(id="v", path="/v"),))
    grown = replace(read, memory_mib=256)
    instance = replace(instance_in(V.ACTIVE), spec=read)
    instance = apply_update(instance, InstanceUpdate(spec=plugged), Lane.COMPONENT)
    instance = apply_update(instance, InstanceUpdate(spec=grown), Lane.STATE)
    assert instance.spec == replace(grown, disks=plugged.disks)
    instance = apply_update(instance, InstanceUpdate(spec=read), Lane.COMPONENT)
    assert instance.spec == grown
