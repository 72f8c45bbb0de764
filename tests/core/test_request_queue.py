"""The queue of one instance: its order, where it leads, and what is served next."""

from __future__ import annotations

import pytest
from core_samples import (
    GRACE_MS,
    ORDINARY,
    START_MS,
    O,
    V,
    ask,
    compiled,
    instance_in,
    queue,
    rule,
    serving,
    waiting_for,
)

from interlock.core.admission import admit
from interlock.core.lifecycle import cancel, finish, relabel, take
from interlock.core.operations import Lane
from interlock.core.policy import CompiledPolicy, Policy, Verdict
from interlock.core.records import SERVED, Admitted, Instance, Outcome, Request, Status
from interlock.core.request_queue import (
    Draft,
    first_phase,
    foresee,
    in_service_order,
    judge_again,
    next_served,
    replace,
)
from interlock.policies.language.loader import compile_named

POLICY = CompiledPolicy(ORDINARY)
ANYTHING = CompiledPolicy(
    Policy(
        name="anything",
        rules=(
            rule("delete", {O.DELETE, O.STOP}, Verdict.PREEMPT, grace_ms=GRACE_MS),
            rule("present-state", {O.SWAP_VOLUME}, Verdict.ADMIT, in_turn=False),
            rule("all", frozenset(O), Verdict.ADMIT),
        ),
    )
)


def test_state_changes_are_served_in_the_order_admitted() -> None:
    """Section 3: state changes in the order admitted."""
    instance = queue(instance_in(), POLICY, O.STOP, O.START, O.PAUSE)
    served = []
    while instance.outstanding:
        taken = take(instance, None, START_MS)
        assert taken.answer is not None
        served.append(taken.answer.operation)
        instance = finish(
            taken.instance, taken.answer.id, taken.answer.fence, Outcome.SUCCEEDED, POLICY, START_MS
        ).instance
    assert served == [O.STOP, O.START, O.PAUSE]


def test_only_one_state_change_is_in_flight() -> None:
    """Law 1: one at a time."""
    instance = take(queue(instance_in(), POLICY, O.STOP, O.START), Lane.STATE, START_MS).instance
    assert take(instance, Lane.STATE, START_MS).answer is None
    assert take(instance, None, START_MS).answer is None


def test_state_changes_and_component_changes_are_served_in_the_order_admitted() -> None:
    """Law 12: nothing that came later goes first, in either lane."""
    instance = queue(instance_in(), POLICY, O.ATTACH_VOLUME, O.STOP, O.SWAP_VOLUME)
    served = []
    while instance.outstanding:
        taken = take(instance, None, START_MS)
        assert taken.answer is not None
        served.append(taken.answer.operation)
        instance = finish(taken.instance, taken.answer.id, 1, Outcome.SUCCEEDED, POLICY, START_MS).instance
    assert served == [O.ATTACH_VOLUME, O.STOP, O.SWAP_VOLUME]


def test_a_detachment_is_not_starved_by_state_changes_that_keep_coming() -> None:
    """Law 12: it is served next, however many others are submitted after it."""
    policy = compile_named("standard")
    instance = queue(instance_in(), policy, O.PAUSE)
    pausing = take(instance, None, START_MS)
    assert pausing.answer is not None
    instance = pausing.instance
    for operation in (O.UNPAUSE, O.CRASH_DUMP, O.DETACH_VOLUME):
        instance = admit(instance, ask(operation, operation.value), policy, START_MS).instance
    served = []
    for number in range(200):
        later = (O.PAUSE, O.UNPAUSE, O.CRASH_DUMP)[number % 3]
        instance = admit(instance, ask(later, f"s{number}"), policy, START_MS).instance
        (busy,) = [request for request in instance.outstanding if request.status in SERVED]
        instance = finish(instance, busy.id, 1, Outcome.SUCCEEDED, policy, START_MS).instance
        taken = take(instance, None, START_MS)
        assert taken.answer is not None
        served.append(taken.answer.id)
        instance = taken.instance
        if taken.answer.operation is O.DETACH_VOLUME:
            break
    assert served == ["unpause", "crash_dump", "detach_volume"]


