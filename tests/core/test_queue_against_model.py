"""The core and an independent model of it, led through the same random lives: they must always answer alike."""

from __future__ import annotations

from typing import Any

import msgspec
from core_samples import ORDINARY, ask, instance_in
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from queue_model import BESIDE, GOES_BACK, KEEPS_WHERE_IT_WAS, LEADS_TO, NOTES, PERMITTED, Model

from check_history import check_history
from interlock.core import lifecycle
from interlock.core.admission import admit
from interlock.core.evaluation import would_admit
from interlock.core.operations import Lane, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    ENDS,
    SERVED,
    Admitted,
    Change,
    Denied,
    Event,
    GuestEvent,
    Held,
    Outcome,
    Redundant,
    Request,
    StaleFence,
)
from interlock.core.request_queue import foresee
from interlock.core.states import VmState
from tiers import tier

POLICY = CompiledPolicy(ORDINARY)
UNDOING = sorted({*KEEPS_WHERE_IT_WAS, *GOES_BACK, "shelve_offload"})
OPERATIONS = sorted({*LEADS_TO, *UNDOING, *BESIDE, *NOTES})
LANES = {"state": Lane.STATE, "component": Lane.COMPONENT, "any": None}
BEGINNING = 10_000_000
MOVES = {GuestEvent.STOPPED, GuestEvent.RESET, GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.LEASE_ENDED}
"""What tells that a guest rebooted or ended; every other event is about trouble that it has, and changes no state."""


