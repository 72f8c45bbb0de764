"""The table of conditions: complete, and its classes of values stand for all values."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.condition_kinds import Choice, Takes, Word
from interlock.core.conditions import CALLER, CONDITION, CONDITIONS, Condition, Conditions
from interlock.core.operations import BIT, Operation
from interlock.core.records import Request, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.core.view_classes import callers, distinguished_by
from interlock.core.views import View

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
