"""Conditions on how many requests are outstanding in the project and on the host."""

from __future__ import annotations

import json

import pytest
from policy_samples import START_MS, instance
from test_requested_by import asked, written

from interlock.core import lifecycle
from interlock.core.admission import admit, judge
from interlock.core.holds import COUNTED_EVERY_MS, Counts
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Denied, Held, Outcome, Status
from interlock.core.request_queue import replace
from interlock.core.states import VmState
from interlock.policies.explanation import explain, ways
from interlock.policies.lint import check
from interlock.policies.model_checker import explore
from interlock.policies.rehearsal.runner import rehearse

O = Operation  # noqa: E741
V = VmState
CALM = """
[policy]
name = "calm"
extends = "standard"

[[rule]]
id = "crowded"
operations = ["stop", "rebuild"]
project_outstanding_min = 20
verdict = "deny"
reason = "crowded"

[[rule]]
id = "busy-host"
operations = ["stop"]
host_outstanding_min = 5
verdict = "deny"
reason = "busy_host"
"""


def calm(text: str = CALM) -> CompiledPolicy:
    return CompiledPolicy(written(text))


@pytest.mark.parametrize(
    ("project", "host", "rule"), [(19, 4, "stop"), (20, 0, "crowded"), (0, 5, "busy-host"), (99, 99, "crowded")]
)
def test_a_rule_holds_from_its_number_of_requests_on(project: int, host: int, rule: str) -> None:
    stop = replace(asked("alice"), project_outstanding=project, host_outstanding=host)
    assert judge(instance(V.ACTIVE), stop, calm(), START_MS).rule == rule  # type: ignore[union-attr]


def test_a_refusal_names_no_time_since_only_others_can_end_it() -> None:
    answer = judge(instance(V.ACTIVE), replace(asked("alice"), project_outstanding=20), calm(), START_MS)
    assert isinstance(answer, Denied)
    assert answer.allowed_at_ms is None


def test_a_held_request_is_evaluated_again_with_the_counts_of_that_time() -> None:
    stop = replace(asked("alice"), project_outstanding=20, hold_ms=3_600_000)
    held = admit(instance(V.ACTIVE), stop, calm(), START_MS)
    assert isinstance(held.answer, Held)
    crowd = Counts(project_outstanding=20)
    waiting = lifecycle.expire(held.instance, calm(), START_MS, counts=crowd).instance
    due_ms = lifecycle.next_deadline_ms(waiting)
    assert due_ms == START_MS + COUNTED_EVERY_MS
    assert lifecycle.expire(waiting, calm(), due_ms, counts=crowd).instance.held
    admitted = lifecycle.expire(waiting, calm(), due_ms, counts=Counts(project_outstanding=19))
    assert [one.status for one in admitted.requests] == [Status.QUEUED]


def test_a_queued_request_is_judged_again_with_the_counts_of_its_submission() -> None:
    pausing = admit(instance(V.ACTIVE), asked("alice", O.PAUSE), calm(), START_MS).instance
    stop = replace(asked("alice"), request_id="r2", project_outstanding=19)
    queued = admit(pausing, stop, calm(), START_MS)
    assert isinstance(queued.answer, Admitted)
    taken = lifecycle.take(queued.instance, None, START_MS).instance
    ended = lifecycle.finish(taken, "r1", taken.outstanding[0].fence, Outcome.FAILED, calm(), START_MS)
    assert [(one.operation, one.project_outstanding) for one in ended.instance.outstanding] == [(O.STOP, 19)]


def test_an_explanation_names_the_number() -> None:
    stop = replace(asked("alice"), project_outstanding=7)
    tried = next(one for one in explain(instance(V.ACTIVE), stop, calm(), START_MS).tried if one.rule == "crowded")
    assert tried.failed == "project_outstanding_min: wants at least 20, found 7"
    crowded = replace(asked("alice"), project_outstanding=20)
    texts = [way.text for way in ways(instance(V.ACTIVE), crowded, calm(), START_MS)]
    assert "if requested with 0 requests outstanding in the VM's project" in texts


def test_a_smaller_bound_before_a_greater_one_leaves_that_rule_dead() -> None:
    behind = calm(CALM.replace("host_outstanding_min = 5", "project_outstanding_min = 30")).policy
    assert [one.rule for one in check(behind) if one.code == "unreachable"] == ["busy-host"]


def test_the_model_checker_submits_with_few_and_with_many_outstanding() -> None:
    few = [O.STOP, O.START, O.DELETE]
    text = CALM.replace('["stop", "rebuild"]', '["delete"]')
    assert not explore(calm(text), operations=few, outstanding_max=2).violations
    never = text.replace("project_outstanding_min = 20\n", "")
    assert explore(calm(never), operations=few, outstanding_max=2).violations


@pytest.mark.parametrize("wrong", ['"20"', "-1", "1.5", "true"])
def test_what_is_no_number_is_refused_with_its_place(wrong: str) -> None:
    with pytest.raises(Exception, match=r"site\.toml:\d+:\d+: .*project_outstanding_min"):
        calm(CALM.replace("project_outstanding_min = 20", f"project_outstanding_min = {wrong}"))


def test_a_rehearsal_gives_the_counts() -> None:
    lines = [
        '{"instance": {"vm_state": "active"}}',
        '{"submit": "stop", "project_outstanding": 20}',
        '{"submit": "stop"}',
    ]
    answers = [json.loads(answer) for answer in rehearse(lines, calm())]
    assert [answer.get("rule") for answer in answers[1:]] == ["crowded", "stop"]
