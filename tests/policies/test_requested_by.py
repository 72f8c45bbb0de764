"""The condition `requested_by`: who asks, by name or by how the name begins."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
from policy_samples import START_MS, instance

from interlock.core.admission import admit, judge
from interlock.core.lifecycle import finish, take
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.records import Admitted, Outcome, Submission
from interlock.core.states import VmState
from interlock.policies.comparison import differ
from interlock.policies.explanation import explain, ways
from interlock.policies.fleet import Answered, judge_fleet
from interlock.policies.history.replay import replay
from interlock.policies.language.json_schema import schema
from interlock.policies.language.loader import load
from interlock.policies.lint import check
from interlock.policies.model_checker import explore
from interlock.policies.rehearsal.runner import rehearse

O = Operation  # noqa: E741
V = VmState
ROBOTS = """
[policy]
name = "site"
extends = "standard"

[[rule]]
id = "robots"
operations = ["stop", "rebuild"]
requested_by = ["ci-*", "mallory"]
verdict = "deny"
reason = "robots"
because = "Robots do not stop VMs."
"""


def written(text: str) -> Policy:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "site.toml"
        path.write_text(text)
        return load(path)


def site(text: str = ROBOTS) -> CompiledPolicy:
    return CompiledPolicy(written(text))


def asked(by: str, operation: Operation = O.STOP) -> Submission:
    return Submission(request_id="r1", operation=operation, requested_by=by)


@pytest.mark.parametrize(
    ("names", "accepted", "refused"),
    [
        (["alice", "bob"], ["alice", "bob"], ["alic", "alice2", "ci-1", ""]),
        (["ci-*"], ["ci-", "ci-1", "ci-2.x"], ["ci", "alice", "xci-1", ""]),
        (["ci-*", "alice"], ["ci-1", "alice"], ["alice-1"]),
        ("*", ["alice", "interlock", ""], []),
    ],
)
def test_a_rule_holds_for_the_names_it_has(names: Any, accepted: list[str], refused: list[str]) -> None:
    policy = site(ROBOTS.replace('["ci-*", "mallory"]', json.dumps(names)))
    for by, holds in [*((by, True) for by in accepted), *((by, False) for by in refused)]:
        answer = judge(instance(V.ACTIVE), asked(by), policy, START_MS)
        assert (answer.rule == "robots") is holds, by  # type: ignore[union-attr]


@pytest.mark.parametrize("names", [["a*b"], ["*x"], ["team/x"], ["a b"], [""], ["x" * 64], []])
def test_what_can_be_no_name_is_refused_by_the_reader_and_by_editors(names: list[str]) -> None:
    text = ROBOTS.replace('["ci-*", "mallory"]', json.dumps(names))
    with pytest.raises(Exception, match=r"site\.toml:\d+:\d+: requested_by (must be a list of 1 to 64 names|is an)"):
        written(text)
    rule = {"id": "r", "operations": ["stop"], "verdict": "deny", "requested_by": names}
    validator = jsonschema.Draft7Validator(schema())
    assert not validator.is_valid({"rule": [rule]})
    assert validator.is_valid({"rule": [{**rule, "requested_by": ["ci-*", "alice"]}]})


def test_a_rule_behind_one_for_all_that_begin_so_never_decides() -> None:
    text = ROBOTS + ROBOTS[ROBOTS.index("[[rule]]") :].replace('"robots"', '"later"').replace('"ci-*", "mallory"', "{}")
    behind = written(text.replace("{}", '"ci-7", "ci-7*"'))
    assert [found.rule for found in check(behind) if found.code == "unreachable"] == ["later"]
    beside = written(text.replace("{}", '"ci*"'))
    assert not [found for found in check(beside) if found.code == "unreachable"]


def test_an_explanation_names_who_asked_and_who_could() -> None:
    policy = site(ROBOTS.replace('"deny"', '"admit"').replace('["stop", "rebuild"]', '["unrescue"]'))
    found = explain(instance(V.ACTIVE), asked("alice", O.UNRESCUE), policy, START_MS)
    first = next(one for one in found.tried if one.rule == "robots")
    assert first.failed == "requested_by: wants one of ci-*, mallory, found alice"
    texts = [way.text for way in ways(instance(V.ACTIVE), asked("alice", O.UNRESCUE), policy, START_MS)]
    assert "if requested by ci-*" in texts
    assert "if requested by mallory" in texts


def test_two_policies_differ_for_those_whom_a_rule_names() -> None:
    found = differ(load("standard"), site())
    assert {group.condition for group in found.groups if not group.follows} == {"by ci-*"}
    assert found.complete


def test_a_fleet_is_judged_for_a_caller() -> None:
    fleet = [instance(V.ACTIVE), instance(V.STOPPED)]
    robot, person = (judge_fleet(fleet, site(), START_MS, caller={"requested_by": by}) for by in ("ci-1", "alice"))
    assert robot.counts()[O.REBUILD][Answered.ADMITTED] == 0
    assert person.counts()[O.REBUILD][Answered.ADMITTED] == 2


QUEUED = """
[[rule]]
id = "robots"
operations = ["rebuild"]
vm_state = ["active"]
task_state = ["none"]
requested_by = ["ci-*"]
verdict = "deny"

