"""The tests beside a policy are found, played on fresh instances, and tell what differs."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.errors import Invalid
from interlock.policies.language.loader import read
from interlock.policies.lint.checker import check_file
from interlock.policies.lint.findings import Severity
from interlock.policies.rehearsal.scenarios import (
    Mismatch,
    Played,
    ScenarioResults,
    files_beside,
    read_all,
    read_scenarios,
    run,
)
from tiers import tier

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
ACTIVE = {"instance": {"vm_state": "active"}}


def results_of(tmp_path: Path, *lines: Any, policy: str = "standard") -> ScenarioResults:
    path = tmp_path / "site.tests.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return run(read(policy), read_scenarios(path))


def only(result: ScenarioResults) -> Played:
    (played,) = result.scenarios
    return played


def test_an_answer_that_has_what_is_expected_passes_whatever_else_it_has(tmp_path: Path) -> None:
    played = only(
        results_of(tmp_path, {"test": "a"}, ACTIVE, {"submit": "stop", "expect": {"disposition": "admitted"}})
    )
    assert (played.name, played.expectations, played.failed) == ("a", 1, None)


def test_a_difference_is_told_with_its_line_and_both_values(tmp_path: Path) -> None:
    expect = {"disposition": "admitted", "reason": "already_active", "rule": "start"}
    played = only(results_of(tmp_path, "", {"test": "a"}, ACTIVE, {"submit": "start", "expect": expect}))
    assert played.failed is not None
    assert played.failed.place.endswith("site.tests.jsonl:4")
    assert played.failed.differences == (
        Mismatch(key="disposition", expected="admitted", got="redundant"),
        Mismatch(key="rule", expected="start", got="active-already"),
    )
    assert '"submit": "start"' in played.failed.event


def test_every_test_begins_with_a_fresh_instance(tmp_path: Path) -> None:
    result = results_of(
        tmp_path,
        {"test": "one"}, ACTIVE, {"submit": "stop", "expect": {"request": "r1"}},
        {"test": "two"}, {"show": True, "expect": {"vm_state": "building", "outstanding": []}},
        {"test": "three"}, ACTIVE, {"submit": "stop", "expect": {"request": "r1"}},
    )  # fmt: skip
    assert [played.failed for played in result.scenarios] == [None, None, None]


def test_after_a_failure_the_rest_of_that_test_is_not_played_and_the_others_are(tmp_path: Path) -> None:
    result = results_of(
        tmp_path,
        {"test": "one"}, {"submit": "stop", "expect": {"rule": "x"}}, {"submit": "nonsense"},
        {"test": "two"}, {"show": True, "expect": {"vm_state": "building"}},
    )  # fmt: skip
    assert result.failures == 1
    assert [played.failed is None for played in result.scenarios] == [False, True]


def test_events_before_the_first_test_are_one_that_is_named_after_the_file(tmp_path: Path) -> None:
    played = only(results_of(tmp_path, ACTIVE, {"submit": "stop", "expect": {"disposition": "admitted"}}))
    assert (played.name, played.failed) == ("site.tests", None)


def test_comments_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    lines = ("# a", "// b", "", "  ", {"test": "a"}, "# c", {"show": True, "expect": {"age": "0s"}})
    assert only(results_of(tmp_path, *lines)).place.endswith(":5")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"submit": "stpo"}', "Did you mean 'stop'?"),
        ('{"submit": ', "This is not JSON"),
        ("[1]", "one JSON object"),
        ('{"finish": "stop"}', "is not in flight"),
        ('{"submit": "stop", "expect": 3}', '"expect" must be an object'),
        ('{"submit": "stop", "expect": {"dispositon": "denied"}}', "Did you mean 'disposition'?"),
        ('{"test": ""}', "A scenario begins with"),
        ('{"test": "b", "submit": "stop"}', "A scenario begins with"),
        ('{"expect": {"rule": "x"}}', "exactly one of"),
    ],
)
def test_a_line_that_cannot_be_played_fails_its_test_with_its_place(tmp_path: Path, line: str, says: str) -> None:
    played = only(results_of(tmp_path, {"test": "a"}, line, {"show": True, "expect": {"vm_state": "building"}}))
    assert played.failed is not None
    assert played.failed.place.endswith(":2")
    assert says in played.failed.message


def test_a_test_that_expects_nothing_fails(tmp_path: Path) -> None:
    result = results_of(tmp_path, {"test": "a"}, ACTIVE, {"submit": "stop"}, {"test": "b"}, {"test": "c"})
    assert [played.failed is not None for played in result.scenarios] == [True, True, True]


def test_true_is_not_one_and_nested_values_must_be_whole(tmp_path: Path) -> None:
    assert only(results_of(tmp_path, {"show": True, "expect": {"generation": False}})).failed
    done = [ACTIVE, {"submit": "stop"}, {"take": "any"}]
    right = {"finish": "stop", "expect": {"ended": {"r1": "succeeded"}}}
    assert only(results_of(tmp_path, *done, right)).failed is None
    assert only(results_of(tmp_path, *done, {"finish": "stop", "expect": {"ended": {}}})).failed
    more = {"r1": "succeeded", "r2": "failed"}
    assert only(results_of(tmp_path, *done, {"finish": "stop", "expect": {"ended": more}})).failed


def test_files_beside_a_policy_are_found_in_order(tmp_path: Path) -> None:
    policy = tmp_path / "my.cloud.toml"
    assert files_beside(policy) == ()
    folder = tmp_path / "my.cloud.tests"
    folder.mkdir()
    names = [tmp_path / "my.cloud.tests.jsonl", folder / "a.jsonl", folder / "b.jsonl"]
    for path in (*names, folder / "notes.txt"):
        path.write_text("")
    assert files_beside(policy) == tuple(names)


def test_a_file_that_is_no_text_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"test": "a"}\n\xff')
    with pytest.raises(Invalid, match=r"x\.jsonl:2"):
        read_all([path])
    with pytest.raises(Invalid, match="cannot be read"):
        read_all([tmp_path])


def test_rules_that_no_scenario_touches_are_listed(tmp_path: Path) -> None:
    policy = tmp_path / "site.toml"
    policy.write_text(
        '[policy]\nextends = "standard"\n'
        '[[rule]]\nid = "a"\noperations = ["pause"]\ntags = ["x"]\nverdict = "deny"\nreason = "r"\n'
        '[[rule]]\nid = "b"\noperations = ["pause"]\ntags = ["y"]\nverdict = "deny"\nreason = "r"\n'
    )
    tagged = {"instance": {"vm_state": "active", "tags": ["y"]}}
    result = results_of(tmp_path, tagged, {"submit": "pause", "expect": {"rule": "b"}}, policy=str(policy))
    assert [one.rule for one in result.untouched] == ["a"]
    assert (result.rules, result.inherited_touched) == (2, 0)


def test_a_rule_that_is_asked_about_the_foreseen_state_is_touched_too(tmp_path: Path) -> None:
    stopped = {"instance": {"vm_state": "stopped"}}
    start = {"submit": "start"}
    result = results_of(tmp_path, stopped, start, {"submit": "pause", "expect": {"disposition": "admitted"}})
    assert "pause-suspend" not in [one.rule for one in result.untouched]
    assert "unpause" in [one.rule for one in result.untouched]


def test_the_example_passes_its_own_tests_and_they_touch_every_rule() -> None:
    policy = EXAMPLES / "my-cloud.toml"
    result = run(read(policy), read_all(files_beside(policy)))
    assert [played.failed for played in result.scenarios] == [None] * 6
    assert result.untouched == ()
    own = [one for one in check_file(policy) if one.place.startswith(str(policy))]
    assert not [one for one in own if one.severity is not Severity.NOTE]


def test_the_example_would_fail_without_its_rules() -> None:
    result = run(read("standard"), read_all(files_beside(EXAMPLES / "my-cloud.toml")))
    assert result.failures >= 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=tier(30, 750))
@given(lines=st.lists(json_values.map(json.dumps) | st.text(max_size=40), max_size=8))
def test_no_line_whatever_makes_it_crash(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    for played in run(STANDARD, read_scenarios(path)).scenarios:
        assert played.failed is not None or played.expectations


STANDARD = read("standard")
