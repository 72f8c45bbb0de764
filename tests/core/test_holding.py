"""What is held: kept until the policy admits it, exactly when that is, in order, and never for ever."""

from __future__ import annotations

from core_samples import START_MS, STUCK_MS, O, V, ask, compiled, instance_in, queue, rule, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from interlock.core.admission import admit
from interlock.core.holds import judge_held
from interlock.core.lifecycle import cancel, expire, finish, next_deadline_ms, observe, relabel, take
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.records import (
    ENDS,
    Admitted,
    Cancellation,
    Denied,
    Event,
    GuestEvent,
    Held,
    Instance,
    Outcome,
    Redundant,
    Status,
)
from tiers import tier

HOUR_MS = 3_600_000

NO_TASKS = frozenset({"none"})
POLICY = compiled(
    rule("delete", {O.DELETE}, Verdict.PREEMPT),
    rule("pausing", {O.REBOOT}, Verdict.AFTER, task_states=frozenset({"pausing"}), threshold_ms=STUCK_MS),
    rule("held", {O.STOP}, Verdict.REDUNDANT, held=frozenset({O.STOP}), reason="already_held"),
    rule("protected", frozenset(O), Verdict.DENY, blocked=True),
    rule("start", {O.START}, Verdict.ADMIT, vm_states=frozenset({V.STOPPED})),
    rule("running", {O.START}, Verdict.REDUNDANT, vm_states=frozenset({V.ACTIVE}), reason="running"),
    rule("active", {O.STOP, O.PAUSE, O.REBOOT}, Verdict.ADMIT, vm_states=frozenset({V.ACTIVE}), task_states=NO_TASKS),
    rule("unpause", {O.UNPAUSE}, Verdict.ADMIT, vm_states=frozenset({V.PAUSED})),
    rule("quiet", {O.REBUILD}, Verdict.ADMIT, task_states=frozenset({"pausing"}), silent_ms_min=60_000, in_turn=False),
)  # fmt: skip


def hold(instance: Instance, operation: Operation, name: str = "h1", now_ms: int = START_MS) -> Instance:
    change = admit(instance, ask(operation, name, hold_ms=HOUR_MS), POLICY, now_ms)
    assert isinstance(change.answer, Held), change.answer
    assert change.answer.request.status is Status.HELD
    assert [event.kind for event in change.events] == ["request.held"]
    return change.instance


def settle(instance: Instance, now_ms: int, policy: CompiledPolicy = POLICY) -> Instance:
    """What a driver does at that moment."""
    while True:
        change = expire(instance, policy, now_ms)
        if change.instance is instance:
            return instance
        instance = change.instance


def test_what_is_admitted_at_once_is_not_held() -> None:
    answer = admit(instance_in(V.ACTIVE), ask(O.PAUSE, hold_ms=HOUR_MS), POLICY, START_MS).answer
    assert isinstance(answer, Admitted)


def test_what_is_redundant_is_not_held() -> None:
    answer = admit(instance_in(V.ACTIVE), ask(O.START, hold_ms=HOUR_MS), POLICY, START_MS).answer
    assert isinstance(answer, Redundant)


def test_what_no_driver_performs_is_not_held() -> None:
    """No change of the instance, and no time, would ever admit it."""
    policy = CompiledPolicy(POLICY.policy, performs=frozenset({O.STOP}))
    change = admit(instance_in(V.ACTIVE), ask(O.UNPAUSE, "h1", hold_ms=HOUR_MS), policy, START_MS)
    assert isinstance(change.answer, Denied), change.answer
    assert change.answer.reason == "not_performed"


def test_what_is_held_is_admitted_with_its_own_id_when_the_state_allows_it() -> None:
    held = hold(serving(O.PAUSE), O.UNPAUSE)
    assert held.outstanding[0].id == "r0"
    ended = finish(held, "r0", 1, Outcome.SUCCEEDED, POLICY, START_MS + 500).instance
    assert next_deadline_ms(ended) == START_MS + 500, "it is due at once"
    change = expire(ended, POLICY, START_MS + 500)
    assert change.answer == ("h1",)
    assert [(one.id, one.status, one.rule) for one in change.instance.outstanding] == [("h1", Status.QUEUED, "unpause")]
    assert change.instance.held == ()
    assert [event.kind for event in change.events] == ["request.admitted"]


def test_what_is_held_is_admitted_at_the_very_moment_that_its_refusal_names() -> None:
    held = settle(hold(serving(O.PAUSE), O.REBOOT), START_MS)
    assert next_deadline_ms(held) == START_MS + STUCK_MS
    assert settle(held, START_MS + STUCK_MS - 1).held
    over = settle(held, START_MS + STUCK_MS)
    assert [(one.id, one.status) for one in over.outstanding] == [("h1", Status.QUEUED)]
    assert over.fence == 2, "it took over"


def test_a_silence_that_changes_the_answer_is_waited_for() -> None:
    held = settle(hold(serving(O.PAUSE), O.REBUILD), START_MS)
    assert next_deadline_ms(held) == START_MS + 60_000
    assert [one.id for one in settle(held, START_MS + 60_000).outstanding] == ["r0", "h1"]