[[rule]]
id = "rest"
operations = "*"
verdict = "admit"
"""


def test_a_queued_request_is_judged_again_for_who_asked() -> None:
    """When the stop before them fails, a robot's rebuild is cancelled, and not that of a person."""
    policy, left = site(QUEUED), []
    for by in ("alice", "ci-1"):
        stopping = take(admit(instance(V.ACTIVE), asked("alice"), policy, START_MS).instance, None, START_MS).instance
        rebuild = msgspec.structs.replace(asked(by, O.REBUILD), request_id="r2")
        queued = admit(stopping, rebuild, policy, START_MS)
        assert isinstance(queued.answer, Admitted)
        fence = stopping.outstanding[0].fence
        failed = finish(queued.instance, "r1", fence, Outcome.FAILED, policy, START_MS)
        left.append([request.operation for request in failed.instance.outstanding])
    assert left == [[O.REBUILD], []]


def test_a_recorded_submission_is_replayed_for_who_asked() -> None:
    answer = admit(instance(V.ACTIVE), asked("ci-1"), CompiledPolicy(load("standard")), START_MS)
    rows = [
        (number, 1, "default", event.kind, START_MS, msgspec.json.encode(event.data).decode())
        for number, event in enumerate(answer.events)
        if event.kind == "request.admitted"
    ]
    found = replay(rows, site())
    assert (found.totals.refused, found.differences[0].candidate.rule) == (1, "robots")


# ------------------------------------------------------------------------------------------------- the model checker


HANGS = """
[[rule]]
id = "shut"
operations = ["delete", "reboot"]
task_state = ["rebooting"]
verdict = "deny"

[[rule]]
id = "robots-reboot"
operations = ["reboot"]
requested_by = ["ci-*"]
verdict = "admit"

[[rule]]
id = "others"
operations = ["reboot"]
verdict = "deny"

[[rule]]
id = "delete"
operations = ["delete"]
verdict = "preempt"

[[rule]]
id = "rest"
operations = ["stop", "start"]
verdict = "admit"
"""


def test_what_only_some_callers_may_do_is_walked_and_told_with_their_name() -> None:
    """Nobody but a robot can make the instance hang, so that only a walk that submits as one finds it."""
    policy = site(HANGS)
    found = explore(policy, operations=[O.REBOOT, O.STOP, O.START, O.DELETE], starts=[V.ACTIVE], outstanding_max=2)
    stuck = next(one for one in found.violations if one.law == 5)
    story = [json.loads(line) for line in stuck.story]
    assert {"submit": "reboot", "requested_by": "ci-*"} in story
    answers = [json.loads(answer) for answer in rehearse(stuck.story, policy)]
    assert not [answer for answer in answers if "error" in answer]
    nobody = site(HANGS.replace('["ci-*"]\nverdict = "admit"', '["ci-*"]\nverdict = "deny"'))
    free = explore(nobody, operations=[O.REBOOT, O.STOP, O.START, O.DELETE], starts=[V.ACTIVE], outstanding_max=2)
    assert not [one for one in free.violations if one.law == 5]


def test_a_policy_that_only_some_can_delete_under_is_never_stuck() -> None:
    """Law 5 asks whether anybody can end what hangs; without that caller nobody could."""
    policy = site(ROBOTS.replace('["stop", "rebuild"]', '["delete"]').replace('["ci-*", "mallory"]', '["alice"]'))
    assert not explore(policy, operations=[O.STOP, O.START, O.DELETE], outstanding_max=2).violations
    everybody = site(ROBOTS.replace('["stop", "rebuild"]', '["delete"]').replace('["ci-*", "mallory"]', '"*"'))
    assert explore(everybody, operations=[O.STOP, O.START, O.DELETE], outstanding_max=2).violations


def test_callers_that_no_rule_distinguishes_are_walked_once() -> None:
    standard = explore(CompiledPolicy(load("standard")), operations=[O.STOP, O.START, O.DELETE], outstanding_max=2)
    about_others = site(ROBOTS.replace('["stop", "rebuild"]', '["pause"]'))
    found = explore(about_others, operations=[O.STOP, O.START, O.DELETE], outstanding_max=2)
    assert found.states == standard.states
