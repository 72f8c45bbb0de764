"""The table of conditions: complete, and its classes of values stand for all values."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from core_samples import START_MS, O, V, ask, instance_in, serving
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.condition_kinds import Choice, Members, Parts, Takes, Word
from interlock.core.conditions import CALLER, CONDITION, CONDITIONS, Condition, Conditions
from interlock.core.lifecycle import progress
from interlock.core.operations import BIT, Operation
from interlock.core.records import Request, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.core.view_classes import callers, distinguished_by
from interlock.core.views import View, at_present, build_view

NAMES = st.sampled_from(["", "a", "al", "alice", "alice2", "al-1", "bob", "c"])
TEXTS = st.sampled_from(["a", "b", "c"])
VALUES: dict[Takes, tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]] = {
    Takes.FLAG: (st.booleans(), st.booleans()),
    Takes.TIME: (st.sampled_from([1, 5, 9]), st.integers(0, 12)),
    Takes.COUNT: (st.sampled_from([1, 5, 9]), st.integers(0, 12)),
    Takes.KINDS: (
        st.frozensets(st.sampled_from([Operation.STOP, Operation.START])),
        st.sampled_from([0, BIT[Operation.STOP], BIT[Operation.START] | BIT[Operation.PAUSE]]),
    ),
    Takes.TEXTS: (st.frozensets(TEXTS, min_size=1), st.frozensets(TEXTS).map(tuple)),
}
"""What a rule may want, and what a view may have."""


def values_of(condition: Condition) -> tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]:
    if condition.reads == "requested_by":
        wanted = st.sampled_from(["alice", "al*", "a*", "bob", "*", "alice*"])
        return st.frozensets(wanted, min_size=1), NAMES
    if isinstance(condition.kind, Word):
        words = st.sampled_from(condition.kind.words)
        return st.frozensets(words, min_size=1), words
    return VALUES[condition.kind.takes]


def test_every_condition_of_a_rule_is_described_once_and_tests_a_field_of_the_view() -> None:
    fields = [field.name for field in msgspec.structs.fields(Conditions)]
    assert sorted(condition.field for condition in CONDITIONS) == sorted(fields)
    views = {field.name: field for field in msgspec.structs.fields(View)}
    for condition in CONDITIONS:
        assert views[condition.reads].default == condition.usual
    # The other fields are what a rule is looked up by, and the second of two ages.
    assert views.keys() - CONDITION.keys() == {"operation", "vm_state", "task_state", "running_ms"}


def test_what_a_rule_asks_of_a_caller_is_a_field_of_submissions_and_requests_too() -> None:
    for kind in (Submission, Request):
        assert {condition.reads for condition in CALLER} <= {field.name for field in msgspec.structs.fields(kind)}
    assert all(condition.option for condition in CALLER)


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.key)
@given(data=st.data())
def test_values_of_one_class_fulfil_the_same_conditions(condition: Condition, data: st.DataObject) -> None:
    """Also each value has one that stands for it, so that an analysis of those is one of all."""
    wants, haves = values_of(condition)
    wanted = data.draw(st.lists(wants, max_size=4))
    tests = [condition.kind.test(each) for each in wanted]
    one, other = data.draw(haves), data.draw(haves)
    answers = [[bool(test(value)) for test in tests] for value in (one, other)]
    class_of = condition.kind.class_of(wanted) or (lambda value: value)
    if class_of(one) == class_of(other):
        assert answers[0] == answers[1]
    if isinstance(condition.kind, Choice):
        representatives = condition.kind.values(wanted)
        assert representatives[0] == condition.usual
        assert answers[0] in [[bool(test(value)) for test in tests] for value in representatives]


def test_views_are_distinguished_by_the_conditions_of_the_rules_alone() -> None:
    plain = View(operation=Operation.STOP, vm_state=VmState.ACTIVE)
    named = msgspec.structs.replace(plain, requested_by="ci-1", tags=("x",))
    assert distinguished_by([Conditions(locked=True)])(plain) == distinguished_by([Conditions(locked=True)])(named)
    robots = distinguished_by([Conditions(requested_by=frozenset({"ci-*"}))])
    assert robots(plain) != robots(named)
    assert robots(named) == robots(msgspec.structs.replace(named, requested_by="ci-2", tags=()))


def test_there_is_one_caller_of_each_class_and_what_is_known_is_not_varied() -> None:
    rules = [
        Conditions(requested_by=frozenset({"ci-*", "alice"}), roles=frozenset({Role.ADMIN})),
        Conditions(requested_by=frozenset({"ci-*"})),
    ]
    found = list(callers(rules, role="member"))
    assert found == [{"role": "member", "requested_by": name} for name in ("", "alice", "ci-*")]
    assert [one["role"] for one in callers(rules)] == ["member"] * 3 + ["admin"] * 3
    together = [Conditions(requested_by=frozenset({f"user{number}" for number in range(64)}))]
    assert len(list(callers(together, role="member"))) == 2
    assert list(callers([], role="admin")) == [{"role": "admin", "requested_by": ""}]


KINDS = {condition.key: condition.kind for condition in CONDITIONS}


@pytest.mark.parametrize(
    ("key", "wanted", "words", "answers"),
    [
        ("groups", {"a"}, "a", {(): False, ("a",): True, ("b",): False, ("a", "b"): True}),
        ("groups", {"!b"}, "not b", {(): True, ("a",): True, ("b",): False, ("a", "b"): False}),
        ("groups", {"a", "!b"}, "a and not b", {(): False, ("a",): True, ("b",): False, ("a", "b"): False}),
        ("tags", {"a"}, "a", {(): False, ("a",): True, ("b",): False, ("a", "b"): True}),
        ("tags", {"!b"}, "not b", {(): True, ("a",): True, ("b",): False, ("a", "b"): False}),
        ("tags", {"a", "!b"}, "a and not b", {(): False, ("a",): True, ("b",): False, ("a", "b"): False}),
        ("tags_all", {"a", "b"}, "all of a, b", {(): False, ("a",): False, ("b",): False, ("a", "b"): True}),
    ],
)
def test_a_condition_on_texts_wants_some_all_or_none_of_them(
    key: str, wanted: set[str], words: str, answers: dict[tuple[str, ...], bool]
) -> None:
    kind = KINDS[key]
    test = kind.test(frozenset(wanted))
    assert {texts: bool(test(texts)) for texts in answers} == answers
    assert kind.wanted(frozenset(wanted)) == words
    assert (kind.found(()), kind.found(("a", "b"))) == ("none", "a, b")


def test_the_parts_of_a_condition_on_members_are_what_it_wants_some_all_and_none_of() -> None:
    parts = {
        key: kind.parts(wanted)
        for key, wanted in (
            ("tags", frozenset({"a", "!b"})),
            ("tags_all", frozenset({"a"})),
            ("held", frozenset({O.STOP})),
        )
        if isinstance(kind := KINDS[key], Members)
    }
    assert parts == {
        "tags": Parts(some=frozenset({"a"}), none=frozenset({"b"})),
        "tags_all": Parts(every=frozenset({"a"})),
        "held": Parts(some=frozenset({O.STOP})),
    }


@pytest.mark.parametrize(("named", "count"), [(0, 1), (3, 8), (4, 16), (5, 7), (9, 11)])
def test_what_a_caller_belongs_to_is_combined_up_to_four_names_and_then_not(named: int, count: int) -> None:
    """Of more, none, each alone, and all together stand for the rest."""
    kind = KINDS["groups"]
    assert isinstance(kind, Choice)
    names = tuple(f"g{number}" for number in range(named))
    values = kind.values([frozenset(names)])
    assert (values[0], values[-1], len(values)) == ((), names, count)
    assert set(values) >= {(name,) for name in names}


def test_the_ages_in_a_view_are_the_time_since_and_never_negative() -> None:
    instance = instance_in(updated_at_ms=START_MS, created_at_ms=START_MS - 50, state_since_ms=START_MS - 20)
    view = build_view(instance, ask(O.STOP), START_MS + 10)
    assert (view.age_ms, view.in_state_ms, view.silent_ms, view.running_ms) == (60, 30, 10, 10)
    early = build_view(instance, ask(O.STOP), START_MS - 100)
    assert (early.age_ms, early.in_state_ms, early.silent_ms, early.running_ms) == (0, 0, 0, 0)
    served = progress(serving(O.REBOOT), "r0", 1, START_MS + 7).instance
    view = build_view(served, ask(O.STOP), START_MS + 10)
    assert (view.silent_ms, view.running_ms) == (3, 10)
    unknown = build_view(instance_in(state_since_ms=0), ask(O.STOP), START_MS + 10)
    assert unknown.in_state_ms == 10, "since the last sign of life"


def test_what_a_queue_leads_to_counts_neither_the_state_that_is_left_nor_the_failures_that_are_over() -> None:
    instance = instance_in(V.STOPPED, created_at_ms=START_MS - 50, state_since_ms=START_MS - 20, failures={O.START: 2})
    now = at_present(instance)
    seen = now.view(ask(O.START), START_MS + 10)
    assert (seen.age_ms, seen.in_state_ms, seen.failures) == (60, 30, 2)
    rebuilt = now.after(O.REBUILD).view(ask(O.START), START_MS + 10)
    assert (rebuilt.age_ms, rebuilt.in_state_ms, rebuilt.failures) == (60, 30, 2)
    started = now.after(O.REBUILD).after(O.START).view(ask(O.START), START_MS + 10)
    assert (started.age_ms, started.in_state_ms, started.failures) == (60, 0, 0)
    rebooted = now.after(O.START).after(O.REBOOT).view(ask(O.START), START_MS + 10)
    assert (rebooted.in_state_ms, rebooted.failures) == (0, 0)


@pytest.mark.parametrize(
    ("parameters", "seen"),
    [
        ({}, (0, 0, 0, "")),
        ({"vcpus": 2, "memory_mib": 96, "root_gib": 3, "host": "north"}, (2, 96, 3, "north")),
        ({"host": "any"}, (0, 0, 0, "")),
        ({"vcpus": None, "host": None}, (0, 0, 0, "")),
    ],
)
def test_a_view_has_the_parameters_that_rules_see(parameters: dict[str, Any], seen: tuple[int, int, int, str]) -> None:
    submission = ask(O.RESIZE, parameters=parameters)
    for view in (build_view(instance_in(), submission, START_MS), at_present(instance_in()).view(submission)):
        assert (view.vcpus, view.memory_mib, view.root_gib, view.target_host) == seen