def test_a_component_change_is_judged_at_its_place_between_the_state_changes() -> None:
    """It is served before the suspension, in whose state it would not be permitted."""
    instance = queue(serving(O.REBOOT), POLICY, O.ATTACH_VOLUME, O.SUSPEND)
    done = finish(instance, "r0", 1, Outcome.SUCCEEDED, POLICY, START_MS)
    assert waiting_for(done.instance) == ["attach_volume", "suspend"]


def test_a_state_change_waits_its_turn_behind_a_component_change_also_if_it_could_run_beside_the_one_in_flight() -> (
    None
):
    """It might end where the component change is not permitted."""
    instance = queue(serving(O.SWAP_VOLUME), POLICY, O.ATTACH_VOLUME, O.STOP)
    assert take(instance, Lane.STATE, START_MS).answer is None


def test_what_was_not_admitted_in_turn_is_served_after_the_state_changes() -> None:
    """Change 880: when both wait, state changes go first."""
    instance = queue(instance_in(), ANYTHING, O.SWAP_VOLUME, O.PAUSE, O.ATTACH_VOLUME)
    assert [request.operation for request in in_service_order(instance)] == [O.PAUSE, O.ATTACH_VOLUME, O.SWAP_VOLUME]
    waiting = next_served(instance, None)
    assert waiting is not None
    assert waiting.operation is O.PAUSE


def test_a_component_change_that_runs_beside_may_go_before_those_that_wait_for_the_state_change() -> None:
    """A start may be unable to end without it, and what waits for the start loses nothing."""
    instance = queue(serving(O.REBOOT), POLICY, O.PAUSE, O.SWAP_VOLUME)
    taken = take(instance, Lane.COMPONENT, START_MS).answer
    assert taken is not None
    assert taken.operation is O.SWAP_VOLUME


def test_a_compatible_component_change_is_served_beside_a_state_change() -> None:
    """Change 880: a component change may be served while a state change is in progress."""
    instance = queue(serving(O.REBOOT), POLICY, O.SWAP_VOLUME)
    taken = take(instance, Lane.COMPONENT, START_MS)
    assert taken.answer is not None
    assert [request.status for request in taken.instance.outstanding] == [Status.IN_FLIGHT, Status.IN_FLIGHT]
    assert waiting_for(taken.instance) == ["reboot", "swap_volume"]


def test_an_incompatible_component_change_waits_for_the_state_change() -> None:
    """The catalogue says what may be served beside what."""
    instance = queue(serving(O.REBOOT), POLICY, O.ATTACH_VOLUME)
    assert take(instance, Lane.COMPONENT, START_MS).answer is None


def test_a_state_change_waits_for_an_incompatible_component_change() -> None:
    """The same, the other way round."""
    instance = queue(serving(O.ATTACH_VOLUME), POLICY, O.STOP)
    assert take(instance, Lane.STATE, START_MS).answer is None
    assert take(instance, None, START_MS).answer is None


def test_no_component_change_is_taken_while_a_preempting_request_waits() -> None:
    """Section 3: a preempting request first. What is taken now has no deadline, and could be in its way for ever."""
    instance = queue(instance_in(), ANYTHING, O.SWAP_VOLUME, O.DELETE)
    assert waiting_for(instance) == ["delete", "swap_volume"]
    assert take(instance, Lane.COMPONENT, START_MS).answer is None
    beside = queue(serving(O.STOP), ANYTHING, O.SWAP_VOLUME, O.DELETE)
    assert take(beside, Lane.COMPONENT, START_MS).answer is None


