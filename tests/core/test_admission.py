"""The gate: what becomes of a submission, and what the answer says."""

from __future__ import annotations

from typing import Any

import pytest
from core_samples import (
    BUSY,
    ORDINARY,
    START_MS,
    STUCK_MS,
    O,
    V,
    admitted,
    ask,
    compiled,
    instance_in,
    kinds_told,
    queue,
    rule,
    serving,
    waiting_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core import lifecycle
from interlock.core.admission import admit, judge, not_started
from interlock.core.errors import Invalid
from interlock.core.lifecycle import finish, progress, take
from interlock.core.operations import CATALOGUE, TASK_OPERATION, Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Rule, Verdict
from interlock.core.records import Admitted, Denied, GuestEvent, Instance, Outcome, Redundant, Request, Status
from interlock.core.request_queue import replace
from interlock.core.states import NO_TASK, VmState
from interlock.policies.language.loader import compile_named
from tiers import tier

POLICY = CompiledPolicy(ORDINARY)
STANDARD = compile_named("standard")
BUILT_IN = ("standard", "take2", "propolis")


def denied(instance: Instance, operation: Operation, policy: CompiledPolicy = POLICY, now_ms: int = START_MS) -> Denied:
    answer = judge(instance, ask(operation, "x"), policy, now_ms)
    assert isinstance(answer, Denied), answer
    return answer


def redundant(instance: Instance, operation: Operation, now_ms: int = START_MS) -> Redundant:
    answer = judge(instance, ask(operation, "x"), POLICY, now_ms)
    assert isinstance(answer, Redundant), answer
    return answer


# ------------------------------------------------------------------------------------------------------- in turn


def test_metadata_that_is_like_that_already_is_redundant() -> None:
    """So a double click leaves one request; a submission without parameters stands for any."""
    vm = replace(instance_in(), metadata={"owner": "alice"})
    same = judge(vm, ask(O.SET_METADATA, parameters={"set": {"owner": "alice"}, "remove": ["old"]}), STANDARD, START_MS)
    assert isinstance(same, Redundant)
    assert (same.rule, same.reason, same.request) == ("precondition", "unchanged", None)
    for other in ({"set": {"owner": "bob"}}, {"remove": ["owner"]}, {}):
        change = admit(vm, ask(O.SET_METADATA, parameters=other), STANDARD, START_MS)
        assert admitted(change).request.status is Status.SUCCEEDED


def test_what_is_admitted_is_kept_and_told() -> None:
    """An admission keeps the request, and the event says what it was judged on."""
    change = admit(instance_in(), ask(O.STOP, parameters={"hard": True}), POLICY, START_MS)
    request = admitted(change).request
    assert change.requests == (request,)
    assert change.instance.outstanding == (request,)
    assert change.instance.generation == 1
    assert (request.status, request.admitted_at_ms, request.rule) == (Status.QUEUED, START_MS, "stop-allowed")
    told = change.events[0]
    assert (told.kind, told.request_id, told.generation) == ("request.admitted", "r1", 1)
    assert told.data["rule"] == "stop-allowed"
    assert told.data["parameters"] == {"hard": True}
    assert told.data["view"] == {
        "operation": "stop",
        "vm_state": "active",
        "task_state": "none",
        "outstanding": 0,
        "role": "member",
        "requested_by": "ada",
        "locked": False,
        "locked_above": False,
        "blocked": False,
        "tags": (),
        "host_reachable": True,
        "power_state": "none",
        "hard": True,
        "silent_ms": 0,
        "running_ms": 0,
        "launched": True,
        "held": 0,
        "age_ms": START_MS,
    }


def test_a_reboot_is_denied_behind_a_queued_stop_also_once_the_start_is_done() -> None:
    """Change 880: the disposition follows from what is outstanding, not from a stored answer."""
    instance = queue(serving(O.START, V.STOPPED), compiled(*ORDINARY.rules[:3], *_in_turn_only()), O.STOP)
    assert denied(instance, O.REBOOT).reason == "halt_pending"
    started = instance.outstanding[0]
    done = finish(instance, started.id, started.fence, Outcome.SUCCEEDED, POLICY, START_MS).instance
    assert done.vm_state is V.ACTIVE
    assert denied(done, O.REBOOT).reason == "halt_pending"


def _in_turn_only() -> list[Rule]:
    return [rule("any", frozenset(Operation), Verdict.ADMIT)]


def test_a_request_is_judged_in_the_foreseen_state_too() -> None:
    """Section 3: it must also be permitted where everything outstanding leads."""
    instance = queue(instance_in(), POLICY, O.SUSPEND)
    answer = denied(instance, O.PAUSE)
    assert answer.foreseen
    assert answer.vm_state is V.SUSPENDED
    assert answer.blocked_by is not None
    assert answer.blocked_by.operation is O.SUSPEND


def test_stop_rescue_and_unrescue_can_be_queued_in_one_go() -> None:
    """Each is permitted where those before it lead."""
    instance = queue(instance_in(), POLICY, O.STOP, O.RESCUE, O.UNRESCUE, O.START)
    assert waiting_for(instance) == ["stop", "rescue", "unrescue", "start"]


def test_a_rule_out_of_turn_asks_for_the_present_state_only() -> None:
    """`in_turn = false`: no promise is given, and the foreseen state is not asked."""
    policy = compiled(
        rule("now", {O.SWAP_VOLUME}, Verdict.ADMIT, vm_states=frozenset({V.ACTIVE}), in_turn=False),
        rule("rest", {O.STOP}, Verdict.ADMIT),
    )
    change = admit(queue(instance_in(), policy, O.STOP), ask(O.SWAP_VOLUME), policy, START_MS)
    assert admitted(change).request.in_turn is False


# ---------------------------------------------------------------------------------------------------- redundant


def test_a_second_stop_is_redundant_and_names_the_first() -> None:
    """What is on its way is not asked for twice."""
    instance = queue(instance_in(), POLICY, O.STOP)
    answer = redundant(instance, O.STOP)
    assert answer.request == instance.outstanding[0]
    assert answer.reason == "already"


def test_what_is_redundant_in_the_foreseen_state_names_what_brings_it_about() -> None:
    """Not just the last in the queue: a snapshot behind a stop does not stop anything."""
    policy = compiled(
        rule("stopped-already", {O.STOP}, Verdict.REDUNDANT, vm_states=frozenset({V.STOPPED})),
        rule("rest", {O.STOP, O.SNAPSHOT, O.START}, Verdict.ADMIT),
    )
    instance = queue(instance_in(), policy, O.STOP, O.SNAPSHOT)
    answer = admit(instance, ask(O.STOP, "x"), policy, START_MS).answer
    assert isinstance(answer, Redundant)
    assert answer.request is not None
    assert answer.request.operation is O.STOP


# ------------------------------------------------------------------------------------------------------ preempt


def test_delete_goes_to_the_front_and_cancels_what_makes_no_sense_behind_it() -> None:
    """Section 3: preempt; a waiting start must not start a deleted VM."""
    change = admit(queue(instance_in(), POLICY, O.STOP, O.START), ask(O.DELETE, "d"), POLICY, START_MS)
    answer = admitted(change)
    assert waiting_for(change.instance) == ["delete"]
    assert answer.cancels == ("q1", "q2")
    assert {request.id: request.status for request in change.requests if request.id != "d"} == {
        "q1": Status.CANCELLED,
        "q2": Status.CANCELLED,
    }


def test_what_is_in_flight_is_asked_to_stop_and_given_its_grace() -> None:
    """Section 3: preempt; it is fenced only if it does not confirm."""
    change = admit(serving(O.PAUSE), ask(O.DELETE, "d"), POLICY, START_MS + 7)
    asked = change.instance.outstanding[0]
    assert admitted(change).supersedes == ("r0",)
    assert (asked.status, asked.interrupt_at_ms, asked.interrupted_for) == (Status.IN_FLIGHT, START_MS + 7, "d")
    assert asked.interrupt_deadline_ms == START_MS + 7 + 10_000
    assert change.instance.fence == 1
    assert kinds_told(change) == ["request.interrupting", "request.admitted"]


def test_preempting_again_never_gives_more_time() -> None:
    """A deadline that was given holds."""
    first = admit(serving(O.START, V.STOPPED), ask(O.STOP, "s"), POLICY, START_MS).instance
    second = admit(first, ask(O.DELETE, "d"), POLICY, START_MS + 5_000).instance
    assert second.outstanding[0].interrupt_deadline_ms == START_MS + 10_000
    assert second.outstanding[0].interrupted_for == "d"


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("operation", list(Operation))
def test_asking_the_same_again_and_again_fills_no_queue(name: str, operation: Operation) -> None:
    """A limit on everything, under every policy, also for what preempts."""
    policy = compile_named(name)
    for hard in (False, True):
        instance = serving(O.STOP)
        for number in range(60):
            submission = ask(operation, f"n{number}", role="admin", parameters={"hard": hard})
            instance = admit(instance, submission, policy, START_MS).instance
        assert len(instance.outstanding) <= policy.outstanding_max + 1


# -------------------------------------------------------------------------------------------------------- after


def test_a_stuck_reboot_is_refused_with_the_moment_at_which_it_is_admitted() -> None:
    """Take 2: three minutes, and the refusal names the moment."""
    instance = serving(O.REBOOT)
    answer = denied(instance, O.REBOOT, now_ms=START_MS + 1)
    assert answer.allowed_at_ms == START_MS + STUCK_MS
    assert answer.blocked_by == instance.outstanding[0]
    denied(instance, O.REBOOT, now_ms=START_MS + STUCK_MS - 1)


def test_a_takeover_fences_at_once() -> None:
    """Section 3: from then on it takes over; the old request ends as superseded."""
    change = admit(serving(O.REBOOT), ask(O.REBOOT, "again"), POLICY, START_MS + STUCK_MS)
    answer = admitted(change)
    assert answer.supersedes == ("r0",)
    assert change.instance.fence == 2
    assert [request.id for request in change.instance.outstanding] == ["again"]
    assert kinds_told(change) == ["request.superseded", "instance.fenced", "request.admitted"]


def test_progress_counts_as_life() -> None:
    """Law 6: a healthy long operation is not taken over because it is long."""
    instance = progress(serving(O.REBOOT), "r0", 1, START_MS + STUCK_MS).instance
    assert denied(instance, O.REBOOT, now_ms=START_MS + STUCK_MS + 1).allowed_at_ms == START_MS + 2 * STUCK_MS


def test_a_rule_may_count_from_when_the_task_was_started() -> None:
    """`measured_from = "task_started"`: progress does not put it off."""
    late = rule("late", {O.REBOOT}, Verdict.AFTER, threshold_ms=100, measured_from=MeasuredFrom.TASK_STARTED)
    instance = progress(serving(O.REBOOT), "r0", 1, START_MS + 99).instance
    assert denied(instance, O.REBOOT, compiled(late), START_MS + 99).allowed_at_ms == START_MS + 100
    assert isinstance(judge(instance, ask(O.REBOOT), compiled(late), START_MS + 100), Admitted)


def test_delete_again_is_redundant_until_it_may_take_over() -> None:
    """`before = "redundant"`: the moment is named all the same."""
    answer = redundant(serving(O.DELETE), O.DELETE)
    assert answer.allowed_at_ms == START_MS + STUCK_MS
    assert answer.request is not None
    assert answer.request.id == "r0"


@given(back_ms=st.integers(0, 10 * STUCK_MS), on_ms=st.integers(0, STUCK_MS - 1))
def test_a_clock_that_jumps_back_never_hastens_a_takeover(back_ms: int, on_ms: int) -> None:
    """Law 6: after a jump back it takes at least as long as it would have taken."""
    instance = serving(O.REBOOT)
    assert isinstance(judge(instance, ask(O.REBOOT), POLICY, START_MS + on_ms), Denied)
    jumped = judge(instance, ask(O.REBOOT), POLICY, START_MS + on_ms - back_ms)
    assert isinstance(jumped, Denied)
    assert jumped.allowed_at_ms is not None
    assert jumped.allowed_at_ms <= START_MS + STUCK_MS
    assert jumped.allowed_at_ms >= START_MS + on_ms - back_ms


# ------------------------------------------------------------------------------------------------------- record


def test_a_lock_is_done_when_it_is_admitted() -> None:
    """What changes only the record is not queued."""
    change = admit(instance_in(), ask(O.LOCK), POLICY, START_MS)
    assert change.instance.locked_by == "ada"
    assert admitted(change).request.status is Status.SUCCEEDED
    assert not change.instance.outstanding
    assert kinds_told(change) == ["request.admitted", "request.succeeded"]
    assert admit(change.instance, ask(O.UNLOCK, "r2"), POLICY, START_MS).instance.locked_by is None


def test_a_reset_fences_what_is_served_and_judges_the_rest_again() -> None:
    """Whoever resets a state takes the right to act from every worker."""
    instance = queue(serving(O.PAUSE), POLICY, O.UNPAUSE)
    change = admit(instance, ask(O.RESET_STATE, "reset", parameters={"vm_state": "stopped"}), POLICY, START_MS)
    assert change.instance.vm_state is V.STOPPED
    assert change.instance.fence == 2
    assert not change.instance.outstanding
    assert (admitted(change).supersedes, admitted(change).cancels) == (("r0",), ("q1",))


# ------------------------------------------------------------------------------------------------------ answers


def test_a_refusal_changes_nothing_and_is_told() -> None:
    """Every submission is told, so that the history can be judged again."""
    instance = serving(O.REBOOT)
    change = admit(instance, ask(O.CREATE), POLICY, START_MS)
    assert change.instance is instance
    assert not change.requests
    assert kinds_told(change) == ["request.denied"]
    assert change.events[0].generation == instance.generation


def test_a_refusal_names_the_request_that_its_rule_is_about() -> None:
    """Law 8: what blocks, and whose it is."""
    instance = queue(serving(O.SNAPSHOT), POLICY, O.STOP)
    answer = denied(instance, O.REBOOT)
    assert answer.blocked_by is not None
    assert answer.blocked_by.operation is O.STOP
    assert answer.blocked_by.requested_by == "ada"


def test_after_a_reported_end_the_next_is_judged_on_the_new_state() -> None:
    """Law 7: success is settled."""
    stopping = serving(O.STOP)
    assert denied(stopping, O.REBOOT).reason == "halt_pending"
    stopped = finish(stopping, "r0", 1, Outcome.SUCCEEDED, POLICY, START_MS).instance
    assert isinstance(judge(stopped, ask(O.REBOOT), POLICY, START_MS), Admitted)


def _situations(vm_state: VmState) -> list[Instance]:
    """An instance in every task that there is, and in none."""
    situations = [instance_in(vm_state)]
    for phase in sorted(BUSY):
        operation = TASK_OPERATION[phase]
        request = Request(
            id="r0", instance_id="i-1", operation=operation, requested_by="b", rule="x", admitted_at_ms=START_MS,
            status=Status.IN_FLIGHT, phase=phase, fence=1, taken_at_ms=START_MS, last_progress_at_ms=START_MS,
        )  # fmt: skip
        situations.append(instance_in(vm_state, outstanding=(request,)))
    return situations


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("vm_state", list(VmState))
def test_every_operation_has_an_answer_in_every_state_and_task(name: str, vm_state: VmState) -> None:
    """The decision table is total, and every refusal explains itself (law 8)."""
    policy = compile_named(name)
    for instance in _situations(vm_state):
        for operation in Operation:
            for silence_ms in (0, 3_600_000):
                answer = admit(instance, ask(operation), policy, START_MS + silence_ms).answer
                if isinstance(answer, Denied):
                    assert answer.rule
                    assert answer.reason
                    assert (answer.blocked_by is None) is (not instance.outstanding)


@settings(max_examples=tier(40, 1000))
@given(
    wishes=st.lists(st.sampled_from(sorted(CATALOGUE)), max_size=8),
    name=st.sampled_from(BUILT_IN),
    vm_state=st.sampled_from([V.ACTIVE, V.STOPPED, V.BUILDING, V.ERROR]),
)
def test_an_admitted_request_is_permitted_when_its_turn_comes(
    wishes: list[Operation], name: str, vm_state: VmState
) -> None:
    """Law 2: while everything succeeds and the guest does nothing, nothing that waits is ever cancelled.

    What was admitted outside the foreseen state (`in_turn = false`, as a stop of change 880 is) was promised nothing.
    """
    policy = compile_named(name)
    instance = instance_in(vm_state)
    for number, operation in enumerate(wishes):
        instance = admit(instance, ask(operation, f"n{number}", role="admin"), policy, START_MS).instance
    while instance.outstanding:
        taken = take(instance, None, START_MS)
        assert taken.answer is not None
        done = finish(taken.instance, taken.answer.id, taken.answer.fence, Outcome.SUCCEEDED, policy, START_MS)
        cancelled = [request for request in done.requests if request.status is Status.CANCELLED]
        assert not [request for request in cancelled if request.in_turn]
        instance = done.instance
    assert instance.task_state == NO_TASK


@pytest.mark.parametrize(("name", "state"), [("standard", V.STOPPED), ("take2", V.STOPPED), ("propolis", V.BUILDING)])
def test_what_is_made_and_not_started_waits_where_its_policy_admits_a_start(name: str, state: VmState) -> None:
    """Change 880's instances start from `building` only; everywhere else what does not run is stopped."""
    policy = compile_named(name)
    waiting = not_started(instance_in(V.BUILDING), ask(O.CREATE), policy, START_MS)
    assert isinstance(waiting, Instance)
    assert waiting.vm_state is state
    assert isinstance(admit(waiting, ask(O.START), policy, START_MS).answer, Admitted)


def test_what_could_never_be_started_is_not_made_without_a_start() -> None:
    """Nova starts only what was launched before: it could only be deleted."""
    refused = not_started(instance_in(V.BUILDING), ask(O.CREATE), compile_named("nova"), START_MS)
    assert isinstance(refused, Denied)
    assert (refused.operation, refused.reason, refused.rule) == (O.CREATE, "never_started", "never-launched")
    assert refused.because is not None
    assert "policy nova" in refused.because
    assert "has never been launched" in refused.because
    assert refused.remedy


@pytest.mark.parametrize(
    "start",
    [
        rule("for-admins", frozenset({O.START}), Verdict.ADMIT, roles=frozenset({"admin"})),
        rule("later", frozenset({O.START}), Verdict.AFTER, threshold_ms=1000, reason="early"),
    ],
    ids=["for admins", "later"],
)
def test_what_somebody_may_start_some_time_is_made_without_a_start(start: Rule) -> None:
    policy = compiled(start, rule("none", frozenset(O), Verdict.DENY, reason="none"))
    made = instance_in(V.BUILDING, blocked_operations=(O.START,))
    waiting = not_started(made, ask(O.CREATE), policy, START_MS)
    assert isinstance(waiting, Instance)
    assert (waiting.vm_state, waiting.blocked_operations) == (V.STOPPED, (O.START,))


# --------------------------------------------------------------------------------------------------- invalid calls


def test_a_second_outstanding_request_with_the_same_id_is_refused() -> None:
    """A report of its worker would be taken for one of the other's."""
    instance = queue(instance_in(), POLICY, O.STOP)
    with pytest.raises(Invalid, match="'q1' is that of an outstanding request"):
        admit(instance, ask(O.START, "q1"), POLICY, START_MS)


def test_a_refusal_names_the_time_at_which_a_silent_host_is_fenced_if_that_is_waited_for() -> None:
    policy = compiled(
        rule("lost", {O.EVACUATE}, Verdict.ADMIT, host_reachable=False),
        rule("stuck", {O.REBOOT}, Verdict.AFTER, threshold_ms=STUCK_MS, because="It was rebooted just now."),
        rule("no", frozenset(O), Verdict.DENY, because="It runs."),
    )
    answers = {}
    for operation, fenced_at_ms in ((O.EVACUATE, START_MS + 9), (O.EVACUATE, None), (O.STOP, START_MS + 9)):
        answer = admit(instance_in(), ask(operation, host_fenced_at_ms=fenced_at_ms), policy, START_MS).answer
        assert isinstance(answer, Denied)
        answers[operation, fenced_at_ms] = answer.allowed_at_ms, answer.because
    waits = "Host h does not respond, and the guest may run there until the host's lease expires and it is fenced."
    assert answers == {
        (O.EVACUATE, START_MS + 9): (START_MS + 9, waits),
        (O.EVACUATE, None): (None, "It runs."),
        (O.STOP, START_MS + 9): (None, "It runs."),
    }
    threshold = admit(instance_in(), ask(O.REBOOT, host_fenced_at_ms=START_MS + 9), policy, START_MS).answer
    assert isinstance(threshold, Denied)
    assert (threshold.allowed_at_ms, threshold.because) == (START_MS + STUCK_MS, "It was rebooted just now.")


def test_a_rename_to_the_name_that_it_has_is_redundant() -> None:
    policy = compiled(rule("any", frozenset(O), Verdict.ADMIT))
    change = admit(instance_in(), ask(O.RENAME, parameters={"name": "web"}), policy, START_MS)
    assert isinstance(change.answer, Redundant)
    assert change.answer.because == "The VM is called web already."
    renamed = admit(instance_in(), ask(O.RENAME, parameters={"name": "db"}), policy, START_MS)
    assert isinstance(renamed.answer, Admitted)
    assert renamed.instance.name == "db"


def test_an_admission_records_what_it_superseded_and_cancelled() -> None:
    instance = queue(serving(O.REBOOT), POLICY, O.PAUSE)
    change = admit(instance, ask(O.REBOOT, "again"), POLICY, START_MS + STUCK_MS)
    facts = next(event.data for event in change.events if event.kind == "request.admitted")
    assert (facts["supersedes"], facts["cancels"]) == (("r0",), ())
    assert (facts["operation"], facts["by"], facts["parameters"], facts["waiting"]) == ("reboot", "ada", {}, 2)
    assert facts["foreseen"] == {
        "vm_state": "paused",
        "launched": True,
        "host_reachable": True,
        "power_state": "paused",
        "moved": True,
    }
    deletion = admit(instance, ask(O.DELETE, "d"), POLICY, START_MS)
    facts = next(event.data for event in deletion.events if event.kind == "request.admitted")
    assert (facts["supersedes"], facts["cancels"]) == (("r0",), ("q1",))


@pytest.mark.parametrize("target", ["deleted", "activ", "", 7])
def test_a_state_is_not_reset_to_deleted_or_to_nonsense(target: Any) -> None:
    with pytest.raises(Invalid, match=r"Invalid vm_state .* for reset_state: expected one of active, building"):
        admit(instance_in(), ask(O.RESET_STATE, parameters={"vm_state": target}), POLICY, START_MS)
    nothing = compiled(rule("nothing", frozenset(O), Verdict.DENY))
    with pytest.raises(Invalid, match="Invalid vm_state"):  # whatever the policy says
        admit(instance_in(), ask(O.RESET_STATE, parameters={"vm_state": target}), nothing, START_MS)


def test_a_vm_state_given_as_text_is_refused() -> None:
    """It equals a VmState and is none, so that every rule and precondition would miss it."""
    instance = instance_in("active")  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="Invalid vm_state 'active' of instance i-1: expected a VmState"):
        admit(instance, ask(O.STOP), POLICY, START_MS)
    with pytest.raises(Invalid, match="expected a VmState"):
        lifecycle.observe(instance, GuestEvent.STOPPED, POLICY, START_MS)