def test_it_is_given_up_when_its_time_is_over() -> None:
    held = settle(hold(instance_in(V.ACTIVE), O.UNPAUSE), START_MS)
    assert next_deadline_ms(held) == START_MS + HOUR_MS
    change = expire(held, POLICY, START_MS + HOUR_MS)
    (ended,) = change.requests
    assert (ended.status, ended.reason) == (Status.CANCELLED, "hold_expired")
    assert (change.instance.held, next_deadline_ms(change.instance)) == ((), None)


def test_what_somebody_else_is_bringing_about_waits_for_that() -> None:
    """It may fail, and is then done after all."""
    policy = compiled(
        rule("coming", {O.START}, Verdict.REDUNDANT, outstanding=frozenset({O.START}), reason="coming"),
        rule("start", {O.START}, Verdict.ADMIT, vm_states=frozenset({V.STOPPED})),
    )
    held = admit(instance_in(V.ACTIVE), ask(O.START, "h1", hold_ms=HOUR_MS), policy, START_MS).instance
    stopped = replace(held, vm_state=V.STOPPED)
    coming = settle(admit(stopped, ask(O.START, "r1"), policy, START_MS).instance, START_MS, policy)
    assert ([one.id for one in coming.outstanding], [one.id for one in coming.held]) == (["r1"], ["h1"])


def test_what_comes_true_by_itself_ends_it() -> None:
    held = hold(instance_in(V.STOPPED), O.UNPAUSE)
    held = hold(held, O.STOP, "h2")
    assert admit(held, ask(O.STOP, "r9"), POLICY, START_MS).answer.reason == "already_held"  # type: ignore[union-attr]
    change = expire(hold(instance_in(V.PAUSED), O.START), POLICY, START_MS)
    assert change.instance.held
    active = finish(
        take(queue(change.instance, POLICY, O.UNPAUSE), None, START_MS).instance,
        *("q1", 1, Outcome.SUCCEEDED, POLICY, START_MS),
    )
    ended = expire(active.instance, POLICY, START_MS).requests
    assert [(one.id, one.status, one.reason) for one in ended] == [("h1", Status.CANCELLED, "running")]


def test_those_whose_moment_comes_together_are_admitted_in_the_order_held() -> None:
    held = hold(hold(instance_in(V.STOPPED), O.PAUSE, "h1"), O.REBOOT, "h2")
    active = finish(
        take(queue(held, POLICY, O.START), None, START_MS).instance, "q1", 1, Outcome.SUCCEEDED, POLICY, START_MS + 9
    ).instance
    after = settle(active, START_MS + 9)
    assert [one.id for one in after.outstanding] == ["h1"], "a reboot makes no sense after a pause"
    assert [one.id for one in after.held] == ["h2"]


def test_nothing_of_it_is_promised_to_others() -> None:
    """A held request is no part of the queue: it blocks nothing, and is foreseen by nobody."""
    held = hold(instance_in(V.STOPPED), O.STOP)
    answer = admit(held, ask(O.START, "r2"), POLICY, START_MS).answer
    assert isinstance(answer, Admitted)


def test_a_held_request_can_be_cancelled() -> None:
    change = cancel(hold(instance_in(V.ACTIVE), O.UNPAUSE), "h1", POLICY, "ada", START_MS)
    assert change.answer is Cancellation.CANCELLED
    assert change.instance.held == ()
    assert change.requests[0].status is Status.CANCELLED


def test_taking_a_protection_away_admits_what_it_held() -> None:
    blocked = instance_in(V.ACTIVE, blocked_operations=(O.PAUSE,))
    held = settle(hold(blocked, O.PAUSE), START_MS)
    free = relabel(held, POLICY, "ada", START_MS + 5, blocked_operations=()).answer
    assert [one.id for one in settle(free, START_MS + 5).outstanding] == ["h1"]


def test_what_the_guest_does_may_be_what_it_waited_for() -> None:
    held = settle(hold(instance_in(V.ACTIVE), O.UNPAUSE), START_MS)
    stopped = observe(held, GuestEvent.STOPPED, POLICY, START_MS + 1).instance
    assert next_deadline_ms(stopped) == START_MS + 1


def test_a_deletion_ends_what_is_held() -> None:
    held = hold(instance_in(V.ACTIVE), O.UNPAUSE)
    deleting = take(queue(held, POLICY, O.DELETE), None, START_MS).instance
    gone = finish(deleting, "q1", 1, Outcome.SUCCEEDED, POLICY, START_MS)
    assert (gone.instance.vm_state, gone.instance.held, next_deadline_ms(gone.instance)) == (V.DELETED, (), None)
    assert {(one.id, one.status, one.reason) for one in gone.requests if one.id == "h1"} == {
        ("h1", Status.CANCELLED, "deleted")
    }


def test_a_deleted_instance_holds_nothing() -> None:
    answer = admit(instance_in(V.DELETED), ask(O.START, hold_ms=HOUR_MS), POLICY, START_MS).answer
    assert isinstance(answer, Denied)


