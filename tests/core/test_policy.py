"""A policy: the first rule that matches decides, and a compiled one decides as a plain reading of its rules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from core_samples import O, V, compiled, rule
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from interlock.core import policy as policy_module
from interlock.core.operations import BIT, TASK_STATES, Operation
from interlock.core.policy import GONE, NO_RULE, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import View
from tiers import tier


def seen(operation: Operation = O.STOP, vm_state: VmState = V.ACTIVE, task_state: str = NO_TASK, **more: Any) -> View:
    return View(operation=operation, vm_state=vm_state, task_state=task_state, **more)


def test_the_first_rule_that_matches_decides() -> None:
    """Section 4: an ordered list."""
    policy = compiled(rule("first", {O.STOP}, Verdict.DENY), rule("second", {O.STOP}, Verdict.ADMIT))
    assert policy.decide(seen()).id == "first"


def test_what_no_rule_matches_is_denied() -> None:
    """Section 4: no match denies."""
    policy = compiled(rule("other", {O.START}, Verdict.ADMIT))
    assert policy.decide(seen()) is NO_RULE
    assert NO_RULE.verdict is Verdict.DENY


def test_nothing_is_allowed_of_a_deleted_instance() -> None:
    """Nothing leads out of deleted, whatever the rules say."""
    policy = compiled(rule("all", frozenset(Operation), Verdict.ADMIT))
    assert all(policy.decide(seen(operation, V.DELETED)) is GONE for operation in Operation)


def test_what_the_driver_does_not_perform_is_denied_before_any_rule() -> None:
    """An operation without a driver is never queued."""
    policy = CompiledPolicy(
        Policy(name="p", rules=(rule("all", frozenset(Operation), Verdict.ADMIT),)), performs=[O.START]
    )
    assert policy.decide(seen(O.START)).id == "all"
    assert policy.decide(seen(O.STOP)).reason == "not_performed"


@pytest.mark.parametrize(
    ("condition", "holds", "fails"),
    [
        ({"outstanding": frozenset({O.START})}, {"outstanding": BIT[O.START] | BIT[O.STOP]}, {"outstanding": 0}),
        ({"outstanding": frozenset()}, {"outstanding": 0}, {"outstanding": BIT[O.START]}),
        ({"roles": frozenset({"admin"})}, {"role": "admin"}, {"role": "member"}),
        ({"requested_by": frozenset({"alice"})}, {"requested_by": "alice"}, {"requested_by": "alice2"}),
        ({"requested_by": frozenset({"x", "ci-*"})}, {"requested_by": "ci-1"}, {"requested_by": "ci"}),
        ({"locked": True}, {"locked": True}, {"locked": False}),
        ({"locked": False}, {"locked": False}, {"locked": True}),
        ({"blocked": True}, {"blocked": True}, {"blocked": False}),
        ({"tags": frozenset({"x", "y"})}, {"tags": ("y", "z")}, {"tags": ("z",)}),
        ({"host_reachable": False}, {"host_reachable": False}, {"host_reachable": True}),
        ({"hard": True}, {"hard": True}, {"hard": False}),
        ({"silent_ms_min": 10}, {"silent_ms": 10}, {"silent_ms": 9}),
        ({"vm_states": frozenset({V.ACTIVE})}, {}, {"vm_state": V.PAUSED}),
        ({"task_states": frozenset({NO_TASK})}, {}, {"task_state": "pausing"}),
    ],
)
def test_a_rule_holds_only_under_its_condition(
    condition: dict[str, Any], holds: dict[str, Any], fails: dict[str, Any]
) -> None:
    """Each condition can hold, and can fail."""
    policy = compiled(rule("it", {O.STOP}, Verdict.ADMIT, **condition))
    assert policy.decide(seen(**holds)).id == "it"
    assert policy.decide(seen(**fails)) is NO_RULE


def test_an_age_is_measured_from_what_the_rule_names() -> None:
    """`measured_from`: the last progress, or the start of the task."""
    view = seen(silent_ms=3, running_ms=7)
    assert rule("r", {O.STOP}, Verdict.AFTER, measured_from=MeasuredFrom.LAST_PROGRESS).age_ms(view) == 3
    assert rule("r", {O.STOP}, Verdict.AFTER, measured_from=MeasuredFrom.TASK_STARTED).age_ms(view) == 7


def test_a_code_is_the_rules_own_or_its_verdicts() -> None:
    """Every answer has a stable code."""
    assert rule("r", {O.STOP}, Verdict.DENY, reason="mine").code == "mine"
    assert all(rule("r", {O.STOP}, verdict).code for verdict in Verdict)


# --------------------------------------------------------------------------------------- against a plain reading

SOME_OPERATIONS = (O.START, O.STOP, O.DELETE)
SOME_STATES = (V.ACTIVE, V.STOPPED, V.DELETED)
SOME_TASKS = (NO_TASK, "powering_on", "deleting")


def subsets(*values: Any) -> st.SearchStrategy[frozenset[Any]]:
    return st.frozensets(st.sampled_from(values), min_size=1)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


RULES = st.builds(
    Rule,
    id=st.just("r"),
    operations=subsets(*SOME_OPERATIONS),
    verdict=st.sampled_from(Verdict),
    vm_states=maybe(subsets(*SOME_STATES)),
    task_states=maybe(subsets(*SOME_TASKS)),
    outstanding=maybe(st.frozensets(st.sampled_from(SOME_OPERATIONS))),
    roles=maybe(subsets("member", "admin")),
    requested_by=maybe(subsets("alice", "a*", "al*")),
    locked=maybe(st.booleans()),
    tags=maybe(subsets("a", "b")),
    hard=maybe(st.booleans()),
    launched=maybe(st.booleans()),
    held=maybe(st.frozensets(st.sampled_from(SOME_OPERATIONS))),
    silent_ms_min=maybe(st.sampled_from([1, 5])),
)
VIEWS = st.builds(
    View,
    operation=st.sampled_from(SOME_OPERATIONS),
    vm_state=st.sampled_from(SOME_STATES),
    task_state=st.sampled_from(SOME_TASKS),
    outstanding=st.sampled_from([0, BIT[O.START], BIT[O.STOP] | BIT[O.DELETE]]),
    role=st.sampled_from(["member", "admin"]),
    locked=st.booleans(),
    requested_by=st.sampled_from(["", "alice", "alfred", "anna", "bob"]),
    tags=st.sampled_from([(), ("a",), ("a", "b")]),
    hard=st.booleans(),
    silent_ms=st.sampled_from([0, 1, 4, 5]),
    launched=st.booleans(),
    held=st.sampled_from([0, BIT[O.START]]),
)


def read_plainly(rules: list[Rule], view: View) -> str:  # noqa: C901 - one question after the other
    """What a person would answer who reads the rules from top to bottom."""
    kinds = {operation for operation in Operation if view.outstanding & BIT[operation]}
    held = {operation for operation in Operation if view.held & BIT[operation]}
    for each in rules:
        if each.vm_states is None and view.vm_state is V.DELETED:
            continue
        among = [
            (each.operations, view.operation),
            (each.vm_states, view.vm_state),
            (each.task_states, view.task_state),
            (each.roles, view.role),
        ]
        if any(allowed is not None and value not in allowed for allowed, value in among):
            continue
        if each.requested_by is not None and not any(
            view.requested_by.startswith(name[:-1]) if name.endswith("*") else view.requested_by == name
            for name in each.requested_by
        ):
            continue
        if each.outstanding is not None and not (kinds & each.outstanding if each.outstanding else not kinds):
            continue
        if each.held is not None and not (held & each.held if each.held else not held):
            continue
        if each.launched is not None and each.launched != view.launched:
            continue
        if each.tags is not None and not set(each.tags) & set(view.tags):
            continue
        if each.locked is not None and each.locked != view.locked:
            continue
        if each.hard is not None and each.hard != view.hard:
            continue
        if each.silent_ms_min is not None and view.silent_ms < each.silent_ms_min:
            continue
        return each.id
    return (GONE if view.vm_state is V.DELETED else NO_RULE).id


@settings(max_examples=tier(60, 1500))
@given(written=st.lists(RULES, max_size=6), views=st.lists(VIEWS, min_size=1, max_size=8))
def test_a_compiled_policy_decides_as_a_plain_reading_does(written: list[Rule], views: list[View]) -> None:
    """Compiling changes how fast, and never what."""
    rules = [replace(each, id=f"r{number}") for number, each in enumerate(written)]
    policy = compiled(*rules)
    for view in views:
        assert policy.decide(view).id == read_plainly(rules, view)


@settings(max_examples=tier(7, 75))
@given(written=st.lists(RULES, min_size=1, max_size=6))
def test_the_whole_table_is_as_a_plain_reading(written: list[Rule]) -> None:
    """The same over the full product of operations, vm_states and task_states."""
    rules = [replace(each, id=f"r{number}") for number, each in enumerate(written)]
    policy = compiled(*rules)
    for operation in Operation:
        for vm_state in VmState:
            for task_state in (NO_TASK, *TASK_STATES[::5], "deleting", "powering_on"):
                view = seen(operation, vm_state, task_state)
                assert policy.decide(view).id == read_plainly(rules, view)


@settings(max_examples=tier(20, 500))
@given(written=st.lists(RULES, min_size=13, max_size=40), views=st.lists(VIEWS, min_size=1, max_size=20))
def test_a_long_cell_answers_as_a_plain_reading_also_the_second_time(written: list[Rule], views: list[View]) -> None:
    """What it remembers of one view is true of every view that it takes for the same."""
    anywhere = {"operations": frozenset(SOME_OPERATIONS), "vm_states": None, "task_states": None}
    rules = [replace(each, id=f"r{number}", **anywhere) for number, each in enumerate(written)]
    policy = compiled(*rules)
    for view in (*views, *views):
        assert policy.decide(view).id == read_plainly(rules, view)


class CountedTags(frozenset[str]):
    """Tags of a rule that count how often the rule is evaluated."""

    asked = 0

    def isdisjoint(self, others: Iterable[object], /) -> bool:
        CountedTags.asked += 1
        return super().isdisjoint(others)


def test_one_decision_costs_the_same_however_many_rules_only_a_tag_tells_apart() -> None:
    """Two thousand rules about one cell are asked once, and not for every decision."""
    rules = [rule(f"r{number}", {O.STOP}, Verdict.DENY, tags=CountedTags({f"t{number}"})) for number in range(2_000)]
    policy = compiled(*rules, rule("last", {O.STOP}, Verdict.ADMIT))
    CountedTags.asked = 0
    for _ in range(3):
        assert policy.decide(seen(tags=("t1999",))).id == "r1999"
    assert CountedTags.asked == 2_000


def test_a_policy_remembers_a_limited_number_of_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers make up names and tags without end."""
    monkeypatch.setattr(policy_module, "_RECALLED_MAX", 5)
    rules = [rule(f"r{number}", {O.STOP}, Verdict.DENY, tags=frozenset({f"t{number}"})) for number in range(12)]
    policy = compiled(*rules, rule("last", {O.STOP}, Verdict.ADMIT))
    sizes = []
    for number in range(12):
        assert policy.decide(seen(tags=(f"t{number}",))).id == f"r{number}"
        sizes.append(len(policy._recalled))
    assert sizes == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]


def test_a_protected_tag_is_named_as_a_whole_or_by_its_beginning() -> None:
    policy = CompiledPolicy(Policy(name="p", rules=(), protected_tags=("frozen", "gpu-*"), outstanding_max=8))
    tags = ("frozen", "frozen-1", "gpu-", "gpu-a100", "gpu", "GPU-1", "web")
    assert policy.protected(tags) == {"frozen", "gpu-", "gpu-a100"}
    assert compiled().protected(tags) == frozenset()
