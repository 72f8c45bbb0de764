"""The checker of recorded histories finds nothing in a true one, and the mistake in each that was tampered with."""

from __future__ import annotations

from typing import Any

import msgspec
from core_samples import ORDINARY, STUCK_MS, O, V, ask, instance_in

from check_history import HistoryViolation, check_history
from interlock.core import lifecycle
from interlock.core.admission import admit
from interlock.core.operations import Lane
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Change, Event, GuestEvent, Instance, Outcome, Request, Status

POLICY = CompiledPolicy(ORDINARY)
replace = msgspec.structs.replace


class Story:
    """One instance, and all that was told of it."""

    def __init__(self) -> None:
        self.instance: Instance = instance_in(V.ACTIVE)
        self.events: list[Event] = []
        self.now_ms = 1_000_000

    def follow(self, change: Change[Any]) -> Any:
        self.instance = change.instance
        for event in change.events:
            self.events.append(replace(event, sequence=len(self.events) + 1))
        return change.answer

    def submit(self, operation: O, name: str) -> None:
        self.follow(admit(self.instance, ask(operation, name), POLICY, self.now_ms))

    def take(self, lane: Lane | None = None) -> Request:
        taken: Request | None = self.follow(lifecycle.take(self.instance, lane, self.now_ms))
        assert taken is not None
        return taken

    def finish(self, request: Request, outcome: Outcome = Outcome.SUCCEEDED) -> None:
        self.follow(lifecycle.finish(self.instance, request.id, request.fence, outcome, POLICY, self.now_ms))

    def place(self, kind: str, request_id: str | None = None) -> int:
        wanted = {request_id} if request_id is not None else {event.request_id for event in self.events}
        return next(i for i, event in enumerate(self.events) if event.kind == kind and event.request_id in wanted)

    def check(self, **more: Any) -> list[HistoryViolation]:
        return check_history(self.events, [self.instance], **more)

    def laws(self, **more: Any) -> set[int]:
        return {violation.law for violation in self.check(**more)}


def eventful() -> Story:
    """A stop, a start behind it, a reboot that is taken over, one that is adopted, a crash, and refusals."""
    story = Story()
    story.submit(O.STOP, "a")
    story.submit(O.START, "b")
    story.submit(O.REBOOT, "denied")
    story.finish(story.take())
    story.finish(story.take())
    story.submit(O.REBOOT, "c")
    lost = story.take()
    story.now_ms += STUCK_MS
    story.submit(O.REBOOT, "d")
    story.finish(lost)
    story.take()
    story.follow(lifecycle.adopt(story.instance, story.now_ms))
    story.submit(O.PAUSE, "e")
    story.follow(lifecycle.observe(story.instance, GuestEvent.CRASHED, POLICY, story.now_ms))
    adopted = story.instance.outstanding[0]
    story.finish(adopted, Outcome.FAILED)
    return story


def test_a_true_history_has_no_violations() -> None:
    """Takeover, late worker, adoption, guest event and refusal included."""
    story = eventful()
    told = {event.kind for event in story.events}
    assert {"request.superseded", "request.fenced", "instance.adopted", "request.denied", "guest.crashed"} <= told
    assert {"request.failed", "request.cancelled", "instance.state"} <= told
    assert story.check(acknowledged=["a", "b", "c", "d", "e"], settled=True) == []


def test_two_state_changes_in_flight_break_law_1() -> None:
    """One at a time."""
    story = Story()
    story.submit(O.STOP, "a")
    story.submit(O.START, "b")
    first = story.take()
    taken = story.events[story.place("request.taken", "a")]
    second = replace(first, id="b", operation=O.START, phase="powering_on")
    story.instance = replace(story.instance, outstanding=(first, second))
    story.events.append(replace(taken, request_id="b", sequence=99))
    assert story.laws() == {1}


def test_progress_of_what_was_never_taken_breaks_law_1() -> None:
    """Nobody works on what waits."""
    story = Story()
    story.submit(O.STOP, "a")
    told = story.events[0]
    story.events.append(replace(told, kind="request.progress", data={"phase": "powering_off"}, sequence=2))
    assert story.laws() == {1}


def test_a_cancellation_behind_a_success_breaks_law_2() -> None:
    """A promise: what came before it succeeded."""
    story = Story()
    story.submit(O.STOP, "a")
    story.submit(O.START, "b")
    story.finish(story.take())
    success = story.events[story.place("request.succeeded")]
    data = {"operation": "start", "reason": "not_allowed"}
    story.events.append(replace(success, kind="request.cancelled", request_id="b", data=data, sequence=99))
    story.instance = replace(story.instance, outstanding=())
    assert story.laws() == {2}


def test_a_decision_that_overlooks_what_is_outstanding_breaks_law_2() -> None:
    """The gate looked at an old queue."""
    story = Story()
    story.submit(O.STOP, "a")
    story.submit(O.REBOOT, "b")
    place = story.place("request.denied")
    data = story.events[place].data
    story.events[place] = replace(story.events[place], data=data | {"view": data["view"] | {"outstanding": 0}})
    assert story.laws() == {2}


