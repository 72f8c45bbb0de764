"""The model checker on every built-in policy, and on mistakes seeded into policies and the core."""

from __future__ import annotations

import json
from typing import Any

import pytest
from core_samples import ORDINARY, STUCK_MS, O, V, compiled, rule

import model_checker_reference
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.roles import Role
from interlock.core.states import Target
from interlock.policies.language.loader import compile_named
from interlock.policies.model_checker import Exploration, explore
from interlock.policies.model_checker.symmetry_reduction import distinct_operations
from interlock.policies.rehearsal.runner import rehearse
from tiers import tier

BUILT_IN = ("standard", "take2", "propolis", "nova")
STATE_CHANGES = tuple(operation for operation, entry in CATALOGUE.items() if entry.lane is Lane.STATE)
POWER = (O.CREATE, O.START, O.STOP, O.DELETE)
RESCUING = (O.START, O.STOP, O.RESCUE, O.UNRESCUE, O.DELETE)
BESIDE = (O.REBOOT, O.DELETE, O.SWAP_VOLUME)


def broken_laws(exploration: Exploration) -> set[int]:
    return {violation.law for violation in exploration.violations}


def assert_holds(exploration: Exploration) -> None:
    assert exploration.complete, f"only {exploration.states} states were expanded"
    assert not exploration.violations, "\n".join(
        f"law {violation.law}: {violation.what}\n  " + "\n  ".join(violation.story)
        for violation in exploration.violations
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_laws_hold_for_power_changes_up_to_three_at_a_time(name: str) -> None:
    """Laws 1 to 5, 7 and 8, over all interleavings of three outstanding power changes."""
    exploration = explore(compile_named(name), operations=POWER, outstanding_max=3)
    assert_holds(exploration)
    assert exploration.states > 40


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_laws_hold_for_component_changes_beside_state_changes(name: str) -> None:
    """The same with two lanes, from a running instance, where two requests can be in flight at once."""
    exploration = explore(compile_named(name), operations=BESIDE, starts=[V.ACTIVE], outstanding_max=2)
    assert_holds(exploration)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name == "take2" else name for name in BUILT_IN]
)
def test_the_laws_hold_for_all_operations(name: str) -> None:
    """All operations from `building`, three outstanding and a deletion on top."""
    exploration = explore(compile_named(name), outstanding_max=3)
    assert_holds(exploration)
    assert exploration.states > 500


APART = (V.ACTIVE, V.STOPPED, V.DELETED, Target.SAME)
"""The targets of operations that are told apart; the others count as one."""


def one_of_each(policy: CompiledPolicy) -> tuple[Operation, ...]:
    """One operation of each lane and target, of those that take over or preempt and of those that do not."""
    found: dict[object, Operation] = {}
    for operation, entry in CATALOGUE.items():
        about = [rule for rule in policy.rules if operation in rule.operations]
        interrupts = any(rule.verdict in (Verdict.PREEMPT, Verdict.AFTER) for rule in about)
        found.setdefault((entry.lane, entry.to if entry.to in APART else type(entry.to), interrupts), operation)
    return tuple(found.values())


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_laws_hold_with_one_more_outstanding_request(name: str) -> None:
    """Three suffice: what docs/proof.md argues is searched with four."""
    policy = compile_named(name)
    exploration = explore(policy, operations=tier(one_of_each(policy), None), outstanding_max=4)
    assert_holds(exploration)
    assert len(exploration.operations) > 5


