"""The conditions `groups` and `projects`: who asks, by what the caller belongs to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from policy_samples import START_MS, instance
from test_requested_by import ROBOTS, asked, written

from interlock.core.admission import admit, judge
from interlock.core.lifecycle import finish, take
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Outcome, Submission
from interlock.core.request_queue import replace
from interlock.core.states import VmState
from interlock.policies.comparison import differ
from interlock.policies.explanation import explain, ways
from interlock.policies.language.loader import load
from interlock.policies.model_checker import explore
from interlock.policies.rehearsal.runner import rehearse

O = Operation  # noqa: E741
V = VmState


def ruled(key: str, words: list[str], verdict: str = "deny", operations: str = '["stop", "rebuild"]') -> CompiledPolicy:
    text = ROBOTS.replace('requested_by = ["ci-*", "mallory"]', f"{key} = {json.dumps(words)}")
    text = text.replace('"deny"', f'"{verdict}"').replace('["stop", "rebuild"]', operations)
    return CompiledPolicy(written(text))


def by(groups: tuple[str, ...], operation: Operation = O.STOP, project: str = "") -> Submission:
    return replace(asked("alice", operation), groups=groups, project=project)


@pytest.mark.parametrize(
    ("groups", "accepted", "refused"),
    [
        (["ops"], [("ops",), ("dev", "ops")], [(), ("dev",)]),
        (["ops", "dba"], [("dba",), ("ops", "dba")], [("dev",)]),
        (["!trainees"], [(), ("ops",)], [("trainees",), ("ops", "trainees")]),
        (["ops", "!trainees"], [("ops",)], [(), ("ops", "trainees"), ("dev",)]),
    ],
)
def test_a_rule_holds_for_the_groups_it_names(groups: list[str], accepted: Any, refused: Any) -> None:
    policy = ruled("groups", groups)
    for each, holds in [*((one, True) for one in accepted), *((one, False) for one in refused)]:
        answer = judge(instance(V.ACTIVE), by(each), policy, START_MS)
        assert (answer.rule == "robots") is holds, each  # type: ignore[union-attr]


def test_a_rule_holds_for_callers_of_a_project() -> None:
    policy = ruled("projects", ["payments", "lab-*"])
    rules = [judge(instance(V.ACTIVE), by((), project=one), policy, START_MS) for one in ("payments", "lab-7", "web")]
    assert [answer.rule for answer in rules] == ["robots", "robots", "stop"]  # type: ignore[union-attr]


@pytest.mark.parametrize("groups", [["a b"], ["!!ops"], ["ops*"], []])
def test_what_can_be_no_group_is_refused_with_its_place(groups: list[str]) -> None:
    with pytest.raises(Exception, match=r"site\.toml:\d+:\d+: groups (must be a list of 1 to 64 groups|is an)"):
        ruled("groups", groups)


def test_a_queued_request_is_judged_again_for_the_groups_that_its_caller_had() -> None:
    text = """
    [[rule]]
    id = "apprentices"
    operations = ["rebuild"]
    vm_state = ["active"]
    task_state = ["none"]
    groups = ["trainees"]
    verdict = "deny"

    [[rule]]
    id = "rest"
    operations = "*"
    verdict = "admit"
    """
    policy, left = CompiledPolicy(written(text)), []
    for groups in ((), ("trainees",)):
        stopping = take(admit(instance(V.ACTIVE), by(()), policy, START_MS).instance, None, START_MS).instance
        queued = admit(stopping, replace(by(groups, O.REBUILD), request_id="r2"), policy, START_MS)
        assert isinstance(queued.answer, Admitted)
        failed = finish(queued.instance, "r1", stopping.outstanding[0].fence, Outcome.FAILED, policy, START_MS)
        left.append([request.operation for request in failed.instance.outstanding])
    assert left == [[O.REBUILD], []]


def test_an_explanation_names_the_groups_that_are_missing_and_what_would_do() -> None:
    policy = ruled("groups", ["ops", "!trainees"], "admit", '["unrescue"]')
    there = instance(V.ACTIVE)
    found = explain(there, by(("dev",), O.UNRESCUE), policy, START_MS)
    tried = next(one for one in found.tried if one.rule == "robots")
    assert tried.failed == "groups: wants ops and not trainees, found dev"
    texts = [way.text for way in ways(there, by(("dev",), O.UNRESCUE), policy, START_MS)]
    assert "if requested by a member of ops" in texts
    assert "if requested by a member of ops and trainees" not in texts


def test_two_policies_differ_for_members_of_a_group() -> None:
    found = differ(load("standard"), ruled("groups", ["trainees"]).policy)
    assert {group.condition for group in found.groups if not group.follows} == {"by a member of trainees"}
    assert found.complete


def test_a_policy_under_which_only_a_group_can_delete_is_never_stuck() -> None:
    """Law 5 asks whether anybody can end what hangs: the model checker submits as members of the group too."""
    reachable = explore(ruled("groups", ["!ops"], operations='["delete"]'), operations=_FEW, outstanding_max=2)
    assert not reachable.violations
    nobody = CompiledPolicy(written(ROBOTS.replace('["stop", "rebuild"]', '["delete"]').replace('"mallory"', '"*"')))
    assert explore(nobody, operations=_FEW, outstanding_max=2).violations


_FEW = [O.STOP, O.START, O.DELETE]


def test_a_rehearsal_submits_as_a_member_of_groups() -> None:
    lines = [
        '{"instance": {"vm_state": "active", "role": "member"}}',
        '{"submit": "stop", "groups": ["trainees"], "project": "web"}',
        '{"submit": "stop"}',
    ]
    answers = [json.loads(answer) for answer in rehearse(lines, ruled("groups", ["trainees"]))]
    assert [answer.get("rule") for answer in answers[1:]] == ["robots", "stop"]
