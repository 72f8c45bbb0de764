"""Conditions on tags: any of some, all of some, none of some."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
from policy_samples import START_MS, instance, site

from interlock.core.admission import judge
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Submission
from interlock.core.states import VmState
from interlock.policies.comparison import differ
from interlock.policies.explanation import explain, ways
from interlock.policies.lint import check

O = Operation  # noqa: E741
V = VmState
RULE = """
[[rule]]
id = "{id}"
operations = ["pause"]
{tags}
verdict = "deny"
reason = "tagged"
"""


def tagged(*conditions: str) -> CompiledPolicy:
    rules = [RULE.format(id=f"tagged{number}", tags=tags) for number, tags in enumerate(conditions, start=1)]
    return site("".join(rules))


def asked() -> Submission:
    return Submission(request_id="r1", operation=O.PAUSE, requested_by="alice")


def subsets(*tags: str) -> Iterator[tuple[str, ...]]:
    for size in range(len(tags) + 1):
        yield from combinations(tags, size)


@pytest.mark.parametrize(
    ("written", "held_by"),
    [
        ('tags_all = ["a", "b"]', {("a", "b"), ("a", "b", "c")}),
        ('tags = ["!a", "!b"]', {(), ("c",)}),
        ('tags = ["a", "b", "!c"]', {("a",), ("b",), ("a", "b")}),
        ('tags = ["b", "c"]\ntags_all = ["a"]', {("a", "b"), ("a", "c"), ("a", "b", "c")}),
        ('tags_all = ["a"]\ntags = ["!b", "!c"]', {("a",)}),
    ],
)
def test_a_rule_holds_for_the_tags_that_its_conditions_name(written: str, held_by: set[tuple[str, ...]]) -> None:
    policy = tagged(written)
    found = set()
    for tags in subsets("a", "b", "c"):
        answer = judge(instance(V.ACTIVE, tags=tags), asked(), policy, START_MS)
        if answer.rule == "tagged1":  # type: ignore[union-attr]
            found.add(tags)
    assert found == held_by


def test_an_explanation_says_which_tags_are_wanted_and_which_change_would_help() -> None:
    policy = tagged('tags_all = ["a", "b"]\ntags = ["!c"]')
    failed = [
        next(one.failed for one in explain(instance(V.ACTIVE, tags=tags), asked(), policy, START_MS).tried[::-1]
             if one.rule == "tagged1")
        for tags in (("a",), ("a", "b", "c"))
    ]  # fmt: skip
    assert failed == ["tags_all: wants all of a, b, found a", "tags: wants not c, found a, b, c"]
    texts = {way.text for way in ways(instance(V.ACTIVE, tags=("a", "b")), asked(), policy, START_MS)}
    assert {"if it has no tag 'a'", "if it has no tag 'b'", "if it has the tag 'c'"} <= texts


@pytest.mark.parametrize(
    ("conditions", "dead"),
    [
        (('tags = ["a"]', 'tags_all = ["a", "b"]'), {"tagged2"}),
        (('tags_all = ["a", "b"]', 'tags = ["a"]'), set()),
        (('tags = ["!a"]', 'tags = ["a"]', ""), {"tagged3"}),
        (('tags = ["!a", "!b"]', 'tags = ["!a"]', 'tags_all = ["a"]'), set()),
        (('tags = ["!a"]', 'tags = ["!a", "!b"]'), {"tagged2"}),
        (('tags = ["a", "!a", "!b"]',), {"tagged1"}),
        (('tags_all = ["a", "b"]\ntags = ["!b"]',), {"tagged1"}),
    ],
)
def test_the_check_finds_exactly_the_rules_that_no_tags_reach(conditions: tuple[str, ...], dead: set[str]) -> None:
    found = {one.rule for one in check(tagged(*conditions).policy) if one.code in ("unreachable", "contradiction")}
    assert {rule for rule in found if str(rule).startswith("tagged")} == dead


def test_a_comparison_finds_the_tags_on_which_two_policies_differ() -> None:
    found = differ(tagged('tags = ["a"]').policy, tagged('tags = ["a", "!b"]').policy)
    assert found.complete
    assert {one.condition for one in found.groups} == {"tagged a, tagged b"}
    assert not differ(tagged('tags_all = ["a"]').policy, tagged('tags = ["a"]').policy).groups
