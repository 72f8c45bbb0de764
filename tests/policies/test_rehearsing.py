"""A rehearsal answers every line with one JSON object of the promised shape, whatever the line holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.operations import CATALOGUE, Operation
from interlock.policies.language.loader import compile_named
from interlock.policies.rehearsal.runner import rehearse
from tiers import tier

STANDARD = compile_named("standard")
SUBMIT_KEYS = ["disposition", "reason", "rule", "retry_after", "supersedes", "cancels", "request"]
SETTLED_KEYS = ["vm_state", "task_state", "ended", "cancelled"]


def play(*events: Any, policy: str = "standard") -> list[dict[str, Any]]:
    lines = [event if isinstance(event, (str, bytes)) else json.dumps(event) for event in events]
    return [json.loads(answer) for answer in rehearse(lines, compile_named(policy))]


ACTIVE = {"instance": {"vm_state": "active", "in_flight": None, "task_state": None, "age": "0s"}}


def test_without_an_instance_it_begins_with_one_that_is_building() -> None:
    (shown,) = play({"show": True})
    assert (shown["vm_state"], shown["task_state"], shown["in_flight"]) == ("building", None, None)
    assert (shown["age"], shown["outstanding"]) == ("0s", [])


def test_the_answers_have_exactly_the_promised_keys() -> None:
    answers = play(
        ACTIVE, {"submit": "reboot"}, {"take": "any"}, {"progress": "r1", "phase": "reboot_started"},
        {"finish": "reboot", "outcome": "succeeded"}, {"observe": "reset"}, {"advance": "1s"}, {"cancel": "r1"},
    )  # fmt: skip
    assert list(answers[1]) == SUBMIT_KEYS
    assert answers[2] == {"taken": "reboot", "request": "r1"}
    for answer in answers[3:7]:
        assert list(answer) == SETTLED_KEYS
    assert answers[4]["ended"] == {"r1": "succeeded"}
    assert list(answers[7]) == ["cancel", *SETTLED_KEYS]


@pytest.mark.parametrize("policy", ["standard", "nova", "propolis"])
def test_a_record_operation_is_done_at_once_beside_what_is_in_flight(policy: str) -> None:
    answers = play({"instance": {"in_flight": "stop"}}, {"submit": "rename"}, {"show": True}, policy=policy)
    assert answers[1]["disposition"] == "admitted"
    assert (answers[2]["in_flight"], len(answers[2]["outstanding"])) == ("stop", 1)


@pytest.mark.parametrize("operation", [operation for operation in Operation if CATALOGUE[operation].phases])
def test_any_operation_can_be_in_flight_at_the_beginning(operation: Operation) -> None:
    phases = CATALOGUE[operation].phases + CATALOGUE[operation].hard_phases
    (first,) = play({"instance": {"in_flight": operation.value}})
    assert first["in_flight"] == operation.value
    for phase in phases:
        (shown,) = play({"instance": {"in_flight": operation.value, "task_state": phase, "age": "90s"}})
        assert (shown["in_flight"], shown["age"]) == (operation.value, "90s")
    assert play({"instance": {"in_flight": operation.value}}, {"finish": operation.value})[1]["ended"] == {
        "r1": "succeeded"
    }


def test_a_phase_alone_tells_the_operation() -> None:
    (shown,) = play({"instance": {"vm_state": "active", "task_state": "powering-off"}})
    assert (shown["in_flight"], shown["task_state"]) == ("stop", "powering_off")


def test_ids_count_what_was_admitted_since_the_beginning_of_the_instance() -> None:
    answers = play(ACTIVE, {"submit": "start"}, {"submit": "stop"}, {"submit": "start"}, ACTIVE, {"submit": "pause"})
    assert [answer.get("request") for answer in answers] == [None, None, "r1", "r2", None, "r1"]


def test_time_is_told_in_seconds_and_rounded_to_none() -> None:
    stuck = {"instance": {"vm_state": "active", "in_flight": "reboot", "age": "20.25s"}}
    assert play(stuck, {"submit": "stop"})[1]["retry_after"] == 159.75
    assert play(stuck, {"advance": 0.75}, {"submit": "stop"})[2]["retry_after"] == 159
    assert play(stuck, {"advance": "159750ms"}, {"submit": "stop"})[2]["supersedes"] == ["r1"]


def test_time_that_passes_fences_what_does_not_confirm() -> None:
    answers = play({"instance": {"vm_state": "active", "in_flight": "pause"}}, {"submit": "delete"}, {"advance": "9s"},
                   {"advance": "1s"})  # fmt: skip
    assert [answer.get("ended") for answer in answers[2:]] == [{}, {"r1": "superseded"}]


def test_a_worker_that_was_fenced_is_told_so_and_changes_nothing() -> None:
    stuck = {"instance": {"vm_state": "active", "in_flight": "reboot", "age": "180s"}}
    answers = play(
        stuck, {"submit": "delete"}, {"advance": "10s"}, {"finish": "r1"}, {"progress": "r1"}, {"show": True}
    )
    for late in answers[3:5]:
        assert late["fenced"] == {"fence": 0, "current_fence": 1}
        assert late["ended"] == {}
    assert answers[5]["outstanding"] == [{"request": "r2", "operation": "delete", "status": "queued"}]


def test_what_waited_is_cancelled_with_a_reason_and_what_was_served_has_an_end() -> None:
    answers = play({"instance": {"vm_state": "stopped"}}, {"submit": "start"}, {"submit": "pause"}, {"take": "any"},
                   {"finish": "start", "outcome": "failed"})  # fmt: skip
    assert answers[-1] == {
        "vm_state": "error",
        "task_state": None,
        "ended": {"r1": "failed"},
        "cancelled": {"r2": "not_in_this_state"},
    }


def test_an_interrupted_request_that_its_owner_cancelled_has_an_end_of_its_own() -> None:
    answers = play({"instance": {"vm_state": "active", "in_flight": "snapshot"}}, {"cancel": "r1"},
                   {"finish": "r1", "outcome": "interrupted"}, {"submit": "stop"}, {"cancel": "r2"})  # fmt: skip
    assert answers[1]["cancel"] == "stopping"
    assert (answers[2]["ended"], answers[2]["cancelled"]) == ({"r1": "cancelled"}, {})
    assert (answers[4]["cancel"], answers[4]["cancelled"]) == ("cancelled", {"r2": "cancelled"})


def test_a_caller_and_an_instance_can_be_more_than_the_usual() -> None:
    locked = {"instance": {"vm_state": "active", "locked": True, "role": "member", "blocked": ["pause"]}}
    as_admin = ({"submit": "stop", "role": "admin"}, {"submit": "pause", "role": "admin"})
    answers = play(locked, {"submit": "stop"}, *as_admin, {"submit": "unlock"}, {"submit": "stop", "hard": True})
    reasons = [answer.get("reason") for answer in answers[1:]]
    assert reasons == ["locked", None, "operation_blocked", None, "already_asked"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ('"\ud800"', "not JSON"),
        ("[]", "Invalid event"),
        ("{}", "exactly one of"),
        ('{"submit": "stop", "take": "any"}', "submit and take"),
        ('{"submit": "stop", "phase": "x"}', "phase is valid only with progress"),
        ('{"sumbit": "stop"}', "unknown field `sumbit`"),
        ('{"submit": "stpo"}', "Did you mean 'stop'"),
        ('{"submit": 1}', "Expected"),
        ('{"submit": "stop", "role": "root"}', "Unknown role"),
        ('{"submit": "reset_state", "parameters": {"vm_state": "fine"}}', "Invalid vm_state 'fine'"),
        ('{"submit": "reset_state", "parameters": {"vm_state": ["x"]}}', "Invalid vm_state"),
        ('{"submit": "reset_state", "parameters": {"vm_state": "soft_delete"}}', "Invalid vm_state 'soft_delete'"),
        ('{"take": "all"}', "Unknown lane"),
        ('{"finish": "stop"}', "not in flight"),
        ('{"finish": "create", "outcome": "fine"}', "Unknown outcome"),
        ('{"progress": "create", "phase": "pausing"}', "has no phase"),
        ('{"observe": "panic"}', "Unknown guest event"),
        ('{"cancel": "r7"}', "Request 'r7' not found"),
        ('{"cancel": "r\u0661"}', "not found"),
        ('{"advance": "soon"}', "Invalid duration"),
        ('{"advance": -1}', "Invalid duration"),
        ('{"advance": 1e300}', "Invalid duration"),
        ('{"show": false}', "Invalid event"),
        ('{"instance": {"vm_state": "actve"}}', "Did you mean 'active'"),
        ('{"instance": {"in_flight": "lock"}}', "never in flight"),
        ('{"instance": {"in_flight": "stop", "task_state": "pausing"}}', "has no phase"),
        ('{"instance": {"task_state": "thinking"}}', "Unknown task_state"),
        ('{"instance": {"colour": "red"}}', "unknown field"),
        ('{"submit": "' + "x" * 70_000 + '"}', "longer than"),
    ],
)
def test_a_line_that_does_not_fit_is_answered_and_changes_nothing(line: str | bytes, message: str) -> None:
    begin = {"instance": {"in_flight": "create"}}
    answers = play(begin, {"show": True}, "", line, {"show": True})
    assert list(answers[2]) == ["error", "line"]
    assert message in answers[2]["error"]
    assert answers[2]["line"] == 4
    assert answers[3] == answers[1]


WORDS = st.sampled_from([operation.value for operation in Operation] + ["r1", "r2", "r3", "any", "state", "component"])
EVENTS = st.one_of(
    st.builds(lambda word: {"submit": word}, WORDS),
    st.builds(lambda word: {"submit": word, "hard": True}, WORDS),
    st.builds(lambda word: {"take": word}, st.sampled_from(["any", "state", "component"])),
    st.builds(lambda word, outcome: {"finish": word, "outcome": outcome}, WORDS,
              st.sampled_from(["succeeded", "failed", "interrupted", "unknown"])),
    st.builds(lambda what: {"observe": what}, st.sampled_from(["stopped", "reset", "crashed", "vanished"])),
    st.builds(lambda word: {"cancel": word}, WORDS),
    st.builds(lambda word: {"progress": word}, WORDS),
    st.builds(lambda seconds: {"advance": seconds}, st.integers(0, 1_000)),
    st.just({"show": True}),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                 lambda inner: st.dictionaries(st.sampled_from(["submit", "instance", "age", "advance"]), inner)),
)  # fmt: skip


@settings(max_examples=tier(30, 750))
@given(st.sampled_from(["standard", "take2", "propolis"]), st.lists(EVENTS, max_size=60))
def test_every_line_has_its_answer_and_every_admitted_request_ends_at_most_once(name: str, events: list[Any]) -> None:
    lines = [json.dumps(event) for event in events]
    answers = [json.loads(answer) for answer in rehearse(lines, compile_named(name))]
    assert len(answers) == len(events)
    ends: list[str] = []
    for event, answer in zip(events, answers, strict=True):
        if isinstance(event, dict) and "instance" in event and "error" not in answer:
            ends.clear()
        ends += [*answer.get("ended", {}), *answer.get("cancelled", {})]
        assert len(ends) == len(set(ends))
