"""The model checker finds mistakes in policies, each with the violated law and a counterexample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from click.testing import CliRunner

import proof_page
from interlock.cli.commands.policy.explore import explore as command
from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named
from interlock.policies.laws import LAWS, POLICY_LAWS, SERVER_LAWS
from interlock.policies.model_checker import Exploration, Violation, explore
from interlock.policies.rehearsal.runner import rehearse
from tiers import tier

O = Operation  # noqa: E741
V = VmState
BROKEN = Path(__file__).parent / "broken"
_SOME = {
    O.CREATE,
    O.START,
    O.STOP,
    O.REBOOT,
    O.UNPAUSE,
    O.SUSPEND,
    O.RESUME,
    O.REBUILD,
    O.ATTACH_VOLUME,
    O.LOCK,
    O.UNLOCK,
    O.SOFT_DELETE,
    O.DELETE,
    O.FORCE_DELETE,
    O.RESET_STATE,
}
SUBMITTED = tier(tuple(operation for operation in O if operation in _SOME), tuple(O))
"""The operations that are submitted to the policies with mistakes."""


class Mistake(NamedTuple):
    """What the model checker reports for a policy with one mistake, if nobody may reset a state."""

    law: int
    what: str
    story: list[str]
    """The counterexample: the verb of each event and its object."""


MISTAKES = {
    "cancelled-at-once": Mistake(
        2, "unpause was cancelled although all went as foreseen", ["submit stop", "take state", "submit unpause"]
    ),
    "hung-component": Mistake(
        5,
        "deleted cannot be reached from active while attach_volume is served",
        ["submit start", "submit attach_volume", "take state", "finish start", "take component"],
    ),
    "late-retry": Mistake(
        8,
        "reboot is admitted before the retry time of its denial",
        [
            "submit start",
            "submit reboot",
            "take state",
            "finish start",
            "take state",
            "submit reboot",
            "submit reboot",
        ],
    ),
    "no-exit-from-error": Mistake(
        5, "nothing is ever admitted in error", ["submit start", "take state", "finish start"]
    ),
    "threshold-never-passes": Mistake(
        5,
        "suspend is not admitted at the retry time",
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
        "deleted cannot be reached from active while reboot is served",
        ["submit start", "submit reboot", "take state", "finish start", "submit soft_delete", "take state"],
    ),
    "waits-behind-the-dead": Mistake(
        5, "deleted cannot be reached from building while create", ["submit create", "submit delete", "take state"]
    ),
}


def verbs(violation: Violation) -> list[str]:
    events = [json.loads(line) for line in violation.story]
    return [f"{verb} {event[verb]}" for event in events for verb in ("submit", "take", "finish") if verb in event]


def plays(violation: Violation, policy: CompiledPolicy, *more: dict[str, Any]) -> list[dict[str, Any]]:
    lines = [*violation.story, *(json.dumps(event) for event in more)]
    answers = [json.loads(answer) for answer in rehearse(lines, policy)]
    assert not [answer for answer in answers if "error" in answer]
    return answers


def without_reset(name: str) -> CompiledPolicy:
    """Return a policy under which neither an admin's `reset_state` nor a limit of time ends what hangs."""
    broken = compile_named(str(BROKEN / f"{name}.toml")).policy
    nobody = rule("no-reset", {O.RESET_STATE}, Verdict.DENY, reason="no_reset")
    return CompiledPolicy(msgspec.structs.replace(broken, rules=(nobody, *broken.rules), served_at_most={}))


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_is_found_with_the_law_that_it_breaks_and_its_counterexample(name: str) -> None:
    policy = without_reset(name)
    found = explore(policy, operations=SUBMITTED, outstanding_max=2)
    mistake = MISTAKES[name]
    violation = next(one for one in found.violations if mistake.what in one.what)
    assert violation.law == mistake.law
    assert verbs(violation) == mistake.story
    plays(violation, policy)


def test_the_page_lists_the_policies_that_break_each_law() -> None:
    listed = {law: proof_page.mistakes(law).policies for law in (*LAWS, *SERVER_LAWS)}
    broken = {law: [name for name, mistake in sorted(MISTAKES.items()) if mistake.law == law] for law in POLICY_LAWS}
    assert {law: names for law, names in listed.items() if names != ["none can"]} == broken