@pytest.mark.parametrize("role", [Role.ADMIN, Role.READER])
@pytest.mark.parametrize("name", BUILT_IN)
def test_an_administrator_can_always_delete_and_a_reader_never(name: str, role: Role) -> None:
    """The second promise of law 5 is about one role, and breaks no law."""
    operations = tier((*RESCUING, *BESIDE, O.CREATE, O.LOCK, O.UNLOCK, O.RESET_STATE), tuple(O))
    exploration = explore(compile_named(name), operations=operations, outstanding_max=2, role=role)
    assert_holds(exploration)
    assert exploration.weaker is not None
    assert bool(exploration.weaker.cannot) is (role is Role.READER)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_laws_hold_in_the_reference_search(name: str) -> None:
    """Every state change from every state that it can be in, as the core's own records: also laws 1, 3, 4 and 7."""
    operations = tier(RESCUING, STATE_CHANGES)
    assert_holds(
        model_checker_reference.explore(
            compile_named(name), operations=operations, starts=[V.ACTIVE], outstanding_max=1
        )
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_delete_gets_past_a_hung_component_change(name: str) -> None:
    """Law 5: a deletion always succeeds, also past a hung component change, which has no task state."""
    exploration = explore(compile_named(name), operations=[O.DELETE, O.ATTACH_VOLUME], starts=[V.ACTIVE])
    assert_holds(exploration)


def test_the_sample_policy_of_these_tests_holds() -> None:
    """The policy that the seeded mistakes below start from violates no law."""
    assert_holds(sample())


def sample(policy: CompiledPolicy | None = None, **more: Any) -> Exploration:
    operations = more.pop("operations", (O.REBOOT, O.STOP, O.START, O.DELETE))
    fields: dict[str, Any] = {"starts": [V.ACTIVE], "outstanding_max": 2, "states_max": 4000} | more
    explored = fields.pop("explored", explore)
    exploration: Exploration = explored(policy or CompiledPolicy(ORDINARY), operations=operations, **fields)
    return exploration


# ------------------------------------------------------------------------------------------- mistakes in a policy


def test_a_policy_that_denies_delete_during_a_reboot_breaks_law_5() -> None:
    """An instance whose reboot hangs could never be deleted."""
    shut = rule("shut", {O.DELETE, O.REBOOT}, Verdict.DENY, task_states=frozenset({"rebooting"}))
    exploration = sample(compiled(shut, *ORDINARY.rules))
    assert broken_laws(exploration) == {5}
    first = exploration.violations[0]
    assert [json.loads(line) for line in first.story[:3]] == [
        {"instance": {"vm_state": "active", "role": "member"}},
        {"submit": "reboot"},
        {"take": "state"},
    ]


def test_a_policy_that_admits_nothing_in_a_state_breaks_law_5() -> None:
    """Nothing is ever admitted in error: a dead end."""
    shut = rule("shut", frozenset(O), Verdict.DENY, vm_states=frozenset({V.ERROR}))
    exploration = sample(compiled(shut, *ORDINARY.rules))
    assert any("nothing is ever admitted in error" in violation.what for violation in exploration.violations)


def test_a_retry_time_at_which_another_rule_denies_breaks_law_5() -> None:
    """A retry time in a denial must be true."""
    late = rule("late", {O.REBOOT}, Verdict.DENY, task_states=frozenset({"rebooting"}), silent_ms_min=STUCK_MS)
    exploration = sample(compiled(late, *ORDINARY.rules))
    assert any("at the retry time of its denial" in violation.what for violation in exploration.violations)


def test_a_refusal_without_a_reason_breaks_law_8() -> None:
    """Every answer explains itself."""
    mute = rule("", {O.START}, Verdict.DENY, vm_states=frozenset({V.ACTIVE}))
    assert 8 in broken_laws(sample(compiled(mute, *ORDINARY.rules)))


# ------------------------------------------------------------------------------------------------- the search itself


def test_a_counterexample_can_be_rehearsed() -> None:
    """A counterexample is a script for `interlock rehearse`, which runs it without an error."""
    shut = rule("shut", {O.DELETE, O.REBOOT}, Verdict.DENY, task_states=frozenset({"rebooting"}))
    policy = compiled(shut, *ORDINARY.rules)
    story = sample(policy).violations[0].story
    answers = [json.loads(answer) for answer in rehearse([*story, '{"submit": "delete"}'], policy)]
    assert not [answer for answer in answers if "error" in answer]
    assert answers[-1]["rule"] == "shut"


def test_a_search_that_reaches_its_bound_reports_it() -> None:
    """`complete` is false, and states that were not expanded are no violations."""
    exploration = sample(states_max=10)
    assert exploration.states == 10
    assert not exploration.complete
    assert not exploration.violations


def test_symmetric_operations_are_tried_once() -> None:
    """A snapshot and a backup lead to the same states if no rule distinguishes them."""
    every = compiled(rule("all", frozenset(Operation), Verdict.ADMIT))
    assert distinct_operations(every, [O.SNAPSHOT, O.BACKUP, O.ATTACH_VOLUME, O.ATTACH_INTERFACE]) == (
        O.SNAPSHOT,
        O.ATTACH_VOLUME,
    )
    other = compiled(rule("one", {O.BACKUP}, Verdict.DENY), rule("all", frozenset(Operation), Verdict.ADMIT))
    assert distinct_operations(other, [O.SNAPSHOT, O.BACKUP]) == (O.SNAPSHOT, O.BACKUP)
