"""Recorded submissions, judged again. The core itself is the model: `admit` says what a policy would have answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from policy_samples import START_MS, Play, instance

from interlock.core.admission import admit
from interlock.core.conditions import POWER_STATES
from interlock.core.operations import BIT, TASK_STATES, Operation
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import (
    Admitted,
    Denied,
    Disposition,
    Event,
    GuestEvent,
    Held,
    Outcome,
    Redundant,
    Submission,
)
from interlock.core.roles import Role
from interlock.core.states import NO_TASK, PowerState, VmState
from interlock.policies.history.replay import DISPOSITIONS, RecordedAnswer, RecordedRow, Replay, Untold, replay
from interlock.policies.language.loader import builtin_names, compile_named
from tiers import tier

O = Operation  # noqa: E741
V = VmState
AGES_MS = (0, 1_000, 15_000, 59_999, 60_000, 180_000, 600_000, 3_600_000)
BUILTIN = {name: compile_named(name) for name in builtin_names()}
TAGS = ("gold", "batch")
FURTHER: dict[str, st.SearchStrategy[Any]] = {
    "locked_above": st.booleans(),
    "power_state": st.frozensets(st.sampled_from(POWER_STATES), min_size=1, max_size=2),
    "failures_min": st.sampled_from((1, 2)),
    "age_ms_min": st.sampled_from(AGES_MS),
    "age_ms_max": st.sampled_from(AGES_MS),
    "in_state_ms_min": st.sampled_from(AGES_MS),
    "requested_by": st.just(frozenset({"m*"})),
    "projects": st.just(frozenset({"blue"})),
    "groups": st.just(frozenset({"ops"})),
    "unless_approved_by": st.just(frozenset({"group:ops"})),
    "project_outstanding_min": st.just(3),
    "host_outstanding_min": st.just(3),
    "vcpus_min": st.just(2),
    "memory_mib_max": st.just(512),
    "target_hosts": st.just(frozenset({"h*"})),
    "images": st.just(frozenset({"golden"})),
}
"""Conditions of which a rule seldom has more than one."""


def row(told: Event, sequence: int = 1, number: int = 1, project: str = "p") -> RecordedRow:
    return (sequence, number, project, told.kind, told.at_ms, msgspec.json.encode(told.data).decode())


def in_words(answer: Disposition) -> RecordedAnswer:
    match answer:
        case Admitted(rule=rule):
            return RecordedAnswer("admitted", rule)
        case Redundant(rule=rule, reason=reason):
            return RecordedAnswer("redundant", rule, reason)
        case Denied(rule=rule, reason=reason):
            return RecordedAnswer("denied", rule, reason)
        case Held(denied=denied):
            return RecordedAnswer("held", denied.rule, denied.reason)


def replayed(told: Event, policy: CompiledPolicy) -> RecordedAnswer | Untold:
    """What the replay of one event says, read back from its totals and its one difference.

    Where nothing differs for the caller, it does not say by which rule; the recorded one stands for it.
    """
    result = replay([row(told)], policy)
    assert (result.totals.submissions, result.unreadable) == (1, 0)
    recorded = RecordedAnswer(
        DISPOSITIONS[told.kind], told.data["rule"], None if told.kind == "request.admitted" else told.data["reason"]
    )
    if result.untold:
        return Untold(next(iter(result.untold)))
    if result.differences:
        (difference,) = result.differences
        assert difference.recorded == recorded
        assert result.totals.same == 0
        return difference.candidate
    assert result.totals.same == 1
    return recorded


# ------------------------------------------------------------------------------- against the core, on random instances


def some(values: Sequence[Any]) -> st.SearchStrategy[frozenset[Any]]:
    return st.frozensets(st.sampled_from(values), min_size=1, max_size=6)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


@st.composite
def rules(draw: st.DrawFn, number: int) -> Rule:
    verdict = draw(st.sampled_from(list(Verdict)))
    further = draw(st.lists(st.sampled_from(list(FURTHER)), max_size=2, unique=True))
    return Rule(
        id=f"rule-{number}",
        operations=draw(st.just(frozenset(O)) | some(list(O))),
        verdict=verdict,
        vm_states=draw(maybe(some(list(V)))),
        task_states=draw(maybe(some((NO_TASK, *TASK_STATES)))),
        outstanding=draw(maybe(st.just(frozenset[Operation]()) | some(list(O)))),
        roles=draw(maybe(some(("member", "admin")))),
        locked=draw(maybe(st.booleans())),
        tags=draw(maybe(some(TAGS))),
        hard=draw(maybe(st.booleans())),
        launched=draw(maybe(st.booleans())),
        held=draw(maybe(st.just(frozenset[Operation]()) | some(list(O)))),
        silent_ms_min=draw(maybe(st.sampled_from(AGES_MS))),
        threshold_ms=draw(st.sampled_from(AGES_MS[1:])) if verdict is Verdict.AFTER else None,
        measured_from=draw(st.sampled_from(list(MeasuredFrom))),
        before=draw(st.sampled_from(list(Before))),
        in_turn=draw(st.booleans()),
        reason=draw(maybe(st.just("because_so"))),
        **{field: draw(FURTHER[field]) for field in further},
    )


@st.composite
def policies(draw: st.DrawFn) -> CompiledPolicy:
    """A built-in policy, perhaps with a few rules of anybody's before it."""
    own = tuple(draw(rules(number)) for number in range(draw(st.integers(0, 4))))
    base = draw(st.sampled_from(list(BUILTIN.values())))
    return CompiledPolicy(
        Policy(name="made", rules=(*own, *base.rules), outstanding_max=draw(st.sampled_from((1, 2, 3, 16))))
    )


