"""An explanation names the rule that decides, and what kept the ones before it from deciding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_samples import START_MS, Play, instance, said, serving

from interlock.core.admission import look
from interlock.core.operations import TASK_STATES, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Denied, Submission
from interlock.core.states import VmState
from interlock.policies.explaining import allowed_now, dispositions, explain
from interlock.policies.reading import builtin_names, compile_named

O = Operation  # noqa: E741
V = VmState
POLICIES = {name: compile_named(name) for name in builtin_names()}


@pytest.fixture(scope="module")
def standard() -> CompiledPolicy:
    return POLICIES["standard"]


def asking(operation: Operation, **more: object) -> Submission:
    return Submission(request_id="r9", operation=operation, requested_by="me", **more)  # type: ignore[arg-type]


def test_the_rules_before_the_deciding_one_say_which_condition_failed(standard: CompiledPolicy) -> None:
    explanation = explain(serving(V.ACTIVE, "rebooting", age_ms=20_000), asking(O.STOP), standard, START_MS)
    failed = {tried.rule: tried.failed for tried in explanation.tried}
    assert failed["readers-change-nothing"] == "roles: wants reader, found member"
    assert failed["deleting"] == "outstanding: wants one of delete, force_delete, found reboot"
    assert failed["stop-harder"] == "task_state: wants powering_off, found rebooting"
    last = explanation.tried[-1]
    assert (last.rule, last.matched, last.failed) == ("silent-power.stop", True, None)
    assert last.source.startswith("standard.toml:")
    assert isinstance(explanation.disposition, Denied)
    assert explanation.disposition.reason == "no_sign_of_life"


def test_what_is_admitted_in_turn_is_explained_in_the_foreseen_state_too(standard: CompiledPolicy) -> None:
    play = Play(standard, instance(V.STOPPED))
    play.submit(O.START)
    explanation = explain(play.instance, asking(O.UNPAUSE), standard, START_MS)
    assert explanation.tried[-1].rule == "in-turn"
    assert explanation.foreseen is V.ACTIVE
    assert explanation.tried_foreseen[-1].rule == "active-already"
    assert said(explanation.disposition) == ("redundant", "already_active")


def test_a_deleted_instance_has_one_explanation(standard: CompiledPolicy) -> None:
    explanation = explain(instance(V.DELETED), asking(O.START), standard, START_MS)
    assert [tried.rule for tried in explanation.tried] == ["gone"]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(POLICIES)),
    vm_state=st.sampled_from(list(V)),
    task=st.sampled_from(TASK_STATES),
    operation=st.sampled_from(list(O)),
    age_ms=st.sampled_from([0, 20_000, 10_000_000]),
    role=st.sampled_from(["reader", "member", "admin"]),
    hard=st.booleans(),
    locked=st.booleans(),
    blocked=st.booleans(),
    reachable=st.booleans(),
)
def test_the_explanation_ends_with_the_rule_that_the_core_finds(
    name: str,
    vm_state: VmState,
    task: str,
    operation: Operation,
    age_ms: int,
    role: str,
    *,
    hard: bool,
    locked: bool,
    blocked: bool,
    reachable: bool,
) -> None:
    start = serving(
        vm_state,
        task,
        age_ms=age_ms,
        locked_by="me" if locked else None,
        blocked_operations=(operation,) if blocked else (),
    )
    submission = asking(operation, role=role, host_reachable=reachable, parameters={"hard": hard})
    explanation = explain(start, submission, POLICIES[name], START_MS)
    decided = POLICIES[name].decide(look(start, submission, START_MS))
    assert explanation.tried[-1].rule == decided.id
    assert [tried.matched for tried in explanation.tried] == [False] * (len(explanation.tried) - 1) + [True]


def test_every_operation_has_its_disposition_and_the_admitted_ones_are_allowed(standard: CompiledPolicy) -> None:
    start = serving(V.ACTIVE, "rebooting", age_ms=20_000)
    answers = dispositions(start, "member", "me", standard, START_MS)
    assert set(answers) == set(O)
    for operation, answer in answers.items():
        assert said(answer) == said(Play(standard, start).submit(operation))
    allowed = allowed_now(start, "member", "me", standard, START_MS)
    assert allowed == tuple(operation for operation in O if isinstance(answers[operation], Admitted))
    assert O.DELETE in allowed
    assert O.STOP not in allowed
    assert O.RESET_STATE not in allowed
    assert O.RESET_STATE in allowed_now(start, "admin", "me", standard, START_MS)
