"""The rows of the whole matrix: complete, what the gate answers, named as the policy names them, and quickly there."""

from __future__ import annotations

import csv
import io
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_samples import START_MS, instance, serving

from interlock.core.durations import short_time
from interlock.core.errors import Invalid
from interlock.core.operations import TASK_OPERATION, TASK_STATES, Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.records import Submission
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import build_view
from interlock.policies.language.loader import compile_named
from interlock.policies.rendering.tables import (
    COLUMNS,
    TASKS,
    Circumstances,
    Row,
    Selection,
    Variant,
    csv_lines,
    matrix,
    select,
    sign,
    table,
    title_of,
    variants,
)

POLICIES = {name: compile_named(name) for name in ("standard", "take2", "propolis")}
STANDARD = POLICIES["standard"]


def key(row: Row) -> tuple[str, str, str, bool]:
    return row.operation, row.vm_state, row.task_state, row.launched


def by_key(policy: CompiledPolicy | Policy, *more: Any) -> dict[tuple[str, str, str, bool], Row]:
    rows = table(policy, *more)
    keyed = {key(row): row for row in rows}
    assert len(keyed) == len(rows), "a combination has one row"
    return keyed


def rule(identifier: str, *operations: Operation, verdict: Verdict = Verdict.ADMIT, **more: Any) -> Rule:
    return Rule(id=identifier, operations=frozenset(operations or Operation), verdict=verdict, **more)


@pytest.mark.parametrize("name", list(POLICIES))
def test_there_is_one_row_for_every_combination(name: str) -> None:
    words = [variant.word for variant in variants(POLICIES[name])]
    assert set(words) >= {operation.value for operation in Operation}
    expected = set(product(words, VmState, TASKS, (True, False)))
    assert set(by_key(POLICIES[name])) == expected


STANDARD_ROWS = by_key(STANDARD)


@given(
    st.sampled_from(Operation),
    st.booleans(),
    st.sampled_from([state for state in VmState if state is not VmState.DELETED]),
    st.sampled_from(TASKS),
    st.booleans(),
)
def test_a_row_is_what_the_gate_decides_for_an_instance_that_is_so(
    operation: Operation, hard: bool, vm_state: VmState, task: str, launched: bool
) -> None:
    at = START_MS if launched else None
    there = instance(vm_state, launched_at_ms=at) if task == NO_TASK else serving(vm_state, task, launched_at_ms=at)
    submission = Submission(
        request_id="r", operation=operation, parameters={"hard": True} if hard else {}, requested_by="me"
    )
    decided = STANDARD.decide(build_view(there, submission, START_MS))
    variant = Variant(operation, hard)
    word = variant.word if variant in variants(STANDARD) else operation.value
    row = STANDARD_ROWS[word, vm_state.value, task, launched]
    assert (row.rule, row.verdict) == (decided.id, decided.verdict)
    if decided.verdict is Verdict.AFTER:
        assert row.threshold_s == (decided.threshold_ms or 0) / 1000
    else:
        assert row.threshold_s is None


def test_some_answers_of_the_standard_policy_are_known() -> None:
    row = STANDARD_ROWS["stop", "active", NO_TASK, True]
    assert (row.verdict, row.threshold_s, row.reason) == (Verdict.ADMIT, None, "")
    assert STANDARD_ROWS["delete", "active", "rebooting", True].verdict is Verdict.PREEMPT
    row = STANDARD_ROWS["delete", "active", "deleting", True]
    assert (row.verdict, row.threshold_s, row.reason) == (Verdict.AFTER, 300, "already_deleting")
    assert STANDARD_ROWS["reboot", "paused", NO_TASK, True].reason == "hard_reboot_only"
    assert STANDARD_ROWS["reboot_hard", "paused", NO_TASK, True].verdict is Verdict.ADMIT
    assert STANDARD_ROWS["start", "deleted", NO_TASK, True].reason == "deleted"