STEPS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(list(O)), st.booleans(), st.sampled_from(("member", "admin"))),
    st.tuples(st.just("take")),
    st.tuples(st.just("finish"), st.integers(0, 3), st.sampled_from(list(Outcome))),
    st.tuples(st.just("observe"), st.sampled_from(list(GuestEvent))),
    st.tuples(st.just("advance"), st.sampled_from(AGES_MS)),
)


def perform(play: Play, step: tuple[Any, ...]) -> None:
    match step:
        case ("submit", operation, hard, role):
            play.submit(operation, hard=hard, role=role)
        case ("take",):
            play.take()
        case ("finish", number, outcome):
            served = [request for request in play.instance.outstanding if request.taken_at_ms is not None]
            if number < len(served):
                play.finish(served[number].id, outcome)
        case ("observe", told):
            play.observe(told)
        case ("advance", milliseconds):
            play.advance(milliseconds)
        case _:
            raise AssertionError(step)


@st.composite
def moments(draw: st.DrawFn) -> tuple[Play, Submission]:
    """An instance with a past, and somebody who asks for something."""
    start = instance(
        draw(st.sampled_from(list(V))),
        tags=draw(st.sampled_from(((), ("gold",), ("batch", "other")))),
        locked_by=draw(st.sampled_from((None, None, None, "me"))),
        lock_role=draw(st.sampled_from((Role.MEMBER, Role.ADMIN))),
        power_state=draw(st.sampled_from(PowerState)),
        created_at_ms=START_MS - draw(st.sampled_from(AGES_MS)),
        state_since_ms=START_MS - draw(st.sampled_from(AGES_MS)),
        failures=draw(st.dictionaries(st.sampled_from(list(O)), st.integers(1, 2), max_size=3)),
        blocked_operations=draw(st.sampled_from(((), (), (O.DELETE, O.STOP)))),
        launched_at_ms=draw(st.sampled_from((None, START_MS))),
    )
    play = Play(draw(policies()), start)
    for step in draw(st.lists(STEPS, max_size=8)):
        perform(play, step)
    outstanding = [request.operation for request in play.instance.outstanding]
    submission = Submission(
        request_id="asked",
        operation=draw(st.sampled_from([*O, *outstanding * 10])),
        parameters=draw(st.sampled_from(({}, {"hard": True}, {"vcpus": 2, "memory_mib": 1024}, {"host": "h2"}))),
        requested_by="me",
        project=draw(st.sampled_from(("", "blue"))),
        groups=draw(st.sampled_from(((), ("ops",)))),
        approver=draw(st.sampled_from(((), ("group:ops",)))),
        image=draw(st.sampled_from(("", "golden"))),
        project_outstanding=draw(st.sampled_from((0, 3))),
        host_outstanding=draw(st.sampled_from((0, 3))),
        role=draw(st.sampled_from((Role.MEMBER, Role.MEMBER, Role.ADMIN, Role.ADMIN, Role.READER))),
        host_reachable=draw(st.booleans()),
        hold_ms=draw(st.sampled_from((None, None, None, 60_000))),
    )
    return play, submission


def told_of(play: Play, submission: Submission) -> tuple[Event, RecordedAnswer]:
    change = admit(play.instance, submission, play.policy, play.now_ms)
    (told,) = (one for one in change.events if one.kind in DISPOSITIONS)
    return told, in_words(change.answer)


@settings(max_examples=tier(60, 1500))
@given(moments())
def test_the_policy_that_answered_answers_the_same_again(moment: tuple[Play, Submission]) -> None:
    play, submission = moment
    told, answer = told_of(play, submission)
    event(answer.disposition)
    assert replayed(told, play.policy) == answer