def test_no_more_is_held_than_may_be_outstanding() -> None:
    instance = instance_in(V.ACTIVE)
    for number in range(POLICY.outstanding_max):
        instance = hold(instance, O.UNPAUSE, f"h{number}")
    answer = admit(instance, ask(O.UNPAUSE, "over", hold_ms=HOUR_MS), POLICY, START_MS).answer
    assert isinstance(answer, Denied)


def test_of_several_holds_the_earliest_end_is_looked_at_first() -> None:
    """Found by a deliberate change: looking at the latest end kept a hold of a second for an hour."""
    instance = instance_in(V.ACTIVE)
    for name, hold_ms in (("long", HOUR_MS), ("short", 1_000), ("middle", 60_000)):
        instance = admit(instance, ask(O.UNPAUSE, name, hold_ms=hold_ms), POLICY, START_MS).instance
    instance = settle(instance, START_MS)
    for name, moment_ms in (("short", 1_000), ("middle", 60_000), ("long", HOUR_MS)):
        assert next_deadline_ms(instance) == START_MS + moment_ms
        assert name in {one.id for one in settle(instance, START_MS + moment_ms - 1).held}
        instance = settle(instance, START_MS + moment_ms)
        assert name not in {one.id for one in instance.held}
    assert next_deadline_ms(instance) is None


def test_of_several_holds_the_first_that_time_admits_is_looked_at_first() -> None:
    """The end of one hold and the threshold of another are both moments; whichever comes first counts."""
    held = hold(serving(O.PAUSE), O.REBOOT, "takeover")
    held = admit(held, ask(O.UNPAUSE, "brief", hold_ms=1_000), POLICY, START_MS).instance
    held = settle(held, START_MS)
    assert next_deadline_ms(held) == START_MS + 1_000
    held = settle(held, START_MS + 1_000)
    assert [one.id for one in held.held] == ["takeover"]
    assert next_deadline_ms(held) == START_MS + STUCK_MS


def test_a_hold_whose_moment_alone_moves_is_a_change_of_the_instance() -> None:
    """A store that compares generations must see it, or the new moment would be lost."""
    held = hold(serving(O.PAUSE), O.REBOOT)
    change = judge_held(held, POLICY, START_MS, host_reachable=True)
    assert change.answer == ()
    assert change.instance.held_due_ms == START_MS + STUCK_MS != held.held_due_ms
    assert change.instance.generation == held.generation + 1


STEPS = st.lists(
    st.sampled_from(["hold pause", "hold start", "hold reboot", "hold stop", "pause", "stop", "delete", "take",
                     "finish", "fail", "off", "wait", "cancel"]),
    max_size=30,
)  # fmt: skip


@settings(max_examples=tier(60, 1500))
@given(STEPS)
def test_each_held_request_ends_or_is_admitted_exactly_once(steps: list[str]) -> None:  # noqa: C901
    """And waiting for a day leaves nothing held (law 5), whatever happened before."""
    instance, now_ms, told = instance_in(V.ACTIVE), START_MS, list[Event]()
    for number, step in enumerate(steps):
        now_ms += 1_000
        verb, _, operation = step.partition(" ")
        serving_now = next((one for one in instance.outstanding if one.status is Status.IN_FLIGHT), None)
        match verb:
            case "hold":
                change = admit(instance, ask(Operation(operation), f"h{number}", hold_ms=HOUR_MS), POLICY, now_ms)
            case "take":
                change = take(instance, None, now_ms)  # type: ignore[assignment]
            case "finish" | "fail" if serving_now is not None:
                outcome = Outcome.SUCCEEDED if verb == "finish" else Outcome.FAILED
                change = finish(instance, serving_now.id, serving_now.fence, outcome, POLICY, now_ms)  # type: ignore[assignment]
            case "off":
                change = observe(instance, GuestEvent.STOPPED, POLICY, now_ms)  # type: ignore[assignment]
            case "cancel" if instance.held:
                change = cancel(instance, instance.held[0].id, POLICY, "ada", now_ms)  # type: ignore[assignment]
            case "wait":
                now_ms += 600_000
                continue
            case "pause" | "stop" | "delete":
                change = admit(instance, ask(Operation(verb), f"r{number}"), POLICY, now_ms)
            case _:
                continue
        told += change.events
        assert change.instance.generation >= instance.generation
        instance = change.instance
        if instance.held:
            assert next_deadline_ms(instance) is not None
    now_ms += 86_400_000
    if instance.held:
        change = judge_held(instance, POLICY, now_ms, host_reachable=True)  # type: ignore[assignment]
        told += change.events
        assert change.instance.held == ()
    for name in {event.request_id for event in told if event.kind == "request.held"}:
        lived = [one.kind for one in told if one.request_id == name and one.kind.startswith("request.")]
        assert lived[:2] in (["request.held", "request.admitted"], ["request.held", "request.cancelled"])
        assert lived.count("request.held") == 1
        assert sum(kind in {f"request.{end.value}" for end in ENDS} for kind in lived) <= 1