def test_a_preempting_request_goes_before_everything_that_waits_and_behind_what_is_served() -> None:
    """Section 3: a preempting request first."""
    instance = queue(serving(O.REBOOT), ANYTHING, O.PAUSE, O.UNPAUSE, O.STOP)
    assert waiting_for(instance) == ["reboot", "stop", "pause", "unpause"]


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_a_preempting_request_counts_on_what_is_in_flight_unless_that_was_asked_to_stop(asked_to_stop: bool) -> None:
    """Else it would stay behind a start although the success of that start cancels it (law 2)."""
    instance = serving(O.START, V.STOPPED)
    deadline_ms = START_MS + GRACE_MS if asked_to_stop else None
    waiting = [
        Request(id=f"q{number}", instance_id="i-1", operation=operation, requested_by="ada", rule="made",
                admitted_at_ms=START_MS, preempts=True)
        for number, operation in enumerate((O.STOP, O.START), 1)
    ]  # fmt: skip
    served = replace(instance.outstanding[0], interrupt_deadline_ms=deadline_ms)
    left = cancel(replace(instance, outstanding=(served, *waiting)), "q1", POLICY, "ada", START_MS).instance
    assert waiting_for(left) == (["start", "start"] if asked_to_stop else ["start"])


def test_the_foreseen_state_is_where_everything_outstanding_leads() -> None:
    """Section 2: foreseen state."""
    instance = queue(instance_in(), POLICY, O.STOP, O.START, O.RESCUE)
    assert foresee(instance).vm_state is V.RESCUED
    assert foresee(instance_in(V.PAUSED)).vm_state is V.PAUSED


def test_the_foreseen_state_remembers_what_an_operation_undoes() -> None:
    """A rescue from stopped, undone, leads back to stopped."""
    instance = queue(instance_in(V.STOPPED), POLICY, O.RESCUE, O.UNRESCUE)
    assert foresee(instance).vm_state is V.STOPPED


def test_the_foreseen_state_is_where_serving_gets() -> None:
    """What was foreseen holds when everything has succeeded."""
    instance = queue(instance_in(V.STOPPED), POLICY, O.RESCUE, O.UNRESCUE, O.START)
    expected = foresee(instance).vm_state
    while instance.outstanding:
        taken = take(instance, None, START_MS)
        assert taken.answer is not None
        request = taken.answer
        instance = finish(taken.instance, request.id, request.fence, Outcome.SUCCEEDED, POLICY, START_MS).instance
    assert instance.vm_state is expected is V.ACTIVE


def test_taking_notes_when_under_which_fence_and_in_which_phase() -> None:
    """A worker acts under the fence with which it took its request."""
    instance = queue(instance_in(fence=7), POLICY, O.REBOOT)
    taken = take(instance, Lane.STATE, START_MS + 5).answer
    assert isinstance(taken, Request)
    assert (taken.fence, taken.taken_at_ms, taken.phase) == (7, START_MS + 5, "rebooting")


def test_a_hard_variant_has_phases_of_its_own() -> None:
    """The task state tells a hard reboot from a soft one."""
    assert first_phase(O.REBOOT, hard=True) == "rebooting_hard"
    assert first_phase(O.PAUSE, hard=True) == "pausing"
    assert first_phase(O.LOCK, hard=False) is None


def test_nothing_is_taken_from_an_empty_queue_and_nothing_changes() -> None:
    """The answer is None, and the instance is the same object."""
    instance = instance_in()
    for lane in (None, Lane.STATE, Lane.COMPONENT):
        change = take(instance, lane, START_MS)
        assert change.answer is None
        assert change.instance is instance


def test_a_full_queue_refuses_and_lets_delete_in() -> None:
    """A limit on everything, and never stuck."""
    policy = CompiledPolicy(Policy(name="short", rules=ORDINARY.rules, outstanding_max=2))
    instance = queue(instance_in(), policy, O.PAUSE, O.UNPAUSE)
    refused = admit(instance, ask(O.PAUSE, "q3"), policy, START_MS).answer
    assert getattr(refused, "reason", None) == "queue_full"
    assert isinstance(admit(instance, ask(O.DELETE, "q3"), policy, START_MS).answer, Admitted)


OUT_OF_TURN = CompiledPolicy(
    Policy(
        name="out of turn",
        rules=(
            rule("stop", {O.STOP}, Verdict.ADMIT, vm_states=frozenset({V.ACTIVE}), in_turn=False),
            rule("swap", {O.SWAP_VOLUME}, Verdict.ADMIT, vm_states=frozenset({V.ACTIVE}), in_turn=False),
            rule("start", {O.START}, Verdict.ADMIT, vm_states=frozenset({V.STOPPED})),
            rule("others", {O.MIGRATE, O.PAUSE}, Verdict.ADMIT),
        ),
    )
)