@settings(max_examples=tier(100, 2500))
@given(moments(), policies())
def test_another_policy_answers_as_it_would_have_on_the_instance_itself(
    moment: tuple[Play, Submission], other: CompiledPolicy
) -> None:
    play, submission = moment
    told, _ = told_of(play, submission)
    expected = in_words(admit(play.instance, submission, other, play.now_ms).answer)
    found = replayed(told, other)
    event(f"{told.kind} → {found if isinstance(found, Untold) else found.disposition}")
    if found is Untold.EARLIER_NOT_KNOWN:
        # Only where a request that preempts might be the second of its kind.
        assert any(request.operation is submission.operation for request in play.instance.outstanding)
        assert expected.disposition in {"admitted", "redundant"}
        return
    assert isinstance(found, RecordedAnswer)
    # Whether a refusal is held besides depends on what was asked, and on the room for it, which no event tells.
    refusals = {"denied", "held"}
    assert found.disposition == expected.disposition or {found.disposition, expected.disposition} == refusals
    assert found.reason == expected.reason
    if (found.disposition, found.reason) != (DISPOSITIONS[told.kind], told.data.get("reason")):
        assert found.rule == expected.rule


# ------------------------------------------------------------------------------------------------ older events, by hand


def data(operation: Operation = O.REBOOT, *, rule: str = "r", reason: str | None = None, **view: Any) -> dict[str, Any]:
    seen = {"operation": operation.value, "vm_state": "active", "task_state": "none", "role": "member", **view}
    return {"operation": operation.value, "rule": rule, "view": seen, **({} if reason is None else {"reason": reason})}


def judged(kind: str, facts: dict[str, Any], policy: CompiledPolicy, **row_: Any) -> Replay:
    told = Event(kind=kind, instance_id="i", at_ms=1, generation=1, data=facts)
    return replay([row(told, **row_)], policy)


def one_rule(verdict: Verdict, **more: Any) -> CompiledPolicy:
    only = Rule(id="only", operations=frozenset(O), verdict=verdict, **more)
    return CompiledPolicy(Policy(name="one", rules=(only,)))


def test_an_old_event_does_not_say_where_what_was_outstanding_would_have_led() -> None:
    facts = data(outstanding=BIT[O.STOP], task_state="powering_off")
    result = judged("request.admitted", facts, one_rule(Verdict.ADMIT))
    assert (result.totals.cannot_be_told, result.untold) == (1, {"foreseen_not_recorded": 1})
    assert judged("request.admitted", facts, one_rule(Verdict.DENY)).totals.refused == 1
    recorded = {**facts, "waiting": 1, "foreseen": {"vm_state": "stopped", "launched": True}}
    assert judged("request.admitted", recorded, one_rule(Verdict.ADMIT)).totals.same == 1


def test_an_old_event_does_not_say_whether_the_instance_had_ever_run() -> None:
    never = one_rule(Verdict.ADMIT, launched=False)
    assert judged("request.denied", data(O.START, vm_state="stopped"), never).untold == {"launched_not_recorded": 1}
    assert judged("request.denied", data(O.START, vm_state="active"), never).totals.cannot_be_told == 0
    assert judged("request.denied", data(O.START, vm_state="stopped", launched=False), never).totals.admitted == 1


def test_an_event_says_whether_a_lock_would_have_changed_nothing() -> None:
    """An admin may replace the lock of a member, and who had locked it is not in the view."""
    denying, admitting = one_rule(Verdict.DENY), one_rule(Verdict.ADMIT)
    for lock_role, answer in ((Role.MEMBER, "admitted"), (Role.ADMIN, "redundant")):
        locked = instance(V.ACTIVE, locked_by="somebody", lock_role=lock_role)
        asked = Submission(request_id="asked", operation=O.LOCK, requested_by="me", role=Role.ADMIN)
        told, _ = told_of(Play(denying, locked), asked)
        found = replayed(told, admitting)
        assert isinstance(found, RecordedAnswer)
        assert found.disposition == answer


def test_an_old_event_does_not_say_whether_a_lock_would_have_changed_anything() -> None:
    admit_all = one_rule(Verdict.ADMIT)
    locks: list[tuple[dict[str, Any], str]] = [
        ({}, "admitted"),
        ({"locked": True}, "cannot_be_told"),
        ({"locked": True, "locked_above": True}, "redundant"),
    ]
    for seen, answer in locks:
        totals = judged("request.denied", data(O.LOCK, **seen), admit_all).totals
        assert getattr(totals, answer) == 1, seen
    assert judged("request.denied", data(O.RENAME), admit_all).untold == {"unchanged_not_recorded": 1}
    assert judged("request.admitted", data(O.RENAME), admit_all).totals.same == 1