def test_the_operation_whose_task_it_is_is_outstanding_and_nothing_else() -> None:
    policy = Policy(
        name="p",
        rules=(
            rule("behind-stop", Operation.START, outstanding=frozenset({Operation.STOP})),
            rule("behind-something", Operation.START, outstanding=frozenset(Operation)),
            rule("alone", Operation.START, outstanding=frozenset()),
        ),
    )
    rows = by_key(policy)
    for task in TASK_STATES:
        expected = "behind-stop" if TASK_OPERATION[task] is Operation.STOP else "behind-something"
        assert rows["start", "active", task, True].rule == expected
    assert rows["start", "active", NO_TASK, True].rule == "alone"


def test_an_instance_that_was_never_launched_has_rows_of_its_own() -> None:
    rows = by_key(Policy(name="p", rules=(rule("ran", launched=True),)))
    assert rows["stop", "active", NO_TASK, True].verdict is Verdict.ADMIT
    assert rows["stop", "active", NO_TASK, False].reason == "no_rule"


def test_the_hard_variant_has_rows_only_where_the_policy_tells_it_apart() -> None:
    assert "reboot_hard" not in {variant.word for variant in variants(Policy(name="p", rules=(rule("any"),)))}
    hard = Policy(name="p", rules=(rule("any", Operation.REBOOT, hard=True),))
    rows = by_key(hard)
    assert rows["reboot_hard", "active", NO_TASK, True].verdict is Verdict.ADMIT
    assert rows["reboot", "active", NO_TASK, True].verdict is Verdict.DENY
    assert ("stop_hard", "active", NO_TASK, True) not in rows
    named = Policy(name="p", rules=(rule("any"),), names={"reboot_hard": ("reboot_hard",)})
    assert Variant(Operation.REBOOT, hard=True) in variants(named)


def test_rows_have_the_names_that_the_policy_gives() -> None:
    policy = Policy(
        name="p",
        rules=(rule("any"),),
        names={
            "reboot": ("reboot_soft",),
            "snapshot": ("snapshot", "snapshot_volume_backed"),
            "powering_off": ("powering-off",),
        },
    )
    rows = by_key(policy)
    operations = {row.operation for row in rows.values()}
    assert {"reboot_soft", "snapshot", "snapshot_volume_backed"} <= operations
    assert "reboot" not in operations
    assert {row.task_state for row in rows.values()} == {*TASKS, "powering-off"} - {"powering_off"}
    assert len(rows) == (len(Operation) + 1) * len(VmState) * len(TASKS) * 2


def test_circumstances_are_those_of_every_row() -> None:
    def answered(**more: Any) -> str:
        return by_key(STANDARD, Circumstances(**more))["evacuate", "active", NO_TASK, True].reason

    assert answered() == "host_reachable"
    assert answered(host_reachable=False) == ""
    assert answered(locked=True) == "locked"
    assert answered(locked=True, caller={"role": "admin"}) == "host_reachable"
    assert answered(caller={"role": "reader"}) == "role_required"


def test_what_changes_with_silence_is_answered_for_now_and_marked() -> None:
    row = STANDARD_ROWS["stop", "active", "rebooting", True]
    assert row.later_s == 15
    later = by_key(STANDARD, Circumstances(silent_ms=15_000))["stop", "active", "rebooting", True]
    assert (later.verdict, later.threshold_s, later.reason) == (Verdict.AFTER, 180, "no_sign_of_life")
    assert later.later_s is None
    assert row.verdict is not Verdict.AFTER
    assert STANDARD_ROWS["stop", "active", NO_TASK, True].later_s is None


def test_an_answer_that_calls_it_redundant_until_it_takes_over_has_the_code_that_a_client_sees() -> None:
    from interlock.core.policy import Before

    after: dict[str, Any] = {"verdict": Verdict.AFTER, "threshold_ms": 1500}
    policy = Policy(
        name="p",
        rules=(rule("same", Operation.STOP, before=Before.REDUNDANT, **after), rule("other", Operation.START, **after)),
    )
    rows = by_key(policy)
    assert rows["stop", "active", NO_TASK, True].reason == "already"
    assert rows["start", "active", NO_TASK, True].reason == "in_progress"
    assert rows["start", "active", NO_TASK, True].threshold_s == 1.5