def _after(instance: Instance, outcome: Outcome) -> Instance:
    """Take what comes first, and finish it."""
    taken = take(instance, None, START_MS)
    assert taken.answer is not None
    request = taken.answer
    return finish(taken.instance, request.id, request.fence, outcome, OUT_OF_TURN, START_MS).instance


def test_what_was_not_admitted_in_turn_is_not_cancelled_for_where_the_queue_leads() -> None:
    """It was admitted wherever the queue leads, so it stays while the present state permits it."""
    instance = queue(instance_in(), OUT_OF_TURN, O.PAUSE, O.MIGRATE, O.STOP, O.SWAP_VOLUME)
    again = Draft(instance, START_MS)
    assert judge_again(again, OUT_OF_TURN) == ()
    # A pause that failed leaves it active, and the queue is judged again with a migration still before the stop.
    instance = _after(instance, Outcome.FAILED)
    assert waiting_for(instance) == ["migrate", "stop", "swap_volume"]
    instance = _after(instance, Outcome.FAILED)
    assert waiting_for(instance) == ["stop", "swap_volume"]


def test_what_was_not_admitted_in_turn_is_cancelled_where_no_state_permits_it() -> None:
    """Nothing is served where it is not permitted: after the migration there is nothing to stop."""
    instance = queue(instance_in(), OUT_OF_TURN, O.MIGRATE, O.STOP, O.SWAP_VOLUME)
    instance = _after(instance, Outcome.SUCCEEDED)
    assert instance.vm_state is V.MIGRATED_OUT
    assert waiting_for(instance) == []


def test_what_was_not_admitted_in_turn_stays_where_only_the_foreseen_state_permits_it() -> None:
    """A guest that ended by itself is started again by what waits before the stop."""
    instance = queue(instance_in(V.STOPPED), OUT_OF_TURN, O.START)
    stop = Request(
        id="q2", instance_id="i-1", operation=O.STOP, requested_by="ada", rule="stop", admitted_at_ms=START_MS,
        in_turn=False,
    )  # fmt: skip
    instance = replace(instance, outstanding=(*instance.outstanding, stop))
    assert judge_again(Draft(instance, START_MS), OUT_OF_TURN) == ()
    kept_in_turn = replace(instance, outstanding=(replace(stop, in_turn=True),))
    assert judge_again(Draft(kept_in_turn, START_MS), OUT_OF_TURN) == ("q2",)


@pytest.mark.parametrize(
    ("wanted", "before", "after", "message"),
    [
        ({"freeze"}, (), ("freeze", "web"), "The VM has the tags freeze, web: Not now."),
        ({"!web"}, ("web",), (), "The VM has the tags (none): Not now."),
    ],
)
def test_what_is_cancelled_for_the_tags_of_the_instance_names_them(
    wanted: set[str], before: tuple[str, ...], after: tuple[str, ...], message: str
) -> None:
    frozen = rule("frozen", {O.PAUSE}, Verdict.DENY, tags=frozenset(wanted), because="Not now.")
    policy = compiled(frozen, rule("all", frozenset(O), Verdict.ADMIT))
    instance = queue(instance_in(tags=before), policy, O.PAUSE)
    change = relabel(instance, policy, "ada", START_MS, tags=after)
    assert [(one.status, one.message) for one in change.requests] == [(Status.CANCELLED, message)]


@pytest.mark.parametrize(
    ("fenced", "reachable", "stays"), [(False, True, True), (True, False, True), (True, True, False)]
)
def test_an_evacuation_that_waits_is_cancelled_once_its_host_is_back(
    *, fenced: bool, reachable: bool, stays: bool
) -> None:
    policy = compiled(rule("all", frozenset(O), Verdict.ADMIT))
    instance = replace(queue(instance_in(), policy, O.EVACUATE), host_fenced=fenced)
    draft = Draft(instance, START_MS, host_reachable=reachable)
    assert judge_again(draft, policy) == (() if stays else ("q1",))
    assert draft.instance.host_fenced is not reachable
