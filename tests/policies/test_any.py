"""`any`: a rule with several sets of conditions, of which one must hold."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

import jsonschema  # type: ignore[import-untyped]
import pytest
from policy_samples import START_MS, instance, serving, site

from interlock.core.admission import judge
from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.records import Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.comparison import differ
from interlock.policies.explanation import explain
from interlock.policies.language.json_schema import schema
from interlock.policies.language.loader import load
from interlock.policies.lint import check
from interlock.policies.lint.findings import written
from interlock.policies.model_checker import explore

O = Operation  # noqa: E741
V = VmState
FREEZE = """
[[rule]]
id = "freeze"
operations = ["rebuild", "resize"]
roles = ["member"]
any = [{ tags = ["prod"] }, { tags = ["gpu"], vm_state = ["active"] }, { power_state = ["paused"] }]
verdict = "deny"
reason = "frozen"
"""
TAKEOVER = """
[[rule]]
id = "mine"
operations = ["stop", "start"]
any = [{ task_state = ["@same"], tags = ["a"] }, { task_state = ["@backup"] }]
verdict = "after"
threshold = "3m"
"""


def asked(operation: Operation, role: Role = Role.MEMBER) -> Submission:
    return Submission(request_id="r1", operation=operation, requested_by="alice", role=role)


@pytest.mark.parametrize(
    ("vm_state", "tags", "role", "rule"),
    [
        (V.STOPPED, ("prod",), Role.MEMBER, "freeze#1"),
        (V.ACTIVE, ("gpu",), Role.MEMBER, "freeze#2"),
        (V.ACTIVE, ("gpu", "prod"), Role.MEMBER, "freeze#1"),
        (V.STOPPED, ("gpu",), Role.MEMBER, "rescue-rebuild"),
        (V.STOPPED, ("prod",), Role.ADMIN, "rescue-rebuild"),
    ],
)
def test_a_rule_holds_if_its_own_conditions_and_one_of_its_sets_do(
    vm_state: VmState, tags: tuple[str, ...], role: Role, rule: str
) -> None:
    answer = judge(instance(vm_state, tags=tags), asked(O.REBUILD, role), site(FREEZE), START_MS)
    assert answer.rule == rule  # type: ignore[union-attr]


def test_an_explanation_names_the_sets_that_failed_and_the_one_that_held() -> None:
    found = explain(instance(V.ACTIVE, tags=("gpu",)), asked(O.RESIZE), site(FREEZE), START_MS)
    tried = {one.rule: one.failed for one in found.tried}
    assert tried["freeze#1"] == "tags: wants prod, found gpu"
    assert tried["freeze#2"] is None
    assert "freeze#3" not in tried


def test_sets_are_expanded_for_each_operation_where_they_differ_with_it() -> None:
    policy = site(TAKEOVER)
    ids = [rule.id for rule in policy.rules if rule.family == "mine"]
    assert ids == ["mine.start#1", "mine.stop#1", "mine#2"]
    (one,) = [one for one in written(policy.rules) if one.id == "mine"]
    assert len(one.numbers) == 3
    stopping = serving(V.ACTIVE, "powering_off", tags=("a",))
    assert judge(stopping, asked(O.STOP), policy, START_MS).rule == "mine.stop#1"  # type: ignore[union-attr]


def test_thresholds_change_all_sets_of_a_rule_or_one() -> None:
    with TemporaryDirectory() as folder:
        base, own = Path(folder) / "base.toml", Path(folder) / "own.toml"
        base.write_text(f'[policy]\nextends = "standard"\n{TAKEOVER}')
        own.write_text('[policy]\nextends = "./base.toml"\n[thresholds]\nmine = "1m"\n"mine#2" = "9m"\n')
        found = {rule.id: rule.threshold_ms for rule in load(own).rules}
    assert (found["mine.start#1"], found["mine.stop#1"], found["mine#2"]) == (60_000, 60_000, 540_000)


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        ("[]", "any must be a list of 1 to 64 sets of conditions"),
        ('"x"', "any must be a list of 1 to 64 sets of conditions"),
        ("[{}]", "must be a table with a condition"),
        ("[1]", "must be a table with a condition"),
        ('[{ tag = ["x"] }]', "Unknown condition 'tag'"),
        ('[{ verdict = "deny" }]', "Unknown condition 'verdict'"),
        ('[{ tags = ["x"] }, { tags = ["b"], roles = ["admin"] }]', "roles is a condition of the rule itself"),
        ("[{ locked = 1 }]", "locked must be true or false"),
    ],
)
def test_what_is_no_set_of_conditions_is_refused_at_its_place(sets: str, why: str) -> None:
    start = FREEZE.index("any = ")
    text = FREEZE[:start] + f"any = {sets}\n" + FREEZE[FREEZE.index("verdict") :]
    with pytest.raises(PolicyError, match=why) as refused:
        site(text)
    assert "site.toml:9:" in str(refused.value)


def test_editors_accept_what_the_reader_accepts() -> None:
    validator = jsonschema.Draft7Validator(schema())

    def plain(text: str) -> object:
        return json.loads(json.dumps(tomllib.loads(text)))

    for text in (FREEZE, TAKEOVER):
        validator.validate(plain(text))
    for sets in ("[]", "[{}]", '[{ verdict = "deny" }]', '[{ tag = ["x"] }]', '[{ task_state = ["rebooot"] }]'):
        start = FREEZE.index("any = ")
        assert not validator.is_valid(plain(FREEZE[:start] + f"any = {sets}\n" + FREEZE[FREEZE.index("verdict") :]))


def test_the_check_finds_a_set_that_never_decides() -> None:
    again = FREEZE.replace('{ power_state = ["paused"] }', '{ tags = ["prod"], locked = false }')
    (found,) = [one for one in check(site(again).policy) if one.code == "idle-set"]
    assert found.message.startswith("Set 3 in `any` of 'freeze' never decides")
    assert not [one for one in check(site(FREEZE).policy) if one.code == "idle-set"]


def split(text: str) -> str:
    """Write a rule of its own for each set."""
    start, end = text.partition("any = ")[0], text[text.index("verdict") :]
    conditions = ('tags = ["prod"]\n', 'tags = ["gpu"]\nvm_state = ["active"]\n', 'power_state = ["paused"]\n')
    return "".join(
        start.replace('"freeze"', f'"freeze{number}"') + one + end for number, one in enumerate(conditions, start=1)
    )


def test_a_comparison_sees_the_same_as_with_one_rule_for_each_set() -> None:
    together, apart = (differ(site("").policy, site(text).policy) for text in (FREEZE, split(FREEZE)))
    assert together.complete
    assert together.differing == apart.differing > 0
    assert {one.after.rule for one in together.groups} == {"freeze"}
    seen = [
        {(one.condition, one.combinations) for one in found.groups if not one.follows} for found in (together, apart)
    ]
    assert seen[0] == seen[1]
    assert {"tagged prod", "tagged gpu", "the guest is paused"} <= {condition for condition, _ in seen[0]}


def test_the_model_checker_finds_a_dead_end_behind_one_set() -> None:
    stuck = """
[[rule]]
id = "never"
operations = "*"
any = [{ tags = ["x"] }, { locked = true }]
verdict = "deny"
"""
    few = [O.DELETE, O.LOCK, O.UNLOCK, O.STOP]
    assert explore(site(""), operations=few, outstanding_max=1).violations == ()
    assert explore(site(stuck), operations=few, outstanding_max=1).violations