def test_where_only_an_admin_can_delete_is_listed_for_members() -> None:
    """A member's lock keeps members from ending a rebuild that is called redundant for ever."""
    found = explore(without_reset("redundant-for-ever"), operations=SUBMITTED, outstanding_max=2)
    assert not found.violations
    assert found.weaker is not None
    assert "active while rebuild is served" in found.weaker.cannot


def test_a_counterexample_of_a_stuck_deletion_holds_on_the_core() -> None:
    """The deletion stays behind the attachment whatever is submitted, after any time."""
    policy = without_reset("hung-component")
    found = explore(policy, operations=SUBMITTED, outstanding_max=2)
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


def search(policy: CompiledPolicy, **more: Any) -> Exploration:
    fields: dict[str, Any] = {"operations": FEW, "starts": [V.ACTIVE], "outstanding_max": 2}
    return explore(policy, **fields | more)


def the_one(found: Exploration, what: str) -> Violation:
    return next(violation for violation in found.violations if what in violation.what)


def test_what_is_served_where_it_is_not_permitted_breaks_law_2() -> None:
    """A rule that ignores the foreseen state admits a pause behind a stop."""
    active = frozenset({V.ACTIVE})
    policy = made(
        DELETE,
        rule("blind", {O.PAUSE}, Verdict.ADMIT, vm_states=active, outstanding=frozenset({O.STOP}), in_turn=False),
        rule("pause", {O.PAUSE}, Verdict.ADMIT, vm_states=active),
        rule("stopped", {O.STOP}, Verdict.ADMIT, vm_states=active),
        rule("start", {O.START}, Verdict.ADMIT, outstanding=frozenset({O.PAUSE})),
        rule("start-paused", {O.START}, Verdict.ADMIT, vm_states=frozenset({V.PAUSED})),
    )
    found = search(policy, outstanding_max=3)
    assert not [one for one in found.violations if one.law != 2]
    violation = the_one(found, "start was cancelled although all went as foreseen")
    answers = plays(violation, policy)
    assert "r3" in answers[-1]["cancelled"]


def test_a_refusal_without_a_reason_breaks_law_8_whatever_is_outstanding() -> None:
    """It is found behind a queue too, where the rule holds only because of queued requests."""
    mute = rule("", {O.START}, Verdict.DENY, outstanding=frozenset({O.STOP, O.PAUSE}))
    violation = the_one(search(made(DELETE, mute, ANYTHING)), "start was refused without a rule or a reason")
    assert violation.law == 8
    assert verbs(violation) == ["submit stop", "submit start"]


def test_a_deletion_that_only_waits_its_turn_breaks_law_5() -> None:
    found = search(made(ANYTHING))
    violation = the_one(found, "deleted cannot be reached from active while stop is served")
    assert verbs(violation) == ["submit stop", "take state"]


def test_time_passes_in_a_counterexample_only_as_far_as_needed() -> None:
    """The rule that denies everything holds from the third minute on."""
    shut = rule("shut", frozenset(O), Verdict.DENY, task_states=frozenset({"powering_off"}), silent_ms_min=180_000)
    violation = the_one(search(made(shut, DELETE, ANYTHING)), "nothing is ever admitted in active while stop is served")
    assert [json.loads(line) for line in violation.story[1:]] == [
        {"submit": "stop"},
        {"take": "state"},
        {"advance": "180s"},
    ]


# ------------------------------------------------------------------------------------------------- assumptions


def test_a_condition_that_does_not_vary_is_an_assumption_if_a_rule_depends_on_it() -> None:
    blocked = rule("blocked", {O.STOP}, Verdict.DENY, blocked=True)
    with_blocks, without = search(made(blocked, DELETE, ANYTHING)), search(made(DELETE, ANYTHING))
    (assumed,) = set(with_blocks.assumptions) - set(without.assumptions)
    assert assumed == "`blocked` is always false; it is a condition of blocked."


