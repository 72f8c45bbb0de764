"""What a server finds out of a policy before it puts it in force."""

from __future__ import annotations

import time

from interlock import __version__
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.policy_switches import PolicyBundle
from interlock.policies.language.bundle import builtin, read_text
from interlock.policies.model_checker import explore
from interlock.policies.verification import Question, prove
from tiers import tier


def asked(bundle: PolicyBundle, explore_ms: int = 3_000) -> Question:
    return Question(bundle=bundle, performs=tuple(Operation), explore_ms=explore_ms, memory_mib_max=4_096)


def test_a_built_in_policy_is_walked() -> None:
    proof = prove(asked(builtin("propolis"), explore_ms=30_000))
    assert proof.holds
    assert proof.walk is not None
    assert proof.walk.complete
    assert proof.walk.version == __version__
    assert proof.walk.states > 100


def test_a_policy_of_hundreds_of_rules_about_one_cell_is_proved() -> None:
    rules = "".join(
        f'[[rule]]\nid = "r{number}"\noperations = ["stop"]\ntask_state = ["@backup"]\ntags = ["t{number % 2}"]\n'
        f'silent_for = "{5_000 - number}s"\nverdict = "deny"\n'
        for number in range(1, tier(200, 1_500))
    )
    text = '[policy]\nname = "many"\nextends = "standard"\n' + rules
    proof = prove(asked(PolicyBundle(main="many.toml", files={"many.toml": text})))
    assert proof.holds, (proof.wrong, proof.findings, proof.violations)
    assert proof.walk is not None


def test_an_exploration_ends_in_time_also_where_its_tables_take_longer_than_that() -> None:
    rules = "".join(
        f'[[rule]]\nid = "r{number}"\noperations = ["stop"]\ntask_state = ["@backup"]\ntags = ["t{number}"]\n'
        f'silent_for = "{number}s"\nverdict = "deny"\n'
        for number in range(1, 200)
    )
    text = read_text(PolicyBundle(main="many.toml", files={"many.toml": f'[policy]\nextends = "standard"\n{rules}'}))
    began_s = time.process_time()
    found = explore(CompiledPolicy(text.policy), seconds_max=0.5)
    assert time.process_time() - began_s < 2.5, "the tables alone take more than ten"
    assert not found.complete
    assert not found.violations
