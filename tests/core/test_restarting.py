"""When a guest that ended by itself is started again: rule by rule, and against a model that counts for itself."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from interlock.core import admission, lifecycle, restarting, upkeep
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, GuestEvent, Instance, Outcome, Request, Submission
from interlock.core.restart_policy import OnCrash, OnPowerOff, RestartPolicy, Restarts
from interlock.core.states import PowerState, VmState
from interlock.core.upkeep import UpkeepTimes
from interlock.driver.operations import PERFORMS
from interlock.policies.sources import Source

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
        request_id=f"r{now_ms}", operation=operation, parameters=parameters, requested_by=by, role="admin"
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
    due = upkeep.due(instance, NEVER)
    assert due is not None
    assert due.at_ms <= now_ms
    wish = due.wishes[0]
    after = asked(instance, wish.operation, now_ms, restarting.UPKEEP, **wish.parameters)
    return restarting.noted(instance, after)


@pytest.mark.parametrize("event", [GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.STOPPED])
def test_a_guest_is_left_as_it_is_unless_its_owner_said_otherwise(event: GuestEvent) -> None:
    for policy in (None, RestartPolicy()):
        assert upkeep.due(ended(running(policy), event, T0), NEVER) is None


@pytest.mark.parametrize("event", [GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.STOPPED])
def test_it_is_started_again_after_the_back_off(event: GuestEvent) -> None:
    due = upkeep.due(ended(running(ALWAYS), event, T0), NEVER)
    assert due is not None
    assert (due.at_ms, due.wishes[0].operation) == (T0 + 1_000, O.START)


def test_a_crash_and_a_power_off_are_told_apart() -> None:
    policy = RestartPolicy(on_crash=OnCrash.RESTART)
    assert upkeep.due(ended(running(policy), GuestEvent.STOPPED, T0), NEVER) is None
    assert upkeep.due(ended(running(policy), GuestEvent.CRASHED, T0), NEVER) is not None


def test_a_crashed_guest_can_be_powered_off_instead() -> None:
    due = upkeep.due(ended(running(RestartPolicy(on_crash=OnCrash.STOP)), GuestEvent.CRASHED, T0), NEVER)
    assert due is not None
    assert (due.at_ms, due.wishes[0].operation, due.wishes[0].parameters) == (T0, O.STOP, {"hard": True})


def test_what_was_asked_for_once_is_not_due_again() -> None:
    instance = restarted(ended(running(ALWAYS), GuestEvent.CRASHED, T0), T0 + 1_000)
    assert upkeep.due(instance, NEVER) is None
    assert upkeep.due(served(instance, Outcome.SUCCEEDED, T0 + 1_100), NEVER) is None


def test_a_restart_that_failed_counts_and_is_tried_again_later() -> None:
    instance = restarted(ended(running(ALWAYS), GuestEvent.CRASHED, T0), T0 + 1_000)
    due = upkeep.due(served(instance, Outcome.FAILED, T0 + 1_100), NEVER)
    assert due is not None
    assert due.at_ms == T0 + 1_100 + 2_000


def test_the_limit_is_said_where_its_owner_looks() -> None:
    instance = running(RestartPolicy(on_crash=OnCrash.RESTART, restarts_max=1, window_s=60))
    instance = restarted(ended(instance, GuestEvent.CRASHED, T0), T0 + 1_000)
    instance = served(instance, Outcome.SUCCEEDED, T0 + 1_100)
    change = lifecycle.observe(instance, GuestEvent.CRASHED, STANDARD, T0 + 2_000)
    assert upkeep.due(change.instance, NEVER) is None
    assert "instance.gave_up" in [event.kind for event in change.events]
    assert change.instance.error == (
        "The guest crashed. It was restarted 1 times within 60 s, and is now left as it is."
    )


def test_a_stop_that_waits_keeps_a_crashed_guest_down() -> None:
    """What somebody asked for is never undone."""
    instance = asked(running(ALWAYS), O.STOP, T0)
    instance = ended(instance, GuestEvent.CRASHED, T0 + 1)
    assert upkeep.due(served(instance, Outcome.SUCCEEDED, T0 + 2), NEVER) is None


def test_a_stop_of_what_is_to_be_started_again_keeps_it_down() -> None:
    """The gate calls it redundant, since the guest is off; the restart that was due is not redundant with it."""
    instance = ended(running(ALWAYS), GuestEvent.STOPPED, T0)
    assert upkeep.due(instance, NEVER) is not None
    after = asked(instance, O.STOP, T0 + 1)
    assert not after.outstanding
    assert upkeep.due(after, NEVER) is None
    assert after.generation == instance.generation + 1


def test_a_stop_that_came_to_no_end_still_keeps_the_guest_down() -> None:
    """Its power button was pressed, and nobody can take that back."""
    instance = served(asked(running(ALWAYS), O.STOP, T0), Outcome.FAILED, T0 + 1)
    assert instance.vm_state is V.ACTIVE
    assert upkeep.due(ended(instance, GuestEvent.STOPPED, T0 + 2), NEVER) is None


def test_a_reset_state_calls_off_what_was_due() -> None:
    instance = ended(running(ALWAYS), GuestEvent.CRASHED, T0)
    after = asked(instance, O.RESET_STATE, T0 + 1, vm_state="error", reason="under repair")
    assert upkeep.due(after, NEVER) is None


def test_what_its_owner_does_begins_the_count_afresh() -> None:
    instance = running(RestartPolicy(on_crash=OnCrash.RESTART, restarts_max=1))
    instance = restarted(ended(instance, GuestEvent.CRASHED, T0), T0 + 1_000)
    instance = ended(served(instance, Outcome.SUCCEEDED, T0 + 1_100), GuestEvent.CRASHED, T0 + 2_000)
    assert upkeep.due(instance, NEVER) is None
    instance = served(asked(instance, O.START, T0 + 3_000), Outcome.SUCCEEDED, T0 + 3_100)
    assert upkeep.due(ended(instance, GuestEvent.CRASHED, T0 + 4_000), NEVER) is not None


def test_a_policy_that_is_changed_holds_for_what_is_due() -> None:
    instance = ended(running(ALWAYS), GuestEvent.CRASHED, T0)
    instance = lifecycle.relabel(instance, "ann", T0 + 1, restart=RestartPolicy()).instance
    assert upkeep.due(instance, NEVER) is None


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
        due = upkeep.due(self.instance, NEVER)
        assert (None if due is None else due.at_ms) == self.expected
        if self.instance.vm_state is not V.ERROR:
            assert self.instance.error is None


BootLoop.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestBootLoop = BootLoop.TestCase


# ---------------------------------------------------------------------------------------- resized, and not settled


def resized(policy: RestartPolicy | None) -> Instance:
    return msgspec.structs.replace(
        running(policy), vm_state=V.RESIZED, prior_vm_state=V.ACTIVE, power_state=PowerState.RUNNING, state_since_ms=T0
    )


@pytest.mark.parametrize("event", [GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.STOPPED])
def test_what_was_resized_waits_on_without_its_guest(event: GuestEvent) -> None:
    instance = ended(resized(None), event, T0)
    assert (instance.vm_state, instance.memory, instance.error) == (V.RESIZED, (V.ACTIVE, V.STOPPED), None)
    assert not instance.executing
    assert ended(instance, event, T0 + 1).memory == instance.memory
    confirmed = served(asked(instance, O.CONFIRM_RESIZE, T0 + 1), Outcome.SUCCEEDED, T0 + 2)
    assert (confirmed.vm_state, confirmed.memory) == (V.STOPPED, ())
    reverted = served(asked(instance, O.REVERT_RESIZE, T0 + 1), Outcome.SUCCEEDED, T0 + 2)
    assert (reverted.vm_state, reverted.memory) == (V.ACTIVE, ())
    assert served(asked(instance, O.START, T0 + 1), Outcome.SUCCEEDED, T0 + 2).vm_state is V.ACTIVE


def test_what_waits_behind_a_confirmation_is_judged_again_when_the_guest_ends() -> None:
    """A pause that was promised on a guest that runs makes no sense on one that does not."""
    waiting = asked(asked(resized(None), O.CONFIRM_RESIZE, T0), O.PAUSE, T0 + 1)
    assert [request.operation for request in waiting.outstanding] == [O.CONFIRM_RESIZE, O.PAUSE]
    left = ended(waiting, GuestEvent.STOPPED, T0 + 2)
    assert [request.operation for request in left.outstanding] == [O.CONFIRM_RESIZE]


@pytest.mark.parametrize(
    ("event", "policy", "wish"),
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
    event: GuestEvent, policy: RestartPolicy, wish: Operation | None
) -> None:
    """By a start, which keeps the new size; otherwise it is confirmed in its time."""
    due = upkeep.due(ended(resized(policy), event, T0), TIMES)
    assert due is not None
    expected = (T0 + 10, O.CONFIRM_RESIZE) if wish is None else (T0 + 1_000, wish)
    assert (due.at_ms, due.wishes[0].operation) == expected


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
    due = upkeep.due(instance, TIMES)
    assert due is not None
    assert (due.at_ms, [wish.operation for wish in due.wishes]) == (T0 + after_ms, [operation])
    assert upkeep.due(instance, NEVER) is None
    older = Instance(id="vm", name="web", project="p", host="h", vm_state=state, updated_at_ms=T0 - 5)
    since = upkeep.due(older, TIMES)
    assert since is not None
    assert since.at_ms == T0 - 5 + after_ms


def test_nothing_is_due_while_something_is_outstanding() -> None:
    instance = Instance(id="vm", name="web", project="p", host="h", vm_state=V.SOFT_DELETED, state_since_ms=T0)
    asking = Submission(request_id="r", operation=O.RESTORE, requested_by="ann", role="admin")
    change = admission.admit(instance, asking, STANDARD, T0 + 1)
    if isinstance(change.answer, Admitted):
        assert upkeep.due(change.instance, TIMES) is None
    deleting = asked(instance, O.DELETE, T0 + 1)
    assert deleting.outstanding
    assert upkeep.due(deleting, TIMES) is None