def test_bounds_and_operations_left_out_are_assumptions() -> None:
    found = search(made(DELETE, ANYTHING), outstanding_max=1, faults_max=2)
    for assumed in (
        "An instance begins in active with nothing outstanding.",
        "At most 1 request is outstanding, and one deletion more.",
        "At most 2 operations fail or guests end.",
    ):
        assert assumed in found.assumptions
    left_out = next(one for one in found.assumptions if one.startswith("Nobody submits"))
    assert set(left_out.removeprefix("Nobody submits ").rstrip(".").split(", ")) == set(O) - set(FEW)


# ------------------------------------------------------------------------------------------------------- bounds


def test_a_limit_of_faults_excludes_paths_that_need_more() -> None:
    """Only a fault leads to error."""
    shut = rule("shut", frozenset(O), Verdict.DENY, vm_states=frozenset({V.ERROR}))
    without = search(made(shut, DELETE, ANYTHING), faults_max=0)
    assert not [one for one in without.violations if "in error" in one.what]
    violation = the_one(search(made(shut, DELETE, ANYTHING), faults_max=1), "nothing is ever admitted in error")
    assert len(violation.story) > 1


def test_a_search_ends_in_time_and_reports_that_it_is_not_complete() -> None:
    found = explore(compile_named("take2"), outstanding_max=4, seconds_max=0.5)
    assert not found.complete
    assert not found.violations
    assert found.states > 1


def test_states_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(Invalid, match="do not fit"):
        explore(compile_named("standard"), outstanding_max=12)


def test_a_search_in_limited_time_lowers_the_bound_to_what_fits() -> None:
    """A server that verifies a policy before it is activated needs a partial result rather than none."""
    found = explore(compile_named("standard"), outstanding_max=7, seconds_max=1.5)
    assert found.outstanding_max == 5
    assert not found.complete


def test_rules_that_cannot_hold_cost_no_state() -> None:
    """A thousand age bounds of rules about operations on the instance's own list make no difference without one."""
    tagged = [rule(f"t{n}", {O.STOP}, Verdict.DENY, blocked=True, silent_ms_min=1000 * (n + 1)) for n in range(1000)]
    few, many = search(made(DELETE, ANYTHING)), search(made(*tagged, DELETE, ANYTHING))
    assert few.states == many.states


def test_tasks_that_only_a_deletion_ends_are_listed() -> None:
    """Under standard every task can be taken over; under propolis only a deletion ends one that hangs."""
    exits = {(one.vm_state, one.task_state): one for one in explore(compile_named("standard"), outstanding_max=1).exits}
    assert all(one.takeovers for one in exits.values())
    assert O.STOP in exits[V.ACTIVE, "rebooting"].takeovers
    assert not any(one.takeovers for one in explore(compile_named("propolis"), outstanding_max=1).exits)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_a_summary(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["propolis", "--story", str(tmp_path / "story")])
    assert result.exit_code == 0, result.output
    assert "states and" in result.output
    assert "No law is broken under these assumptions:" in result.output
    assert "  - At most 3 requests are outstanding, and one deletion more." in result.output
    assert not (tmp_path / "story").exists()


def test_the_command_writes_a_counterexample_that_can_be_rehearsed(tmp_path: Path) -> None:
    broken = BROKEN / "no-exit-from-error.toml"
    story = tmp_path / "story.jsonl"
    result = CliRunner().invoke(command, [str(broken), "--outstanding", "1", "--story", str(story)])
    assert result.exit_code == 1
    assert "Law 5 is broken (never stuck)" in result.output
    events = [*story.read_text().splitlines(), '{"show": true}']
    answers = [json.loads(answer) for answer in rehearse(events, compile_named(str(broken)))]
    assert answers[-1]["vm_state"] == "error"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.toml"], "nowhere.toml"),
        (["standrd"], "Did you mean 'standard'?"),
        (["standard", "--outstanding", "9"], "do not fit"),
        (["standard", "--seconds", "nan"], "Invalid duration"),
        (["propolis", "--outstanding", "0"], "--outstanding"),
    ],
)
def test_invalid_input_is_reported_in_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command, arguments)
    said_in = result.output or f"{result.exception} {getattr(result.exception, 'remedy', '')}"
    assert result.exit_code != 0
    assert said in said_in
