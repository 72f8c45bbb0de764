"""Mistakes in policies are found by walking, each with the law that it breaks and a story that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from interlock.cli.policy_exploring import explore as command
from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.states import VmState
from interlock.policies.exploring import Exploration, Violation, explore
from interlock.policies.reading import compile_named
from interlock.policies.rehearsing import rehearse

O = Operation  # noqa: E741
V = VmState
BROKEN = Path(__file__).parent / "broken"


class Mistake(NamedTuple):
    """What a walk says of a policy with one mistake."""

    law: int
    what: str
    story: list[str]
    """What the story tells, as the verbs of its events with what they name."""


MISTAKES = {
    "hung-component": Mistake(
        5,
        "deleted cannot be reached from active while attach_volume is served",
        ["submit start", "submit attach_volume", "take state", "finish start", "take component"],
    ),
    "no-exit-from-error": Mistake(
        5, "nothing is ever admitted in error", ["submit start", "take state", "finish start"]
    ),
    "redundant-for-ever": Mistake(
        5,
        "nothing is ever admitted in active while rebuild is served",
        ["submit start", "submit rebuild", "submit lock", "take state", "finish start", "take state"],
    ),
    "threshold-never-passes": Mistake(
        5,
        "suspend is not admitted at the moment",
        [
            "submit start",
            "submit suspend",
            "take state",
            "finish start",
            "take state",
            "submit suspend",
            "submit suspend",
        ],
    ),
    "undeletable-reboot": Mistake(
        5,
        "nothing is ever admitted in active while reboot is served",
        ["submit start", "submit reboot", "take state", "finish start", "submit soft_delete", "take state"],
    ),
    "waits-behind-the-dead": Mistake(
        5, "deleted cannot be reached from building while create", ["submit create", "take state"]
    ),
}


def told(violation: Violation) -> list[str]:
    events = [json.loads(line) for line in violation.story]
    return [f"{verb} {event[verb]}" for event in events for verb in ("submit", "take", "finish") if verb in event]


def plays(violation: Violation, policy: CompiledPolicy, *more: dict[str, Any]) -> list[dict[str, Any]]:
    lines = [*violation.story, *(json.dumps(event) for event in more)]
    answers = [json.loads(answer) for answer in rehearse(lines, policy)]
    assert not [answer for answer in answers if "error" in answer]
    return answers


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_is_found_with_the_law_that_it_breaks_and_its_story(name: str) -> None:
    policy = compile_named(str(BROKEN / f"{name}.toml"))
    found = explore(policy, outstanding_max=2)
    mistake = MISTAKES[name]
    violation = next(one for one in found.violations if mistake.what in one.what)
    assert violation.law == mistake.law
    assert told(violation) == mistake.story
    plays(violation, policy)


def test_what_a_story_says_of_a_stuck_deletion_is_so() -> None:
    """However long one waits and whatever is tried, the deletion does not get past the attachment."""
    policy = compile_named(str(BROKEN / "hung-component.toml"))
    found = explore(policy, outstanding_max=2)
    violation = next(one for one in found.violations if "from active while attach_volume is served" in one.what)
    *_, shown = plays(
        violation,
        policy,
        {"submit": "delete"},
        {"advance": "7d"},
        {"submit": "force_delete"},
        {"take": "any"},
        {"show": True},
    )
    assert shown["vm_state"] == "active"
    assert shown["in_flight"] == "attach_volume"


# --------------------------------------------------------------------------------------------- mistakes made of rules


def made(*rules: Rule, **more: Any) -> CompiledPolicy:
    return CompiledPolicy(Policy(name="made", rules=rules, **more))


def rule(identity: str, operations: set[Operation] | frozenset[Operation], verdict: Verdict, **more: Any) -> Rule:
    return Rule(id=identity, operations=frozenset(operations), verdict=verdict, **more)


DELETE = rule("delete", {O.DELETE}, Verdict.PREEMPT)
ANYTHING = rule("anything", frozenset(O) - {O.RESET_STATE}, Verdict.ADMIT)
FEW = (O.STOP, O.START, O.REBOOT, O.PAUSE, O.DELETE)


def walk(policy: CompiledPolicy, **more: Any) -> Exploration:
    fields: dict[str, Any] = {"operations": FEW, "starts": [V.ACTIVE], "outstanding_max": 2}
    return explore(policy, **fields | more)


def the_one(found: Exploration, what: str) -> Violation:
    return next(violation for violation in found.violations if what in violation.what)


def test_what_is_served_where_it_is_not_permitted_breaks_law_2() -> None:
    """A rule that looks at the present only lets a pause in behind a stop."""
    active = frozenset({V.ACTIVE})
    policy = made(
        DELETE,
        rule("blind", {O.PAUSE}, Verdict.ADMIT, vm_states=active, outstanding=frozenset({O.STOP}), in_turn=False),
        rule("pause", {O.PAUSE}, Verdict.ADMIT, vm_states=active),
        rule("stopped", {O.STOP}, Verdict.ADMIT, vm_states=active),
        rule("start", {O.START}, Verdict.ADMIT, outstanding=frozenset({O.PAUSE})),
        rule("start-paused", {O.START}, Verdict.ADMIT, vm_states=frozenset({V.PAUSED})),
    )
    found = walk(policy, outstanding_max=3)
    assert not [one for one in found.violations if one.law != 2]
    violation = the_one(found, "start was cancelled although all went as foreseen")
    answers = plays(violation, policy)
    assert "r3" in answers[-1]["cancelled"]


def test_an_overtaking_request_that_is_dismissed_at_once_breaks_law_2() -> None:
    """It was told that it is admitted, and has ended before anything happened."""
    busy = frozenset({"powering_off"})
    policy = made(
        DELETE,
        rule("unpause", {O.UNPAUSE}, Verdict.PREEMPT, task_states=busy),
        rule("no-unpause", {O.UNPAUSE}, Verdict.DENY),
        rule("stop", {O.STOP}, Verdict.ADMIT),
    )
    found = walk(policy, operations=(O.STOP, O.UNPAUSE, O.DELETE))
    violation = the_one(found, "unpause was cancelled although all went as foreseen")
    assert told(violation) == ["submit stop", "take state", "submit unpause"]
    assert plays(violation, policy)[-1]["cancels"] == ["r2"]


def test_a_time_that_is_told_too_late_breaks_law_5() -> None:
    """Another rule admits it a minute earlier than the refusal says."""
    busy = frozenset({"rebooting", "reboot_pending", "reboot_started"})
    policy = made(
        DELETE,
        rule("early", {O.REBOOT}, Verdict.PREEMPT, task_states=busy, silent_ms_min=60_000),
        rule("late", {O.REBOOT}, Verdict.AFTER, task_states=busy, threshold_ms=120_000),
        ANYTHING,
    )
    violation = the_one(walk(policy), "reboot is admitted before the moment that its refusal names")
    assert told(violation)[-1] == "submit reboot"
    answers = plays(violation, policy)
    assert [answer["retry_after"] for answer in answers if answer.get("disposition") == "denied"] == [120]


def test_a_refusal_without_a_reason_breaks_law_8_whatever_is_outstanding() -> None:
    """It is found behind a queue too, where only what waits makes the rule hold."""
    mute = rule("", {O.START}, Verdict.DENY, outstanding=frozenset({O.STOP, O.PAUSE}))
    violation = the_one(walk(made(DELETE, mute, ANYTHING)), "start was refused without a rule or a reason")
    assert violation.law == 8
    assert told(violation) == ["submit stop", "submit start"]


def test_a_deletion_that_only_waits_its_turn_breaks_law_5() -> None:
    found = walk(made(ANYTHING))
    violation = the_one(found, "deleted cannot be reached from active while stop is served")
    assert told(violation) == ["submit stop", "take state"]


def test_time_passes_in_a_story_as_far_as_it_needs_and_no_further() -> None:
    """The rule that shuts everything holds from the third minute on."""
    shut = rule("shut", frozenset(O), Verdict.DENY, task_states=frozenset({"powering_off"}), silent_ms_min=180_000)
    violation = the_one(walk(made(shut, DELETE, ANYTHING)), "nothing is ever admitted in active while stop is served")
    assert [json.loads(line) for line in violation.story[1:]] == [
        {"submit": "stop"},
        {"take": "state"},
        {"advance": "180s"},
    ]


# ------------------------------------------------------------------------------------------------------- bounds


def test_a_bound_of_faults_leaves_out_what_needs_more() -> None:
    """Nothing gets into error without one."""
    shut = rule("shut", frozenset(O), Verdict.DENY, vm_states=frozenset({V.ERROR}))
    without = walk(made(shut, DELETE, ANYTHING), faults_max=0)
    assert not [one for one in without.violations if "in error" in one.what]
    violation = the_one(walk(made(shut, DELETE, ANYTHING), faults_max=1), "nothing is ever admitted in error")
    assert len(violation.story) > 1


def test_a_walk_ends_in_time_and_says_that_it_is_not_complete() -> None:
    found = explore(compile_named("take2"), outstanding_max=4, seconds_max=0.5)
    assert not found.complete
    assert not found.violations
    assert found.states > 100


def test_states_that_do_not_fit_are_refused_in_words() -> None:
    with pytest.raises(Invalid, match="do not fit"):
        explore(compile_named("standard"), outstanding_max=12)


def test_a_walk_in_limited_time_makes_do_with_what_fits() -> None:
    """A server that proves a policy before it switches to it would rather know something than nothing."""
    found = explore(compile_named("standard"), outstanding_max=5, seconds_max=1.5)
    assert found.outstanding_max == 4
    assert not found.complete


def test_rules_that_cannot_hold_cost_no_state() -> None:
    """A thousand moments that only tagged instances know make no difference to one without tags."""
    tagged = [
        rule(f"t{n}", {O.STOP}, Verdict.DENY, tags=frozenset({"x"}), silent_ms_min=1000 * (n + 1)) for n in range(1000)
    ]
    few, many = walk(made(DELETE, ANYTHING)), walk(made(*tagged, DELETE, ANYTHING))
    assert few.states == many.states


def test_where_only_a_deletion_helps_is_told() -> None:
    """Standard has a way out of every task; under propolis, what hangs is ended by nothing else."""
    exits = {(one.vm_state, one.task_state): one for one in explore(compile_named("standard"), outstanding_max=1).exits}
    assert all(one.takeovers for one in exits.values())
    assert O.STOP in exits[V.ACTIVE, "rebooting"].takeovers
    assert not any(one.takeovers for one in explore(compile_named("propolis"), outstanding_max=1).exits)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_says_what_it_saw(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["propolis", "--story", str(tmp_path / "story")])
    assert result.exit_code == 0, result.output
    assert "states and" in result.output
    assert "No law is broken." in result.output
    assert not (tmp_path / "story").exists()


def test_the_command_writes_a_story_that_can_be_rehearsed(tmp_path: Path) -> None:
    broken = BROKEN / "no-exit-from-error.toml"
    story = tmp_path / "story.jsonl"
    result = CliRunner().invoke(command, [str(broken), "--outstanding", "1", "--story", str(story)])
    assert result.exit_code == 1
    assert "Law 5 is broken (never stuck)" in result.output
    answers = [json.loads(answer) for answer in rehearse(story.read_text().splitlines(), compile_named(str(broken)))]
    assert answers[-1]["vm_state"] == "error"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.toml"], "nowhere.toml"),
        (["standrd"], "Did you mean 'standard'?"),
        (["standard", "--outstanding", "9"], "do not fit"),
        (["standard", "--seconds", "nan"], "no length of time"),
        (["propolis", "--outstanding", "0"], "--outstanding"),
    ],
)
def test_wrong_input_is_told_in_a_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command, arguments)
    said_in = result.output or f"{result.exception} {getattr(result.exception, 'remedy', '')}"
    assert result.exit_code != 0
    assert said in said_in
