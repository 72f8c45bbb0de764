"""The analysis of many rules: it finds what a plain one finds, and in time, whatever the rules have in common."""

from __future__ import annotations

import time

import pytest
from large_policies import SHAPES, large_policy
from plain_reachability import PlainReachability

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.states import VmState
from interlock.policies.lint import check
from interlock.policies.lint.dead_rules import DeadRules, Shadows, unpacked
from interlock.policies.lint.exit_lints import WaysOut
from interlock.policies.lint.reachability import Cell, Reaching, can_be_together
from tiers import tier

LOOP_S = 0.006
"""What the loop of `loop_s` takes on a machine on which 2,000 rules of any shape are checked in two seconds."""

every_shape = pytest.mark.parametrize("shape", sorted(SHAPES))
seeds = pytest.mark.parametrize("seed", range(tier(1, 12)))


def small(shape: str, seed: int) -> Policy:
    return large_policy(shape, [9, 14, 25][seed % 3], seed=seed, thresholds=seed % 4 < 3)


@seeds
@every_shape
def test_a_rule_decides_for_the_operations_for_which_it_does_in_some_cell(shape: str, seed: int) -> None:
    rules = small(shape, seed).rules
    plain = PlainReachability(rules)
    expected = plain.reached()
    expected |= {number: found for number, found in plain.reached(deleted=True).items() if number not in expected}
    found = DeadRules(Reaching(rules), "large.toml").reached
    assert found.keys() == expected.keys()
    for number, operations in found.items():
        assert operations == expected[number] or rules[number].operations == set(Operation)
        assert operations <= expected[number]


@seeds
@every_shape
def test_what_is_permitted_in_a_state_is_permitted_by_a_rule_that_decides_there(shape: str, seed: int) -> None:
    policy = small(shape, seed)
    plain = PlainReachability(policy.rules)
    permitted = WaysOut(Reaching(policy.rules), CompiledPolicy(policy).limits).permitted
    for state in (VmState.ACTIVE, VmState.ERROR, VmState.SOFT_DELETED):
        for task in plain.tasks[:: tier(4, 1)]:
            if can_be_together(state, task):
                expected = {each for each in Operation if plain.permits(Cell(each, state, task))}
                assert permitted[state, task] == expected


@seeds
@every_shape
def test_a_shadow_is_as_large_as_the_cells_in_which_an_earlier_rule_may_decide(shape: str, seed: int) -> None:
    rules = small(shape, seed).rules
    reaching, plain = Reaching(rules), PlainReachability(rules)
    for number in range(0, len(rules), tier(4, 1)):
        start = reaching.start(number)
        found = [] if start is None else Shadows(reaching).in_region(number, start)
        assert dict(map(unpacked, found)) == plain.shadows(number)


def test_tags_that_a_rule_wants_in_two_conditions_are_both_wanted() -> None:
    """The rule denies everything to an instance that has only this tag; so nothing can ever be done with it."""
    found = check(large_policy("all", 50, seed=7))
    assert any("if tagged t11" in one.message and "shelved_offloaded" in one.message for one in found)


def check_s(policy: Policy) -> float:
    """The least processor time of three checks: what others do on the machine only adds to it."""
    times = []
    for _ in range(3):
        began_s = time.process_time()
        check(policy)
        times.append(time.process_time() - began_s)
    return min(times)


def loop_s() -> float:
    """The processor time of a small loop over large integers, which is what a check mostly does."""
    times = []
    for _ in range(5):
        began_s = time.process_time()
        every, found = (1 << 2000) - 1, 0
        for number in range(40_000):
            found |= (every >> number % 1000) & (found + number)
        times.append(time.process_time() - began_s)
    return min(times)


@pytest.mark.parametrize("shape", tier(["limited", "queue"], sorted(SHAPES)))
def test_twice_as_many_rules_take_little_more_than_twice_as_long(shape: str) -> None:
    fewer_s, more_s = check_s(large_policy(shape, 400)), check_s(large_policy(shape, 800))
    assert more_s < 2.6 * fewer_s + 0.05


@pytest.mark.long
@pytest.mark.parametrize("thresholds", [True, False])
@every_shape
def test_two_thousand_interlocking_rules_are_checked_in_two_seconds(shape: str, *, thresholds: bool) -> None:
    policy = large_policy(shape, 2000, thresholds=thresholds)
    slower = max(1.0, loop_s() / LOOP_S)
    # Half as much again for what other programs do to the caches of a busy machine.
    assert check_s(policy) < 2 * slower * 1.5