def test_the_csv_has_the_agreed_columns_and_says_the_same_as_the_rows() -> None:
    rows = table(STANDARD)
    text = "".join(csv_lines(rows))
    assert text.splitlines()[0] == "operation,vm_state,task_state,launched,verdict,threshold_s,rule,reason"
    read = list(csv.DictReader(io.StringIO(text)))
    assert tuple(read[0]) == COLUMNS
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        assert line["launched"] == ("true" if row.launched else "false")
        assert line["threshold_s"] == ("" if row.threshold_s is None else str(row.threshold_s))
        assert (line["operation"], line["vm_state"], line["task_state"]) == key(row)[:3]
        assert (line["verdict"], line["rule"], line["reason"]) == (row.verdict.value, row.rule, row.reason)


def test_a_csv_of_nothing_is_its_titles() -> None:
    assert list(csv_lines([])) == [",".join(COLUMNS) + "\n"]


def test_a_selection_is_a_part_of_the_whole() -> None:
    chosen = select(
        STANDARD, operations=["reboot", "force-delete"], vm_states=["soft-deleted"], tasks=["@stop", "none"]
    )
    part = by_key(STANDARD, Circumstances(), chosen)
    assert part == {
        at: row
        for at, row in STANDARD_ROWS.items()
        if at[0] in {"reboot", "reboot_hard", "force_delete"}
        and at[1] == "soft_deleted"
        and at[2] in {NO_TASK, "powering_off", "powering_off_hard"}
    }
    assert select(STANDARD) == Selection()


def test_a_selection_understands_the_names_of_the_policy() -> None:
    policy = Policy(name="p", rules=(rule("any"),), names={"reboot": ("reboot_soft",), "reboot_hard": ("reboot_hard",)})
    assert select(policy, operations=["reboot_soft"]).variants == frozenset({Variant(Operation.REBOOT)})
    assert select(policy, operations=["reboot"]).variants == frozenset(
        {Variant(Operation.REBOOT), Variant(Operation.REBOOT, hard=True)}
    )


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        ({"operations": ["rebot"]}, "Unknown operation 'rebot'.", "Did you mean 'reboot'?"),
        ({"vm_states": ["activ"]}, "Unknown vm_state 'activ'.", "Did you mean 'active'?"),
        ({"tasks": ["rebootin"]}, "Unknown task_state 'rebootin'.", "Did you mean 'rebooting'?"),
    ],
)
def test_a_word_that_names_nothing_is_refused_with_the_nearest(
    words: dict[str, list[str]], message: str, remedy: str
) -> None:
    with pytest.raises(Invalid) as refused:
        select(STANDARD, **words)
    assert refused.value.message == message
    assert refused.value.remedy == remedy


# -------------------------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_matrix_groups_what_is_answered_alike_and_leaves_nothing_out(name: str) -> None:
    policy = POLICIES[name]
    there = matrix(policy)
    rows = by_key(policy)
    told = [task for section in there.sections for task in section.task_states]
    assert sorted(told) == sorted(TASKS)
    assert there.sections[0].task_states == (NO_TASK,)
    for section in there.sections:
        for task, line in product(section.task_states, section.lines):
            for state, answer in zip(there.vm_states, line.answers, strict=True):
                row = rows[line.names[0], state.value, task, True]
                assert (row.verdict, row.reason) == (answer.rule.verdict, answer.reason)


def test_a_matrix_of_never_launched_instances_has_their_answers() -> None:
    policy = CompiledPolicy(Policy(name="p", rules=(rule("ran", launched=True),)))
    assert {sign(answer) for answer in matrix(policy).sections[0].lines[0].answers} == {"yes", "·"}
    assert {sign(answer) for answer in matrix(policy, launched=False).sections[0].lines[0].answers} == {"·"}


def test_sections_name_the_operations_whose_phases_they_have() -> None:
    titles = [title_of(section, {"powering_off": ("powering-off",)}) for section in matrix(STANDARD).sections]
    assert titles[0] == "no task"
    assert "@create" in titles
    assert "powering-off" in titles


def test_times_are_written_in_the_greatest_unit_that_leaves_no_rest() -> None:
    assert [short_time(value) for value in (0, 500, 90_000, 180_000, 3_600_000, 86_400_000)] == [
        "0ms",
        "500ms",
        "90s",
        "3m",
        "1h",
        "1d",
    ]
