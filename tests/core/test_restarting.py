"""When a guest that ended by itself is started again: rule by rule, and against a model that counts for itself."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from interlock.core import admission, lifecycle, scheduled_actions
from interlock.core import restarts as restarting
from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, GuestEvent, Instance, Outcome, Request, Submission
from interlock.core.restart_policy import OnCrash, OnPowerOff, RestartPolicy, Restarts, check_limit
from interlock.core.roles import Role
from interlock.core.scheduled_actions import UpkeepTimes
from interlock.core.states import PowerState, VmState
from interlock.driver.operations import PERFORMS
from interlock.policies.language.bundle import Source
from tiers import tier

O = Operation  # noqa: E741
V = VmState
STANDARD = CompiledPolicy(Source.read("standard").policy, PERFORMS)
NEVER = UpkeepTimes(resize_confirm_window_ms=0, reclaim_after_ms=0, offload_after_ms=0)
ALWAYS = RestartPolicy(on_crash=OnCrash.RESTART, on_power_off=OnPowerOff.RESTART)
T0 = 1_000_000


def running(policy: RestartPolicy | None, **more: Any) -> Instance:
    return Instance(id="vm", name="web", project="default", host="here", restart=policy, vm_state=V.ACTIVE, **more)


def ended(instance: Instance, event: GuestEvent, now_ms: int) -> Instance:
    return lifecycle.observe(instance, event, STANDARD, now_ms).instance


def asked(instance: Instance, operation: Operation, now_ms: int, by: str = "ann", **parameters: Any) -> Instance:
    submission = Submission(
        request_id=f"r{now_ms}", operation=operation, parameters=parameters, requested_by=by, role=Role.ADMIN
    )
    return admission.admit(instance, submission, STANDARD, now_ms).instance


def served(instance: Instance, outcome: Outcome, now_ms: int) -> Instance:
    taken = lifecycle.take(instance, None, now_ms)
    request = taken.answer
    assert isinstance(request, Request)
    finished = lifecycle.finish(taken.instance, request.id, request.fence, outcome, STANDARD, now_ms)
    return finished.instance


def restarted(instance: Instance, now_ms: int) -> Instance:
    """What the upkeep does when something is due: asks, and notes that it did."""
    due = scheduled_actions.due(instance, NEVER)
    assert due is not None
    assert due.at_ms <= now_ms
    action = due.alternatives[0]
    after = asked(instance, action.operation, now_ms, restarting.SERVER_REQUESTER, **action.parameters)
    return restarting.noted(instance, after)


@pytest.mark.parametrize("event", [GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.STOPPED])
def test_a_guest_is_left_as_it_is_unless_its_owner_said_otherwise(event: GuestEvent) -> None:
    for policy in (None, RestartPolicy()):
        assert scheduled_actions.due(ended(running(policy), event, T0), NEVER) is None


@pytest.mark.parametrize("event", [GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.STOPPED])
def test_it_is_started_again_after_the_back_off(event: GuestEvent) -> None:
    due = scheduled_actions.due(ended(running(ALWAYS), event, T0), NEVER)
    assert due is not None
    assert (due.at_ms, due.alternatives[0].operation) == (T0 + 1_000, O.START)


def test_a_crash_and_a_power_off_are_told_apart() -> None:
    policy = RestartPolicy(on_crash=OnCrash.RESTART)
    assert scheduled_actions.due(ended(running(policy), GuestEvent.STOPPED, T0), NEVER) is None
    assert scheduled_actions.due(ended(running(policy), GuestEvent.CRASHED, T0), NEVER) is not None


def test_a_crashed_guest_can_be_powered_off_instead() -> None:
    due = scheduled_actions.due(ended(running(RestartPolicy(on_crash=OnCrash.STOP)), GuestEvent.CRASHED, T0), NEVER)
    assert due is not None
    assert (due.at_ms, due.alternatives[0].operation, due.alternatives[0].parameters) == (T0, O.STOP, {"hard": True})


def test_what_was_asked_for_once_is_not_due_again() -> None:
    instance = restarted(ended(running(ALWAYS), GuestEvent.CRASHED, T0), T0 + 1_000)
    assert scheduled_actions.due(instance, NEVER) is None
    assert scheduled_actions.due(served(instance, Outcome.SUCCEEDED, T0 + 1_100), NEVER) is None


def test_a_restart_that_failed_counts_and_is_tried_again_later() -> None:
    instance = restarted(ended(running(ALWAYS), GuestEvent.CRASHED, T0), T0 + 1_000)
    due = scheduled_actions.due(served(instance, Outcome.FAILED, T0 + 1_100), NEVER)
    assert due is not None
    assert due.at_ms == T0 + 1_100 + 2_000


def test_a_restart_that_was_served_too_long_counts_and_is_tried_again_later() -> None:
    instance = restarted(ended(running(ALWAYS), GuestEvent.CRASHED, T0), T0 + 1_000)
    limited = msgspec.structs.replace(instance.outstanding[0], served_at_most_ms=60_000)
    instance = msgspec.structs.replace(instance, outstanding=(limited,))
    instance = lifecycle.take(instance, None, T0 + 1_000).instance
    for now_ms in (T0 + 61_000, T0 + 71_000):  # at its limit, and after the grace period
        instance = lifecycle.expire(instance, STANDARD, now_ms).instance
    due = scheduled_actions.due(instance, NEVER)
    assert due is not None
    assert due.at_ms == T0 + 71_000 + 2_000


def test_the_limit_is_said_where_its_owner_looks() -> None:
    instance = running(RestartPolicy(on_crash=OnCrash.RESTART, restarts_max=1, window_s=60))
    instance = restarted(ended(instance, GuestEvent.CRASHED, T0), T0 + 1_000)
    instance = served(instance, Outcome.SUCCEEDED, T0 + 1_100)
    change = lifecycle.observe(instance, GuestEvent.CRASHED, STANDARD, T0 + 2_000)
    assert scheduled_actions.due(change.instance, NEVER) is None
    assert "instance.gave_up" in [event.kind for event in change.events]
    assert change.instance.error == ("The guest crashed. It was restarted 1 times within 60 s; no more restarts.")


@pytest.mark.parametrize(("after_ms", "limited"), [(59_999, True), (60_000, False)])
def test_restarts_are_counted_afresh_at_the_end_of_the_window(after_ms: int, *, limited: bool) -> None:
    policy = RestartPolicy(on_crash=OnCrash.RESTART, restarts_max=1, window_s=60)
    tired = running(policy, restarts=Restarts(count=1, window_since_ms=T0))
    due = scheduled_actions.due(ended(tired, GuestEvent.CRASHED, T0 + after_ms), NEVER)
    assert (due is None) is limited


def test_the_delays_of_a_restart_policy_are_shorter_than_its_window() -> None:
    policy = RestartPolicy(on_crash=OnCrash.RESTART, restarts_max=2, window_s=4)
    assert policy.pauses_s == 3
    check_limit(policy)
    with pytest.raises(Invalid, match=r"before 2 restarts take 3 s together"):
        check_limit(msgspec.structs.replace(policy, window_s=3))


def test_a_stop_that_waits_keeps_a_crashed_guest_down() -> None:
    """What somebody asked for is never undone."""
    instance = asked(running(ALWAYS), O.STOP, T0)
    instance = ended(instance, GuestEvent.CRASHED, T0 + 1)
    assert scheduled_actions.due(served(instance, Outcome.SUCCEEDED, T0 + 2), NEVER) is None


def test_a_stop_that_failed_is_not_asked_for_again_nor_turned_into_a_restart() -> None:
    crashed = ended(running(RestartPolicy(on_crash=OnCrash.STOP)), GuestEvent.CRASHED, T0)
    assert scheduled_actions.due(served(restarted(crashed, T0), Outcome.FAILED, T0 + 1), NEVER) is None


def test_a_restart_that_was_called_off_meanwhile_is_not_tried_again_where_it_fails() -> None:
    asked_for = restarted(ended(running(ALWAYS), GuestEvent.CRASHED, T0), T0 + 1_000)
    without_scheduled_restart = msgspec.structs.replace(asked_for, restarts=None)
    assert scheduled_actions.due(served(without_scheduled_restart, Outcome.FAILED, T0 + 1_100), NEVER) is None


def test_only_what_came_to_no_end_is_kept_of_who_asked_for_it_to_be_taken_down() -> None:
    stopping = asked(running(ALWAYS, restarts=Restarts(count=1)), O.STOP, T0)
    assert served(stopping, Outcome.SUCCEEDED, T0 + 1).restarts is None
    assert served(stopping, Outcome.FAILED, T0 + 1).restarts == Restarts(asked_down=True)


def planned(instance: Instance, event: GuestEvent, now_ms: int = T0) -> bool:
    """Whether the end of its guest leads to a restart."""
    change = lifecycle.observe(instance, event, STANDARD, now_ms)
    return "instance.restart_due" in [told.kind for told in change.events]


def test_only_what_leads_to_where_no_guest_runs_keeps_a_crashed_guest_down() -> None:
    assert not planned(asked(running(ALWAYS), O.STOP, T0), GuestEvent.CRASHED)
    assert not planned(asked(running(ALWAYS), O.DELETE, T0), GuestEvent.CRASHED)
    assert planned(asked(running(ALWAYS), O.SNAPSHOT, T0, name="copy"), GuestEvent.CRASHED)
    assert planned(asked(running(ALWAYS), O.REBOOT, T0), GuestEvent.CRASHED)


def test_a_guest_that_reboots_itself_has_not_ended() -> None:
    for state in (V.ACTIVE, V.RESIZED):
        instance = msgspec.structs.replace(running(ALWAYS), vm_state=state, power_state=PowerState.RUNNING)
        after = ended(instance, GuestEvent.RESET, T0)
        assert (after.vm_state, after.restarts) == (state, None)


@pytest.mark.parametrize("event", [GuestEvent.STOPPED, GuestEvent.VANISHED, GuestEvent.CRASHED])
def test_the_end_of_what_was_to_be_off_already_is_no_reason_to_start_it(event: GuestEvent) -> None:
    for state in (V.STOPPED, V.ERROR, V.SHELVED):
        off = msgspec.structs.replace(running(ALWAYS), vm_state=state)
        assert not planned(off, event)


def test_the_end_of_a_lease_is_not_counted_and_what_was_counted_before_it_neither() -> None:
    tired = running(ALWAYS, restarts=Restarts(count=ALWAYS.restarts_max, window_since_ms=T0))
    after = ended(tired, GuestEvent.LEASE_ENDED, T0 + 5)
    due = scheduled_actions.due(after, NEVER)
    assert due is not None
    assert due.at_ms == T0 + 5 + 1_000
    assert after.restarts is not None
    assert after.restarts.count == 0


def test_a_stop_of_what_is_to_be_started_again_keeps_it_down() -> None:
    """The gate calls it redundant, since the guest is off; the restart that was due is not redundant with it."""
    instance = ended(running(ALWAYS), GuestEvent.STOPPED, T0)
    assert scheduled_actions.due(instance, NEVER) is not None
    after = asked(instance, O.STOP, T0 + 1)
    assert not after.outstanding
    assert scheduled_actions.due(after, NEVER) is None
    assert after.generation == instance.generation + 1


def test_a_stop_that_came_to_no_end_still_keeps_the_guest_down() -> None:
    """Its power button was pressed, and nobody can take that back."""
    instance = served(asked(running(ALWAYS), O.STOP, T0), Outcome.FAILED, T0 + 1)
    assert instance.vm_state is V.ACTIVE
    assert scheduled_actions.due(ended(instance, GuestEvent.STOPPED, T0 + 2), NEVER) is None


def test_a_reset_state_calls_off_what_was_due() -> None:
    instance = ended(running(ALWAYS), GuestEvent.CRASHED, T0)
    after = asked(instance, O.RESET_STATE, T0 + 1, vm_state="error", reason="under repair")
    assert scheduled_actions.due(after, NEVER) is None


def test_what_its_owner_does_begins_the_count_afresh() -> None:
    instance = running(RestartPolicy(on_crash=OnCrash.RESTART, restarts_max=1))
    instance = restarted(ended(instance, GuestEvent.CRASHED, T0), T0 + 1_000)
    instance = ended(served(instance, Outcome.SUCCEEDED, T0 + 1_100), GuestEvent.CRASHED, T0 + 2_000)
    assert scheduled_actions.due(instance, NEVER) is None
    instance = served(asked(instance, O.START, T0 + 3_000), Outcome.SUCCEEDED, T0 + 3_100)
    assert scheduled_actions.due(ended(instance, GuestEvent.CRASHED, T0 + 4_000), NEVER) is not None


@pytest.mark.parametrize("taken", [False, True])
def test_a_restart_that_its_owner_cancels_is_not_due_again(taken: bool) -> None:
    """Found by a deliberate change: a cancelled restart was due again at once, as if it had failed."""
    instance = restarted(ended(running(ALWAYS), GuestEvent.CRASHED, T0), T0 + 1_000)
    if taken:
        request = lifecycle.take(instance, None, T0 + 1_010)
        assert isinstance(request.answer, Request)
        stopping = lifecycle.cancel(request.instance, request.answer.id, STANDARD, "ann", T0 + 1_020).instance
        change = lifecycle.finish(
            stopping, request.answer.id, request.answer.fence, Outcome.INTERRUPTED, STANDARD, T0 + 1_030
        )
        assert not change.instance.outstanding
        instance = change.instance
    else:
        instance = lifecycle.cancel(instance, instance.outstanding[0].id, STANDARD, "ann", T0 + 1_020).instance
    assert not instance.outstanding
    assert scheduled_actions.due(instance, NEVER) is None


@pytest.mark.parametrize("operation", [O.PAUSE, O.REBOOT, O.SNAPSHOT, O.SET_PASSWORD])
@pytest.mark.parametrize("outcome", [Outcome.SUCCEEDED, Outcome.FAILED])
def test_what_its_owner_does_that_is_no_stop_does_not_end_restarts(operation: Operation, outcome: Outcome) -> None:
    """Found by a deliberate change: a pause that failed counted as a stop, and no crash was mended after it."""
    instance = asked(running(ALWAYS, power_state=PowerState.RUNNING), operation, T0)
    assert instance.outstanding, operation
    instance = served(instance, outcome, T0 + 1)
    if outcome is Outcome.SUCCEEDED and instance.vm_state is not V.ACTIVE:
        instance = msgspec.structs.replace(instance, vm_state=V.ACTIVE)
    assert scheduled_actions.due(ended(instance, GuestEvent.CRASHED, T0 + 2), NEVER) is not None


def test_a_policy_that_is_changed_holds_for_what_is_due() -> None:
    instance = ended(running(ALWAYS), GuestEvent.CRASHED, T0)
    instance = lifecycle.relabel(instance, STANDARD, "ann", T0 + 1, restart=RestartPolicy()).instance
    assert scheduled_actions.due(instance, NEVER) is None


@pytest.mark.parametrize("policy", [ALWAYS, RestartPolicy(restarts_max=9, backoff_s=7)])
def test_the_pauses_of_a_policy_are_those_that_a_boot_loop_meets(policy: RestartPolicy) -> None:
    counts = (Restarts(count=count) for count in range(policy.restarts_max))
    assert policy.pauses_s * 1000 == sum(restarts.put_off_ms(policy) for restarts in counts)


class BootLoop(RuleBasedStateMachine):
    """A guest that ends whenever it likes, and a model that keeps the whole history and counts from that."""

    @initialize(
        policy=st.builds(
            RestartPolicy,
            on_crash=st.just(OnCrash.RESTART),
            on_power_off=st.sampled_from(OnPowerOff),
            restarts_max=st.integers(1, 6),
            window_s=st.integers(1, 200),
            backoff_s=st.integers(1, 60),
        )
    )
    def begin(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self.now_ms = T0
        self.instance = running(policy)
        self.first_end_ms: int | None = None
        self.done = 0
        self.expected: int | None = None

    @rule(seconds=st.integers(0, 300))
    def pass_time(self, seconds: int) -> None:
        self.now_ms += seconds * 1000

    @precondition(lambda self: self.instance.vm_state is V.ACTIVE and not self.instance.outstanding)
    @rule(event=st.sampled_from([GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.STOPPED]))
    def end(self, event: GuestEvent) -> None:
        change = lifecycle.observe(self.instance, event, STANDARD, self.now_ms)
        self.instance = change.instance
        self._expect(change.instance.vm_state is V.ERROR or self.policy.on_power_off is OnPowerOff.RESTART)
        told = [told.kind for told in change.events]
        assert ("instance.restart_due" in told) == (self.expected is not None)
        self._compare()

    def _expect(self, wanted: bool) -> None:
        self.expected = None
        if not wanted:
            return
        if self.first_end_ms is None or self.now_ms - self.first_end_ms >= self.policy.window_s * 1000:
            self.first_end_ms, self.done = self.now_ms, 0
        if self.done < self.policy.restarts_max:
            wait_s = self.policy.backoff_s
            for _ in range(self.done):
                wait_s = min(60, wait_s * 2)
            self.expected = self.now_ms + wait_s * 1000

    @precondition(lambda self: self.expected is not None)
    @rule(outcome=st.sampled_from([Outcome.SUCCEEDED, Outcome.FAILED]))
    def restart(self, outcome: Outcome) -> None:
        assert self.expected is not None
        self.now_ms = max(self.now_ms, self.expected)
        self.instance = restarted(self.instance, self.now_ms)
        self.done += 1
        self.expected = None
        self._compare()
        self.instance = served(self.instance, outcome, self.now_ms)
        if outcome is Outcome.FAILED:
            self._expect(wanted=True)
        self._compare()

    @rule(operation=st.sampled_from([O.START, O.STOP]), hard=st.booleans())
    def owner(self, operation: Operation, hard: bool) -> None:
        self.now_ms += 1
        parameters: dict[str, Any] = {"hard": True} if hard and operation is O.STOP else {}
        after = asked(self.instance, operation, self.now_ms, **parameters)
        if after.outstanding:
            self.instance = served(after, Outcome.SUCCEEDED, self.now_ms)
            self.first_end_ms = self.expected = None
            self.done = 0
        else:
            self.instance = after
            if operation is O.STOP and self.expected is not None:
                self.first_end_ms = self.expected = None
                self.done = 0
        self._compare()

    def _compare(self) -> None:
        due = scheduled_actions.due(self.instance, NEVER)
        assert (None if due is None else due.at_ms) == self.expected
        if self.instance.vm_state is not V.ERROR:
            assert self.instance.error is None


BootLoop.TestCase.settings = settings(max_examples=tier(30, 750), stateful_step_count=25)
TestBootLoop = BootLoop.TestCase


# ---------------------------------------------------------------------------------------- resized, and not settled


def resized(policy: RestartPolicy | None) -> Instance:
    return msgspec.structs.replace(
        running(policy), vm_state=V.RESIZED, prior_vm_state=V.ACTIVE, power_state=PowerState.RUNNING, state_since_ms=T0
    )


@pytest.mark.parametrize("event", [GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.STOPPED])
def test_what_was_resized_waits_on_without_its_guest(event: GuestEvent) -> None:
    instance = ended(resized(None), event, T0)
    assert (instance.vm_state, instance.state_stack, instance.error) == (V.RESIZED, (V.ACTIVE, V.STOPPED), None)
    assert not instance.executing
    assert ended(instance, event, T0 + 1).state_stack == instance.state_stack
    confirmed = served(asked(instance, O.CONFIRM_RESIZE, T0 + 1), Outcome.SUCCEEDED, T0 + 2)
    assert (confirmed.vm_state, confirmed.state_stack) == (V.STOPPED, ())
    reverted = served(asked(instance, O.REVERT_RESIZE, T0 + 1), Outcome.SUCCEEDED, T0 + 2)
    assert (reverted.vm_state, reverted.state_stack) == (V.ACTIVE, ())
    assert served(asked(instance, O.START, T0 + 1), Outcome.SUCCEEDED, T0 + 2).vm_state is V.ACTIVE


def test_what_waits_behind_a_confirmation_is_judged_again_when_the_guest_ends() -> None:
    """A pause that was promised on a guest that runs makes no sense on one that does not."""
    waiting = asked(asked(resized(None), O.CONFIRM_RESIZE, T0), O.PAUSE, T0 + 1)
    assert [request.operation for request in waiting.outstanding] == [O.CONFIRM_RESIZE, O.PAUSE]
    left = ended(waiting, GuestEvent.STOPPED, T0 + 2)
    assert [request.operation for request in left.outstanding] == [O.CONFIRM_RESIZE]


@pytest.mark.parametrize(
    ("event", "policy", "action"),
    [
        (GuestEvent.CRASHED, RestartPolicy(on_crash=OnCrash.RESTART), O.START),
        (GuestEvent.VANISHED, RestartPolicy(on_crash=OnCrash.RESTART), O.START),
        (GuestEvent.STOPPED, RestartPolicy(on_crash=OnCrash.RESTART), None),
        (GuestEvent.STOPPED, ALWAYS, O.START),
        (GuestEvent.CRASHED, RestartPolicy(on_crash=OnCrash.STOP), None),
        (GuestEvent.CRASHED, RestartPolicy(), None),
    ],
)
def test_a_resized_guest_is_started_again_if_its_owner_said_so(
    event: GuestEvent, policy: RestartPolicy, action: Operation | None
) -> None:
    """By a start, which keeps the new size; otherwise it is confirmed in its time."""
    due = scheduled_actions.due(ended(resized(policy), event, T0), TIMES)
    assert due is not None
    expected = (T0 + 10, O.CONFIRM_RESIZE) if action is None else (T0 + 1_000, action)
    assert (due.at_ms, due.alternatives[0].operation) == expected


# ------------------------------------------------------------------------------------------------- what time brings


TIMES = UpkeepTimes(resize_confirm_window_ms=10, reclaim_after_ms=20, offload_after_ms=30)


@pytest.mark.parametrize(
    ("state", "after_ms", "operation"),
    [
        (V.RESIZED, 10, O.CONFIRM_RESIZE),
        (V.SOFT_DELETED, 20, O.DELETE),
        (V.SHELVED, 30, O.SHELVE_OFFLOAD),
    ],
)
def test_what_time_brings(state: VmState, after_ms: int, operation: Operation) -> None:
    instance = Instance(id="vm", name="web", project="p", host="h", vm_state=state, state_since_ms=T0)
    due = scheduled_actions.due(instance, TIMES)
    assert due is not None
    assert (due.at_ms, [action.operation for action in due.alternatives]) == (T0 + after_ms, [operation])
    assert scheduled_actions.due(instance, NEVER) is None
    older = Instance(id="vm", name="web", project="p", host="h", vm_state=state, updated_at_ms=T0 - 5)
    since = scheduled_actions.due(older, TIMES)
    assert since is not None
    assert since.at_ms == T0 - 5 + after_ms


def test_nothing_is_due_while_something_is_outstanding() -> None:
    instance = Instance(id="vm", name="web", project="p", host="h", vm_state=V.SOFT_DELETED, state_since_ms=T0)
    asking = Submission(request_id="r", operation=O.RESTORE, requested_by="ann", role=Role.ADMIN)
    change = admission.admit(instance, asking, STANDARD, T0 + 1)
    if isinstance(change.answer, Admitted):
        assert scheduled_actions.due(change.instance, TIMES) is None
    deleting = asked(instance, O.DELETE, T0 + 1)
    assert deleting.outstanding
    assert scheduled_actions.due(deleting, TIMES) is None
