"""The gate for fleets answers as the gate for one instance does, whatever the instances and the policy."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_samples import START_MS, instance, serving

from interlock.core.admission import judge
from interlock.core.conditions import POWER_STATES
from interlock.core.operations import CATALOGUE, TASK_OPERATION, TASK_STATES, Lane, Operation
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import Admitted, Denied, Disposition, Instance, Redundant, Request, Status, Submission
from interlock.core.roles import Role
from interlock.core.states import NO_TASK, PowerState, VmState
from interlock.policies.fleet.gate import Answered, FleetAnswers, compare, judge_fleet
from interlock.policies.language.loader import builtin_names, compile_named
from tiers import tier

TAGS = ("build", "gold", "spare")
TIMES_MS = (1, 5_000, 15_000, 60_000, 180_000, 300_000, 600_000, 1_800_000)
AGES_MS = st.one_of(st.sampled_from(TIMES_MS).flatmap(lambda ms: st.sampled_from((ms - 1, ms))), st.just(-50))
OPERATIONS = st.sampled_from(tuple(Operation))
KINDS = st.frozensets(OPERATIONS, max_size=4)
PHASES: dict[Operation, list[str]] = {}
for phase, phase_operation in TASK_OPERATION.items():
    PHASES.setdefault(phase_operation, []).append(phase)


def of_lane(lane: Lane) -> st.SearchStrategy[Operation]:
    return st.sampled_from([operation for operation, entry in CATALOGUE.items() if entry.lane is lane])


@st.composite
def requests(draw: st.DrawFn, status: Status, operations: st.SearchStrategy[Operation]) -> Request:
    operation = draw(operations)
    taken_at_ms = START_MS - draw(AGES_MS) if status is not Status.QUEUED else None
    return Request(
        id=f"r{draw(st.integers(0, 10**6))}",
        instance_id="i1",
        operation=operation,
        parameters={"hard": True} if draw(st.booleans()) else {},
        requested_by="somebody",
        rule="made",
        admitted_at_ms=START_MS,
        status=status,
        preempts=draw(st.booleans()),
        phase=draw(st.sampled_from(PHASES[operation])) if status is not Status.QUEUED else None,
        taken_at_ms=taken_at_ms,
        last_progress_at_ms=draw(st.sampled_from((None, START_MS - draw(AGES_MS)))) if taken_at_ms else None,
    )


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    served = st.sampled_from((Status.IN_FLIGHT, Status.UNKNOWN))
    outstanding: list[Request] = []
    if draw(st.booleans()):
        lanes = draw(st.sampled_from(((), (Lane.STATE,), (Lane.COMPONENT,), (Lane.STATE, Lane.COMPONENT))))
        outstanding += [draw(requests(draw(served), of_lane(lane))) for lane in lanes]
        queueable = of_lane(draw(st.sampled_from((Lane.STATE, Lane.COMPONENT))))
        outstanding += draw(st.lists(requests(Status.QUEUED, queueable), max_size=3))
    return Instance(
        id="i1",
        name="vm",
        project="p",
        host=draw(st.sampled_from(("h", "gone"))),
        vm_state=draw(st.sampled_from(tuple(VmState))),
        prior_vm_state=draw(st.sampled_from((None, *VmState))),
        further_vm_states=draw(st.sampled_from(((), (VmState.STOPPED,), (VmState.ACTIVE, VmState.STOPPED)))),
        updated_at_ms=START_MS - draw(AGES_MS),
        locked_by=draw(st.sampled_from((None, "somebody"))),
        lock_role=draw(st.sampled_from((Role.MEMBER, Role.ADMIN))),
        power_state=draw(st.sampled_from(PowerState)),
        failures=dict.fromkeys(draw(KINDS), draw(st.sampled_from((1, 2)))),
        blocked_operations=tuple(draw(KINDS)),
        tags=tuple(draw(st.frozensets(st.sampled_from((*TAGS, "unknown to policies"))))),
        launched_at_ms=draw(st.sampled_from((None, START_MS))),
        outstanding=tuple(outstanding),
        held=tuple(draw(st.lists(requests(Status.QUEUED, OPERATIONS), max_size=2))),
    )


CONDITIONS: dict[str, st.SearchStrategy[Any]] = {
    "vm_states": st.frozensets(st.sampled_from(tuple(VmState)), min_size=1),
    "task_states": st.frozensets(st.sampled_from((NO_TASK, *TASK_STATES)), min_size=1),
    "outstanding": KINDS,
    "held": KINDS,
    "roles": st.sampled_from((frozenset({"admin"}), frozenset({"member", "reader"}))),
    "requested_by": st.sampled_from((frozenset({"me"}), frozenset({"m*", "you"}))),
    "locked": st.booleans(),
    "blocked": st.booleans(),
    "tags": st.frozensets(st.sampled_from(TAGS), min_size=1),
    "host_reachable": st.booleans(),
    "hard": st.booleans(),
    "launched": st.booleans(),
    "silent_ms_min": st.sampled_from(TIMES_MS),
    "locked_above": st.booleans(),
    "power_state": st.frozensets(st.sampled_from(POWER_STATES), min_size=1, max_size=2),
    "failures_min": st.sampled_from((1, 2)),
}


@st.composite
def rules(draw: st.DrawFn, number: int) -> Rule:
    verdict = draw(st.sampled_from(tuple(Verdict)))
    conditions = draw(st.frozensets(st.sampled_from(sorted(CONDITIONS)), max_size=3))
    return Rule(
        id=f"rule-{number}",
        operations=draw(st.sampled_from((frozenset(Operation), draw(st.frozensets(OPERATIONS, min_size=1))))),
        verdict=verdict,
        threshold_ms=draw(st.sampled_from(TIMES_MS)) if verdict is Verdict.AFTER else None,
        measured_from=draw(st.sampled_from(tuple(MeasuredFrom))),
        before=draw(st.sampled_from(tuple(Before))),
        in_turn=draw(st.booleans()),
        reason=draw(st.sampled_from((None, "a_reason"))),
        **{name: draw(CONDITIONS[name]) for name in sorted(conditions)},
    )


VARIED = (
    *("vm_state", "updated_at_ms", "locked_by", "blocked_operations", "tags", "launched_at_ms", "held", "host"),
    *("prior_vm_state", "further_vm_states", "outstanding", "lock_role", "power_state", "failures"),
)


@st.composite
def fleets(draw: st.DrawFn) -> list[Instance]:
    """Instances that mostly differ from the first in one thing only, so that one taken for another is found out."""
    first = draw(instances())
    fleet = [first]
    for varied in draw(st.lists(st.sampled_from(VARIED), max_size=5)):
        other = draw(instances())
        fleet.append(msgspec.structs.replace(first, **{varied: getattr(other, varied)}))
    for request in first.outstanding[:1]:
        earlier_ms = draw(AGES_MS)
        aged = msgspec.structs.replace(
            request, taken_at_ms=None if request.taken_at_ms is None else request.taken_at_ms - earlier_ms
        )
        fleet.append(msgspec.structs.replace(first, outstanding=(aged, *first.outstanding[1:])))
        fleet.append(msgspec.structs.replace(first, outstanding=(*first.outstanding, first.outstanding[-1])))
    return fleet


@st.composite
def policies(draw: st.DrawFn) -> CompiledPolicy:
    if draw(st.booleans()):
        return compile_named(draw(st.sampled_from(builtin_names())), performs=draw(st.sampled_from((None, PERFORMED))))
    count = draw(st.integers(1, 8))
    policy = Policy(
        name="made",
        rules=tuple(draw(rules(number)) for number in range(count)),
        outstanding_max=draw(st.integers(1, 4)),
    )
    return CompiledPolicy(policy)


PERFORMED = frozenset(Operation) - {Operation.BACKUP, Operation.EVACUATE}


def as_the_gate_says(answer: Disposition) -> tuple[Answered, str, str | None, bool, int | None]:
    match answer:
        case Admitted(rule=rule):
            return Answered.ADMITTED, rule, None, False, None
        case Redundant(rule=rule, reason=reason, allowed_at_ms=at):
            return Answered.REDUNDANT, rule, reason, False, None if at is None else at - START_MS
        case Denied(rule=rule, reason=reason, foreseen=foreseen, allowed_at_ms=at):
            return Answered.DENIED, rule, reason, foreseen, None if at is None else at - START_MS
        case _:
            pytest.fail("Nothing was asked to be held.")


@settings(max_examples=tier(60, 1500))
@given(
    st.one_of(fleets(), st.lists(instances(), min_size=1, max_size=5)),
    policies(),
    st.sampled_from(Role),
    st.booleans(),
)
def test_a_fleet_is_answered_as_each_of_its_instances_is(
    fleet: list[Instance], policy: CompiledPolicy, role: Role, hard: bool
) -> None:
    answers = judge_fleet(
        fleet, policy, START_MS, caller={"role": role, "requested_by": "me"}, hard=hard, unreachable_hosts={"gone"}
    )
    for row, one in enumerate(fleet):
        for operation in Operation:
            submission = Submission(
                request_id="r",
                operation=operation,
                parameters={"hard": True} if hard else {},
                requested_by="me",
                role=role,
                host_reachable=one.host != "gone",
            )
            expected = as_the_gate_says(judge(one, submission, policy, START_MS))
            assert answers.answer(operation, row) == expected, (operation, one)
            # The time is that of another instance in the same situation.
            together = answers.of(operation, answers.groups[row])
            assert together[:4] == expected[:4], (operation, one)
            assert (together.allowed_in_ms is None) == (expected[4] is None)


def made(*rules: Rule, outstanding_max: int = 16) -> CompiledPolicy:
    return CompiledPolicy(Policy(name="made", rules=rules, outstanding_max=outstanding_max))


def rule(verdict: Verdict, **more: Any) -> Rule:
    return Rule(**{"id": verdict.value, "operations": frozenset(Operation), "verdict": verdict, **more})


def dispositions(answers: FleetAnswers, operation: Operation) -> list[Answered]:
    return [answers.of(operation, group).disposition for group in answers.groups]


def queued(operation: Operation, **more: Any) -> Request:
    return Request(
        id="r0",
        instance_id="i1",
        operation=operation,
        requested_by="somebody",
        rule="made",
        admitted_at_ms=START_MS,
        **more,
    )


def answered(policy: CompiledPolicy, one: Instance, operation: Operation) -> tuple[Answered, str | None]:
    answer = judge_fleet([one], policy, START_MS).answer(operation, 0)
    return answer.disposition, answer.reason


def test_nothing_is_admitted_in_turn_behind_a_delete_even_if_the_policy_would_admit_it_of_what_is_deleted() -> None:
    policy = made(rule(Verdict.ADMIT, vm_states=frozenset(VmState)))
    deleting = serving(VmState.ACTIVE, "deleting")
    assert answered(policy, deleting, Operation.STOP) == (Answered.DENIED, "deleting")
    assert answered(policy, instance(VmState.DELETED), Operation.STOP) == (Answered.DENIED, "deleted")


def test_what_is_not_admitted_in_turn_is_not_judged_where_the_queue_leads() -> None:
    rules = (rule(Verdict.DENY, id="no", vm_states=frozenset({VmState.STOPPED})), rule(Verdict.ADMIT, in_turn=False))
    stopping = serving(VmState.ACTIVE, "powering_off")
    assert answered(made(*rules), stopping, Operation.REBOOT) == (Answered.ADMITTED, None)
    in_turn = (rules[0], rule(Verdict.ADMIT))
    assert answered(made(*in_turn), stopping, Operation.REBOOT) == (Answered.DENIED, "not_allowed")


def test_what_a_create_will_launch_counts_as_launched_behind_it() -> None:
    policy = made(
        rule(Verdict.ADMIT, id="new", vm_states=frozenset({VmState.BUILDING})), rule(Verdict.ADMIT, launched=True)
    )
    creating = serving(VmState.BUILDING, "spawning")
    then_stopped = msgspec.structs.replace(creating, outstanding=(*creating.outstanding, queued(Operation.STOP)))
    never = msgspec.structs.replace(instance(VmState.BUILDING), outstanding=(queued(Operation.STOP),))
    answers = judge_fleet([then_stopped, never], policy, START_MS)
    assert dispositions(answers, Operation.START) == [Answered.ADMITTED, Answered.DENIED]


def test_ages_on_both_sides_of_a_time_are_two_situations() -> None:
    policy = made(
        rule(Verdict.DENY, silent_ms_min=1_000), rule(Verdict.AFTER, threshold_ms=500, before=Before.REDUNDANT)
    )
    fleet = [aged(silent_ms) for silent_ms in (0, 499, 500, 999, 1_000)]
    answers = judge_fleet(fleet, policy, START_MS)
    said = [Answered.REDUNDANT, Answered.REDUNDANT, Answered.ADMITTED, Answered.ADMITTED, Answered.DENIED]
    assert dispositions(answers, Operation.STOP) == said
    waits = [answers.answer(Operation.STOP, row).allowed_in_ms for row in range(5)]
    assert waits == [500, 1, None, None, None]


def aged(silent_ms: int) -> Instance:
    return msgspec.structs.replace(instance(VmState.ACTIVE), updated_at_ms=START_MS - silent_ms)


def test_a_rule_that_counts_from_the_start_is_told_by_that_age() -> None:
    policy = made(rule(Verdict.AFTER, threshold_ms=500, measured_from=MeasuredFrom.TASK_STARTED))
    taken = queued(Operation.PAUSE, status=Status.IN_FLIGHT, phase="pausing", last_progress_at_ms=START_MS - 7)
    fleet = [
        msgspec.structs.replace(
            instance(VmState.ACTIVE),
            outstanding=(msgspec.structs.replace(taken, taken_at_ms=START_MS - running_ms),),
        )
        for running_ms in (10, 499, 500)
    ]
    answers = judge_fleet(fleet, policy, START_MS)
    assert [answers.answer(Operation.STOP, row).allowed_in_ms for row in range(3)] == [490, 1, None]
    assert dispositions(answers, Operation.STOP) == [Answered.DENIED, Answered.DENIED, Answered.ADMITTED]


def test_a_full_queue_and_what_is_held_tell_instances_apart() -> None:
    policy = made(
        rule(Verdict.DENY, held=frozenset({Operation.PAUSE}), reason="held"), rule(Verdict.ADMIT), outstanding_max=2
    )
    waits = queued(Operation.ATTACH_VOLUME)
    fleet = [
        msgspec.structs.replace(
            instance(VmState.ACTIVE),
            outstanding=(waits,) * count,
            held=tuple(queued(operation, status=Status.HELD) for operation in held),
        )
        for count, held in ((1, ()), (2, ()), (1, (Operation.PAUSE,)), (1, (Operation.STOP,)))
    ]
    answers = judge_fleet(fleet, policy, START_MS)
    assert [answers.of(Operation.STOP, group).reason for group in answers.groups] == [None, "queue_full", "held", None]


def test_locks_are_told_apart_where_no_rule_is_about_them() -> None:
    policy = made(rule(Verdict.ADMIT))
    locks: list[dict[str, Any]] = [{}, {"locked_by": "a"}, {"locked_by": "a", "lock_role": Role.ADMIN}]
    fleet = [instance(VmState.ACTIVE, **lock) for lock in locks]
    answers = judge_fleet(fleet, policy, START_MS, caller={"role": Role.ADMIN})
    assert dispositions(answers, Operation.LOCK) == [Answered.ADMITTED, Answered.ADMITTED, Answered.REDUNDANT]
    assert answers.situations == 2


def test_failures_are_told_apart_by_operation() -> None:
    policy = made(rule(Verdict.DENY, failures_min=2), rule(Verdict.ADMIT))
    failures: list[dict[Operation, int]] = [{}, {Operation.START: 2}, {Operation.START: 1}, {Operation.STOP: 2}]
    fleet = [instance(VmState.ACTIVE, failures=each) for each in failures]
    answers = judge_fleet(fleet, policy, START_MS)
    admitted, denied = Answered.ADMITTED, Answered.DENIED
    assert dispositions(answers, Operation.START) == [admitted, denied, admitted, admitted]
    assert dispositions(answers, Operation.STOP) == [admitted, admitted, admitted, denied]


def test_a_state_reached_meanwhile_is_not_one_it_has_been_in() -> None:
    policy = made(
        rule(Verdict.ADMIT, id="at-once", task_states=frozenset(TASK_STATES)),
        rule(Verdict.DENY, in_state_ms_min=1_000),
        rule(Verdict.ADMIT),
    )
    rebooting = serving(VmState.ACTIVE, "rebooting", state_since_ms=START_MS - 5_000)
    back_again = (*rebooting.outstanding, queued(Operation.STOP), queued(Operation.START))
    fleet = [rebooting, msgspec.structs.replace(rebooting, outstanding=back_again)]
    answers = judge_fleet(fleet, policy, START_MS)
    assert dispositions(answers, Operation.PAUSE) == [Answered.DENIED, Answered.ADMITTED]


def test_blocked_operations_are_told_apart_by_operation() -> None:
    policy = made(rule(Verdict.DENY, blocked=True, reason="blocked"), rule(Verdict.ADMIT))
    blocks = [(), (Operation.STOP,), (Operation.START,), (Operation.STOP, Operation.START)]
    fleet = [msgspec.structs.replace(instance(VmState.ACTIVE), blocked_operations=each) for each in blocks]
    answers = judge_fleet(fleet, policy, START_MS)
    assert answers.situations == 1
    admitted, denied = Answered.ADMITTED, Answered.DENIED
    assert dispositions(answers, Operation.STOP) == [admitted, denied, admitted, denied]
    assert answers.counts()[Operation.START] == {admitted: 2, Answered.REDUNDANT: 0, denied: 2}


def test_a_soft_stop_that_waits_at_the_front_is_no_hard_one() -> None:
    policy = made(rule(Verdict.PREEMPT))
    soft = queued(Operation.STOP, preempts=True)
    hard = queued(Operation.STOP, preempts=True, parameters={"hard": True})
    fleet = [msgspec.structs.replace(instance(VmState.ACTIVE), outstanding=(one,)) for one in (soft, hard)]
    again, admitted = Answered.REDUNDANT, Answered.ADMITTED
    assert dispositions(judge_fleet(fleet, policy, START_MS), Operation.STOP) == [again, admitted]
    assert dispositions(judge_fleet(fleet, policy, START_MS, hard=True), Operation.STOP) == [admitted, again]


def test_instances_that_no_rule_can_tell_apart_are_one_situation() -> None:
    policy = compile_named("standard")
    tagged = [instance(VmState.ACTIVE, tags=(f"only-{number}",)) for number in range(50)]
    assert judge_fleet(tagged, policy, START_MS).situations == 1


def test_the_counts_and_the_reasons_say_the_same() -> None:
    fleet = [instance(VmState.ACTIVE), instance(VmState.STOPPED), instance(VmState.STOPPED)]
    answers = judge_fleet(fleet, compile_named("standard"), START_MS, caller={"role": "admin"})
    assert answers.counts()[Operation.START] == {Answered.ADMITTED: 2, Answered.REDUNDANT: 1, Answered.DENIED: 0}
    assert answers.reasons(Operation.START) == {(Answered.REDUNDANT, "already_active"): 1}
    for operation, counts in answers.counts().items():
        assert sum(answers.reasons(operation).values()) == len(fleet) - counts[Answered.ADMITTED]


def test_only_the_operations_asked_for_are_answered() -> None:
    standard = compile_named("standard")
    answers = judge_fleet(
        [instance(VmState.ACTIVE)], standard, START_MS, caller={"role": "admin"}, operations=[Operation.STOP]
    )
    assert list(answers.counts()) == [Operation.STOP]


def test_a_fleet_of_nothing_has_no_answers() -> None:
    answers = judge_fleet([], compile_named("standard"), START_MS)
    assert answers.counts()[Operation.STOP] == dict.fromkeys(Answered, 0)
    assert answers.reasons(Operation.STOP) == {}


def test_two_policies_are_compared_by_the_rules_that_make_the_difference() -> None:
    fleet = [instance(VmState.ACTIVE), instance(VmState.STOPPED), instance(VmState.ACTIVE), instance(VmState.PAUSED)]
    active = frozenset({VmState.ACTIVE})
    before = made(rule(Verdict.DENY, id="not-paused", vm_states=frozenset({VmState.PAUSED})), rule(Verdict.ADMIT))
    after = made(rule(Verdict.DENY, id="not-active", vm_states=active, reason="busy"), rule(Verdict.ADMIT))
    stop = [Operation.STOP]
    refused, gained = compare(
        judge_fleet(fleet, before, START_MS, operations=stop), judge_fleet(fleet, after, START_MS, operations=stop)
    )
    assert (refused.instances, refused.examples, refused.rule_before, refused.rule_after) == (
        *(2, (0, 2)),
        *("admit", "not-active"),
    )
    assert (refused.before, refused.after, refused.reason_after) == (Answered.ADMITTED, Answered.DENIED, "busy")
    assert (gained.instances, gained.examples, gained.reason_before) == (1, (3,), "not_allowed")
    assert compare(judge_fleet(fleet, before, START_MS), judge_fleet(fleet, before, START_MS)) == ()


def test_answers_of_two_fleets_are_not_compared() -> None:
    answers = [judge_fleet([instance(VmState.ACTIVE)], compile_named("standard"), START_MS) for _ in range(2)]
    with pytest.raises(ValueError, match="Only answers of one fleet"):
        compare(*answers)