def test_a_second_end_breaks_law_3() -> None:
    """One end."""
    story = eventful()
    end = story.events[story.place("request.succeeded", "a")]
    story.events.append(replace(end, kind="request.failed", sequence=99, generation=story.instance.generation))
    assert story.laws() == {3}


def test_an_end_that_was_not_told_breaks_law_3() -> None:
    """Without its end a request is neither ended nor outstanding."""
    story = eventful()
    del story.events[story.place("request.cancelled", "e")]
    assert story.laws() == {3}


def test_an_act_after_the_end_breaks_law_3() -> None:
    """What has ended makes no progress."""
    story = eventful()
    end = story.events[story.place("request.succeeded", "b")]
    late = replace(end, kind="request.progress", data={"phase": "powering_on"})
    story.events.insert(story.place("request.succeeded", "b") + 1, late)
    story.events = [replace(event, sequence=number) for number, event in enumerate(story.events, 1)]
    assert story.laws() == {3}


def test_an_end_of_what_was_never_admitted_breaks_law_3() -> None:
    """Out of nothing."""
    story = eventful()
    del story.events[story.place("request.admitted", "e")]
    assert 3 in story.laws()


def test_an_end_of_what_was_never_taken_breaks_law_3() -> None:
    """Nobody did it."""
    story = eventful()
    del story.events[story.place("request.taken", "a")]
    assert 3 in story.laws()


def test_a_takeover_without_a_fence_breaks_law_4() -> None:
    """The superseded worker could still act."""
    story = eventful()
    del story.events[story.place("instance.fenced")]
    assert 4 in story.laws()


def test_work_under_an_old_fence_breaks_law_4() -> None:
    """What is taken, is taken under the present fence."""
    story = eventful()
    place = story.place("request.taken", "d")
    story.events[place] = replace(story.events[place], data=story.events[place].data | {"fence": 1})
    assert story.laws() == {4}


def test_a_generation_that_goes_back_breaks_law_4() -> None:
    """A decision was made on an instance that had changed meanwhile."""
    story = eventful()
    story.events[-1] = replace(story.events[-1], generation=1)
    assert 4 in story.laws()


def test_a_request_that_never_ends_breaks_law_5() -> None:
    """With all the time that it needs, everything ends."""
    story = Story()
    story.submit(O.STOP, "a")
    assert story.check() == []
    assert story.laws(settled=True) == {5}


def test_a_refusal_for_what_was_reported_done_breaks_law_7() -> None:
    """No refusal follows from the one that was just reported done."""
    story = Story()
    story.submit(O.STOP, "a")
    story.submit(O.REBOOT, "b")
    refusal = story.events[story.place("request.denied")]
    story.finish(story.take())
    story.events.append(replace(refusal, sequence=99, generation=story.instance.generation))
    assert story.laws() == {7}
    assert any("has ended" in violation.what for violation in story.check())


def test_a_final_state_that_the_history_does_not_lead_to_breaks_law_7() -> None:
    """The record and its history are one."""
    story = eventful()
    story.instance = replace(story.instance, vm_state=V.PAUSED)
    assert story.laws() == {7}


def test_a_lost_acknowledged_request_breaks_law_9() -> None:
    """Acknowledged means durable."""
    story = eventful()
    assert story.laws(acknowledged=["a", "gone"]) == {9}


def test_a_sequence_that_goes_back_breaks_law_9() -> None:
    """The history has one order."""
    story = eventful()
    story.events[3] = replace(story.events[3], sequence=1)
    assert story.laws() == {9}


def test_instances_are_judged_apart() -> None:
    """The events of many instances come mixed, as a store keeps them."""
    one, other = eventful(), eventful()
    renamed = [replace(event, instance_id="i-2") for event in other.events]
    mixed = [event for pair in zip(one.events, renamed, strict=True) for event in pair]
    mixed = [replace(event, sequence=number) for number, event in enumerate(mixed, 1)]
    assert check_history(mixed, [one.instance, replace(other.instance, id="i-2")], settled=True) == []


def test_events_that_were_read_back_from_json_are_judged_alike() -> None:
    """A store gives data as plain JSON."""
    story = eventful()
    story.events = msgspec.json.decode(msgspec.json.encode(story.events), type=list[Event])
    assert story.check(settled=True) == []


def test_an_unfinished_request_in_the_instance_must_be_in_the_history() -> None:
    """The other way round: nothing is outstanding that was not admitted."""
    story = Story()
    stray = Request(
        id="x", instance_id="i-1", operation=O.STOP, requested_by="x", rule="x", admitted_at_ms=0, status=Status.QUEUED
    )
    story.instance = replace(story.instance, outstanding=(stray,))
    assert story.laws() == {3}
