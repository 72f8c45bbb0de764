"""The gate for fleets answers as the gate for one instance does, whatever the instances and the policy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_samples import START_MS

from interlock.core.admission import judge
from interlock.core.operations import CATALOGUE, TASK_OPERATION, Lane, Operation
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import Admitted, Denied, Disposition, Instance, Redundant, Request, Status, Submission
from interlock.core.states import VmState
from interlock.policies.fleet_gate import Answered, FleetAnswers, judge_fleet
from interlock.policies.fleets import TASK_CODE, Fleet
from interlock.policies.reading import builtin_names, compile_named

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
        for lane in (Lane.STATE, Lane.COMPONENT):
            if draw(st.booleans()):
                outstanding.append(draw(requests(draw(served), of_lane(lane))))
        queueable = of_lane(draw(st.sampled_from((Lane.STATE, Lane.COMPONENT))))
        outstanding += draw(st.lists(requests(Status.QUEUED, queueable), max_size=3))
    return Instance(
        id="i1",
        name="vm",
        project="p",
        host=draw(st.sampled_from(("h", "gone"))),
        vm_state=draw(st.sampled_from(tuple(VmState))),
        prior_vm_state=draw(st.sampled_from((None, VmState.ACTIVE, VmState.STOPPED, VmState.BUILDING))),
        updated_at_ms=START_MS - draw(AGES_MS),
        locked_by=draw(st.sampled_from((None, "somebody"))),
        blocked_operations=tuple(draw(KINDS)),
        tags=tuple(draw(st.frozensets(st.sampled_from((*TAGS, "unknown to policies"))))),
        launched_at_ms=draw(st.sampled_from((None, START_MS))),
        outstanding=tuple(outstanding),
        held=tuple(draw(st.lists(requests(Status.QUEUED, OPERATIONS), max_size=2))),
    )


@st.composite
def rules(draw: st.DrawFn, number: int) -> Rule:
    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(strategy) if draw(st.integers(0, 3)) == 0 else None

    verdict = draw(st.sampled_from(tuple(Verdict)))
    return Rule(
        id=f"rule-{number}",
        operations=draw(st.sampled_from((frozenset(Operation), draw(st.frozensets(OPERATIONS, min_size=1))))),
        verdict=verdict,
        vm_states=maybe(st.frozensets(st.sampled_from(tuple(VmState)), min_size=1)),
        task_states=maybe(st.frozensets(st.sampled_from(tuple(TASK_CODE)), min_size=1)),
        outstanding=maybe(KINDS),
        held=maybe(KINDS),
        roles=maybe(st.sampled_from((frozenset({"admin"}), frozenset({"member", "reader"})))),
        locked=maybe(st.booleans()),
        blocked=maybe(st.booleans()),
        tags=maybe(st.frozensets(st.sampled_from(TAGS), min_size=1)),
        host_reachable=maybe(st.booleans()),
        hard=maybe(st.booleans()),
        launched=maybe(st.booleans()),
        silent_ms_min=maybe(st.sampled_from(TIMES_MS)),
        threshold_ms=draw(st.sampled_from(TIMES_MS)) if verdict is Verdict.AFTER else None,
        measured_from=draw(st.sampled_from(tuple(MeasuredFrom))),
        before=draw(st.sampled_from(tuple(Before))),
        in_turn=draw(st.booleans()),
        reason=draw(st.sampled_from((None, "a_reason"))),
    )


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


def as_the_fleet_says(
    answers: FleetAnswers, operation: Operation, row: int
) -> tuple[Answered, str, str | None, bool, int | None]:
    answer = answers.answer(operation, row)
    whole = (
        int(answers.dispositions(operation)[row]),
        answers.rules[answers.deciding(operation)[row]],
        int(answers.allowed_in_ms(operation)[row]),
    )
    alone = (answer.disposition, answer.rule, -1 if answer.allowed_in_ms is None else answer.allowed_in_ms)
    assert whole == alone, "the arrays and the single answer are one"
    return answer.disposition, answer.rule.id, answer.reason, answer.foreseen, answer.allowed_in_ms


@settings(max_examples=300)
@given(
    st.lists(instances(), min_size=1, max_size=5),
    policies(),
    st.sampled_from(("reader", "member", "admin")),
    st.booleans(),
)
def test_a_fleet_is_answered_as_each_of_its_instances_is(
    fleet: list[Instance], policy: CompiledPolicy, role: str, hard: bool
) -> None:
    answers = judge_fleet(Fleet.of(fleet, START_MS, {"gone"}), policy, role, hard=hard)
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
            assert as_the_fleet_says(answers, operation, row) == expected, (operation, one)