class Lives(RuleBasedStateMachine):
    """One instance, told twice."""

    @initialize(state=st.sampled_from(["active", "stopped", "building", "paused", "error"]))
    def begin(self, state: str) -> None:
        self.now = BEGINNING
        self.model = Model(place=(state,), alive_at=self.now)
        self.instance = instance_in(VmState(state), updated_at_ms=self.now)
        self.count = 0
        self.workers: list[tuple[str, int]] = []
        self.ended: dict[str, str] = {}
        self.told_ends: dict[str, int] = {}
        self.history: list[Event] = []

    def follow(self, change: Change[Any]) -> None:
        before, self.instance = self.instance, change.instance
        assert self.instance.fence >= before.fence
        assert self.instance.generation >= before.generation
        if self.instance != before:
            assert self.instance.generation == before.generation + 1
        for request in change.requests:
            if request.status in ENDS:
                assert request.id not in self.ended, "a request ends once"
                self.ended[request.id] = request.status.value
        for event in change.events:
            self.history.append(msgspec.structs.replace(event, sequence=len(self.history) + 1))
            if event.kind.removeprefix("request.") in {end.value for end in ENDS}:
                self.told_ends[event.request_id or ""] = self.told_ends.get(event.request_id or "", 0) + 1

    @rule(operation=st.sampled_from(OPERATIONS))
    def submit(self, operation: str) -> None:
        self.count += 1
        name = f"r{self.count}"
        submission = ask(Operation(operation), name)
        change = admit(self.instance, submission, POLICY, self.now)
        assert would_admit(self.instance, submission, POLICY, self.now) is isinstance(change.answer, Admitted)
        expected = self.model.ask(operation, name, self.now)
        answer = change.answer
        before = self.instance
        self.follow(change)
        match answer:
            case Admitted():
                assert expected == "admitted"
            case Redundant():
                assert expected == "redundant"
            case Held():
                raise AssertionError("nothing was to be held")
            case Denied():
                assert expected == "denied"
                assert answer.rule
                assert answer.reason
                assert answer.blocked_by is not None or not before.outstanding
        if not isinstance(answer, Admitted):
            assert self.instance == before

    @rule(lane=st.sampled_from(sorted(LANES)))
    def take(self, lane: str) -> None:
        change = lifecycle.take(self.instance, LANES[lane], self.now)
        taken = change.answer
        ahead = self.model.ahead_of(taken.id) if taken is not None else []
        assert (taken and taken.id) == self.model.take(lane, self.now)
        if taken is not None:
            beside = taken.lane is Lane.COMPONENT and self.model.changing is not None
            assert not ahead or beside, "law 12: served in turn"
            assert not any(other.plugs or other.overtakes for other in ahead), "law 12: served in turn"
            self.workers.append((taken.id, taken.fence))
        self.follow(change)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), outcome=st.sampled_from(list(Outcome)))
    def finish(self, data: st.DataObject, outcome: Outcome) -> None:
        """Any worker that ever was reports, whether it may or not."""
        name, fence = data.draw(st.sampled_from(self.workers[-4:]))
        change = lifecycle.finish(self.instance, name, fence, outcome, POLICY, self.now)
        self.compare_report(change, self.model.report(name, fence, outcome.value, self.now), name)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        name, fence = data.draw(st.sampled_from(self.workers[-4:]))
        change = lifecycle.progress(self.instance, name, fence, self.now)
        allowed = self.model.breathe(name, fence, self.now)
        self.compare_report(change, None if allowed else "stale", name)

    @precondition(lambda self: not self.model.outstanding)
    @rule(data=st.data(), count=st.integers(1, 5))
    def do_and_undo(self, data: st.DataObject, count: int) -> None:
        """Some that keep where it was or go back there, one after the other: each that the state permits."""
        for _ in range(count):
            permitted = [operation for operation in UNDOING if self.model.state in PERMITTED[operation]]
            if permitted:
                self.submit(data.draw(st.sampled_from(permitted)))
                self.take("state")
                name, fence = self.workers[-1]
                change = lifecycle.finish(self.instance, name, fence, Outcome.SUCCEEDED, POLICY, self.now)
                self.compare_report(change, self.model.report(name, fence, "succeeded", self.now), name)

    def compare_report(self, change: Change[Request | StaleFence], expected: str | None, name: str) -> None:
        if isinstance(change.answer, StaleFence):
            assert expected == "stale"
            assert change.instance is self.instance
            assert [(event.kind, event.request_id) for event in change.events] == [("request.fenced", name)]
        else:
            assert expected in {None, change.answer.status.value}
        self.follow(change)

    @rule()
    def adopt(self) -> None:
        change = lifecycle.adopt(self.instance, self.now)
        assert sorted(request.id for request in change.answer) == self.model.adopt(self.now)
        self.workers.extend((request.id, request.fence) for request in change.answer)
        self.follow(change)

    @rule(event=st.sampled_from(list(GuestEvent)))
    def observe(self, event: GuestEvent) -> None:
        self.follow(lifecycle.observe(self.instance, event, POLICY, self.now))
        if event in MOVES:
            self.model.guest(event.value, self.now)

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = f"r{data.draw(st.integers(max(1, self.count - 5), self.count))}"
        change = lifecycle.cancel(self.instance, name, POLICY, "ada", self.now)
        assert change.answer.value == self.model.withdraw(name)
        self.follow(change)

    @rule(step=st.sampled_from([-200_000, -5_000, 1_000, 9_999, 10_000, 60_000, 179_999, 180_000]))
    def let_time_pass(self, step: int) -> None:
        """The clock may also jump back."""
        self.now += step

    @rule()
    def expire(self) -> None:
        change = lifecycle.expire(self.instance, POLICY, self.now)
        assert sorted(change.answer) == self.model.time_out(self.now)
        self.follow(change)

    @invariant()
    def the_two_agree(self) -> None:
        model, instance = self.model, self.instance
        assert instance.vm_state.value == model.state
        assert (instance.vm_state, *instance.state_stack) == model.place
        assert (instance.locked_by is not None) == model.locked
        assert instance.fence == model.fence
        assert {request.id for request in instance.outstanding} == {asked.name for asked in model.outstanding}
        assert foresee(instance).vm_state.value == model.foreseen()
        assert self.ended == model.ends

    @invariant()
    def one_is_served_at_a_time_under_the_present_fence(self) -> None:
        served = [request for request in self.instance.outstanding if request.status in SERVED]
        assert len({request.lane for request in served}) == len(served)
        assert all(request.fence == self.instance.fence for request in served)
        assert list(self.instance.outstanding[: len(served)]) == served

    def teardown(self) -> None:
        """The checker of recorded histories finds nothing in a life that the model agrees with."""
        if hasattr(self, "history"):
            assert check_history(self.history, [self.instance]) == []

    @invariant()
    def every_end_is_told_once(self) -> None:
        assert self.told_ends == dict.fromkeys(self.ended, 1)


Lives.TestCase.settings = settings(max_examples=tier(30, 750), stateful_step_count=40)
TestLives = Lives.TestCase