def test_what_the_hypervisor_cannot_do_stays_refused_by_every_policy() -> None:
    facts = data(O.LIVE_MIGRATE, rule="not-performed", reason="not_performed")
    assert judged("request.denied", facts, one_rule(Verdict.ADMIT)).totals.same == 1


def test_a_refusal_for_another_reason_is_told_as_that() -> None:
    result = judged("request.denied", data(reason="task_in_progress"), one_rule(Verdict.DENY, reason="not_now"))
    assert (result.totals.other_reason, result.totals.refused) == (1, 0)
    assert result.differences[0].effect == "other_reason"


def test_the_same_answer_by_a_rule_of_another_name_is_no_difference() -> None:
    result = judged("request.denied", data(rule="other", reason="not_now"), one_rule(Verdict.DENY, reason="not_now"))
    assert (result.totals.same, result.differences) == (1, ())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rule": "r"}',
        '{"rule": "r", "view": {"operation": "teleport", "vm_state": "active"}}',
        '{"rule": "r", "view": {"operation": "stop", "vm_state": "melted"}}',
        '{"rule": "r", "view": {"operation": "stop", "vm_state": "active", "silent_ms": "long"}}',
        '{"rule": "r", "view": {"operation": "stop", "vm_state": "active"}, "foreseen": {"vm_state": "melted"}}',
    ],
)
def test_what_cannot_be_read_is_counted_and_not_judged(text: str) -> None:
    result = replay([(1, 1, "p", "request.denied", 1, text)], BUILTIN["standard"])
    assert (result.unreadable, result.totals.submissions) == (1, 0)


# ----------------------------------------------------------------------------------------------------------- counting


def test_differences_are_counted_by_operation_rule_and_project_the_most_first() -> None:
    denied, admitted = data(O.STOP, reason="x"), data(O.REBOOT)
    rows = [
        *(
            (number, 7, "blue", "request.denied", 100 + number, msgspec.json.encode(denied).decode())
            for number in (1, 2)
        ),
        (3, 8, "green", "request.denied", 103, msgspec.json.encode(denied).decode()),
        (4, 9, "green", "request.admitted", 104, msgspec.json.encode(admitted).decode()),
    ]
    result = replay(rows, one_rule(Verdict.ADMIT), {7: "seven", 8: "eight", 9: "nine"}.__getitem__)
    assert (result.totals.submissions, result.totals.same, result.totals.admitted) == (4, 1, 3)
    (difference,) = result.differences
    assert (difference.operation, difference.effect, difference.submissions) == ("stop", "admitted", 3)
    assert list(difference.projects.items()) == [("blue", 2), ("green", 1)]
    assert (difference.recorded, difference.candidate) == (
        RecordedAnswer("denied", "r", "x"),
        RecordedAnswer("admitted", "only"),
    )
    assert (difference.example.sequence, difference.example.instance, difference.example.at_ms) == (1, "seven", 101)
    assert {name: totals.admitted for name, totals in result.operations.items()} == {"stop": 3, "reboot": 0}
    assert {name: totals.submissions for name, totals in result.projects.items()} == {"blue": 2, "green": 2}
    assert (result.first_at_ms, result.last_at_ms) == (101, 104)


def test_silence_on_either_side_of_a_threshold_is_judged_apart() -> None:
    """Answers are remembered for what is alike; what differs only in its age may still differ in its answer."""
    policy = one_rule(Verdict.AFTER, threshold_ms=60_000)
    rows: list[RecordedRow] = [
        (
            number,
            1,
            "p",
            "request.denied",
            1,
            msgspec.json.encode(data(reason="in_progress", silent_ms=silent)).decode(),
        )
        for number, silent in enumerate((0, 59_999, 60_000, 90_000))
    ]
    totals = replay(rows, policy).totals
    assert (totals.same, totals.admitted) == (2, 2)


def test_who_had_decided_is_told() -> None:
    rows: list[RecordedRow] = []
    for number, name in enumerate(("old", "new", "new")):
        facts = {**data(), "policy": {"name": name, "digest": "d" * 16}}
        rows.append((number, 1, "p", "request.admitted", 1, msgspec.json.encode(facts).decode()))
    decided = replay(rows, one_rule(Verdict.ADMIT)).decided_by
    assert [(one.name, one.submissions) for one in decided] == [("new", 2), ("old", 1)]
