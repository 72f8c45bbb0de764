"""An explanation names the rule that decides, and what kept the ones before it from deciding."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_samples import START_MS, Play, dispositions, instance, said, serving

from interlock.core.admission import admit_there, judge
from interlock.core.lifecycle import finish
from interlock.core.operations import BIT, TASK_STATES, Operation
from interlock.core.policy import GONE, NO_RULE, CompiledPolicy, Policy, Rule, Verdict
from interlock.core.records import Admitted, Denied, Instance, Outcome, Submission
from interlock.core.roles import Role
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import build_view
from interlock.policies.explanation.explainer import TURNS, Turn, Way, explain, granted, imagined, ways
from interlock.policies.language.loader import builtin_names, compile_named, load
from tiers import tier

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
    assert failed["readers-change-nothing"] == "roles: wants one of agent, reader, found member"
    assert failed["deleting"] == "outstanding: wants one of delete, force_delete, found reboot"
    assert failed["stop-harder"] == "task_state: wants powering_off, found rebooting"
    last = explanation.tried[-1]
    assert (last.rule, last.matched, last.failed) == ("silent-power.stop", True, None)
    assert last.source.startswith("standard.toml:")
    assert isinstance(explanation.disposition, Denied)
    assert explanation.disposition.reason == "no_sign_of_life"


def test_where_no_rule_matches_the_explanation_says_so_last() -> None:
    rules = (Rule(id="start", operations=frozenset({O.STOP}), vm_states=frozenset({V.STOPPED}), verdict=Verdict.ADMIT),)
    policy = CompiledPolicy(Policy(name="p", rules=rules))
    explanation = explain(instance(V.ACTIVE), asking(O.STOP), policy, START_MS)
    assert [(tried.rule, tried.matched) for tried in explanation.tried] == [("start", False), (NO_RULE.id, True)]
    assert said(explanation.disposition) == ("denied", NO_RULE.code)


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


@settings(max_examples=tier(60, 1500))
@given(
    name=st.sampled_from(sorted(POLICIES)),
    vm_state=st.sampled_from(list(V)),
    task=st.sampled_from(TASK_STATES),
    operation=st.sampled_from(list(O)),
    age_ms=st.sampled_from([0, 20_000, 10_000_000]),
    role=st.sampled_from(Role),
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
    role: Role,
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
    # Nothing is asked of a policy about what is deleted.
    decided = GONE if vm_state is V.DELETED else POLICIES[name].decide(build_view(start, submission, START_MS))
    assert explanation.tried[-1].rule == decided.id
    assert [tried.matched for tried in explanation.tried] == [False] * (len(explanation.tried) - 1) + [True]


def test_every_operation_has_its_disposition_and_the_admitted_ones_are_allowed(standard: CompiledPolicy) -> None:
    start = serving(V.ACTIVE, "rebooting", age_ms=20_000)
    answers = dispositions(start, Role.MEMBER, "me", standard, START_MS, host_reachable=True)
    assert set(answers) == set(O)
    for operation, answer in answers.items():
        assert said(answer) == said(Play(standard, start).submit(operation))
    allowed = granted(answers)
    assert allowed == tuple(operation for operation in O if isinstance(answers[operation], Admitted))
    assert O.DELETE in allowed
    assert O.STOP not in allowed
    assert O.RESET_STATE not in allowed
    assert O.RESET_STATE in granted(dispositions(start, Role.ADMIN, "me", standard, START_MS, host_reachable=True))


@settings(max_examples=tier(40, 1000))
@given(
    name=st.sampled_from(sorted(POLICIES)),
    vm_state=st.sampled_from(list(V)),
    task=st.sampled_from([NO_TASK, *TASK_STATES]),
    age_ms=st.sampled_from([0, 20_000, 10_000_000]),
    role=st.sampled_from(Role),
    reachable=st.booleans(),
    locked=st.booleans(),
)
def test_what_is_said_to_be_allowed_is_what_a_submission_is_answered(
    name: str, vm_state: VmState, task: str, age_ms: int, role: Role, *, reachable: bool, locked: bool
) -> None:
    policy = POLICIES[name]
    start = imagined(vm_state, task, START_MS, silent_ms=age_ms, locked=locked)
    answers = dispositions(start, role, "me", policy, START_MS, host_reachable=reachable)
    allowed = granted(answers)
    for operation in O:
        answer = admit_there(start, asking(operation, role=role, host_reachable=reachable), policy, START_MS).answer
        assert (operation in allowed) == isinstance(answer, Admitted), operation
        assert said(answers[operation]) == said(answer)


def test_an_evacuation_is_allowed_exactly_where_the_host_is_fenced(standard: CompiledPolicy) -> None:
    lost, there = (
        granted(
            dispositions(
                imagined(V.ACTIVE, NO_TASK, START_MS), Role.ADMIN, "me", standard, START_MS, host_reachable=reachable
            )
        )
        for reachable in (False, True)
    )
    assert O.EVACUATE in lost
    assert O.EVACUATE not in there


def made(vm_state: VmState, task: str, **more: Any) -> Instance:
    return imagined(vm_state, task, START_MS, **more)


def turns(instance: Instance, submission: Submission, policy: CompiledPolicy) -> dict[str, Way]:
    return {way.turn: way for way in ways(instance, submission, policy, START_MS)}


def test_what_is_admitted_needs_no_way(standard: CompiledPolicy) -> None:
    assert ways(made(V.ACTIVE, "none"), asking(O.STOP), standard, START_MS) == ()


def test_a_takeover_names_its_exact_moment_first(standard: CompiledPolicy) -> None:
    stuck = made(V.ACTIVE, "rebooting", silent_ms=20_000, running_ms=50_000)
    found = ways(stuck, asking(O.STOP), standard, START_MS)
    assert (found[0].turn, found[0].at_ms, found[0].rule) == (Turn.TIME, START_MS + 160_000, "silent-power.stop")
    assert isinstance(explain(stuck, asking(O.STOP), standard, START_MS + 160_000).disposition, Admitted)
    assert isinstance(explain(stuck, asking(O.STOP), standard, START_MS + 159_999).disposition, Denied)


def test_a_locked_instance_is_unlocked_or_an_administrator_asks(standard: CompiledPolicy) -> None:
    found = turns(made(V.ACTIVE, "none", locked=True), asking(O.STOP), standard)
    assert found.keys() == {Turn.UNLOCKED, "role"}
    assert found["role"].value == "admin"


def test_a_state_that_would_do_is_named_with_what_leads_there(standard: CompiledPolicy) -> None:
    found = ways(made(V.ACTIVE, "none"), asking(O.UNRESCUE), standard, START_MS)
    assert [(way.value, way.by) for way in found] == [("rescued", (O.RESCUE,))]
    paused = ways(made(V.PAUSED, "none"), asking(O.REBOOT), standard, START_MS)
    assert (paused[0].turn, paused[0].value) == (Turn.HARD, True)


def test_in_another_state_the_guest_is_as_it_belongs_to_that_state() -> None:
    rule = Rule(
        id="off",
        operations=frozenset({O.REBUILD}),
        verdict=Verdict.ADMIT,
        vm_states=frozenset({V.STOPPED}),
        power_state=frozenset({"none"}),
    )
    found = turns(made(V.ACTIVE, "none"), asking(O.REBUILD), CompiledPolicy(Policy(name="made", rules=(rule,))))
    assert [(way.turn, way.value) for way in found.values()] == [(Turn.VM_STATE, "stopped")]


def test_what_waits_in_the_way_is_named(standard: CompiledPolicy) -> None:
    found = turns(made(V.ACTIVE, "none", waiting=[O.STOP]), asking(O.REBOOT), standard)
    assert Turn.NOTHING_OUTSTANDING in found
    served = turns(made(V.ACTIVE, "pausing"), asking(O.PAUSE), standard)
    assert served[Turn.TIME].rule == "again-seconds.pause"


def test_a_task_that_ends_well_is_a_way(standard: CompiledPolicy) -> None:
    found = turns(made(V.ACTIVE, "pausing", silent_ms=20_000), asking(O.START), standard)
    assert Turn.TASK_OVER not in found
    over = turns(made(V.ACTIVE, "rebuilding", silent_ms=20_000), asking(O.REBOOT), standard)
    assert over[Turn.TASK_OVER].value == "r1"


def test_an_instance_that_has_ended_has_no_way(standard: CompiledPolicy) -> None:
    assert ways(made(V.DELETED, "none"), asking(O.START, role=Role.ADMIN), standard, START_MS) == ()


def changed(
    way: Way, instance: Instance, submission: Submission, policy: CompiledPolicy
) -> tuple[Instance, Submission, int]:
    """The change that a way claims would do, made a second time from its words alone."""
    replace = msgspec.structs.replace
    text, flag = str(way.value), way.value is True
    if way.turn is Turn.TIME:
        assert way.at_ms is not None
        return instance, submission, way.at_ms
    asked: dict[str, dict[str, Any]] = {
        Turn.HARD: {"parameters": {"hard": flag}},
        "role": {"role": text},
        Turn.HOST_REACHABLE: {"host_reachable": flag},
    }
    if way.turn in asked:
        return instance, replace(submission, **asked[way.turn]), START_MS
    if way.turn is Turn.TASK_OVER:
        over = finish(instance, text, instance.fence, Outcome.SUCCEEDED, policy, START_MS)
        return over.instance, submission, START_MS
    launched_at_ms = START_MS if instance.launched else None
    made_so: dict[str, dict[str, Any]] = {
        Turn.NOTHING_WAITS: {"outstanding": instance.outstanding[:1]},
        Turn.NOTHING_OUTSTANDING: {"outstanding": ()},
        Turn.NOTHING_HELD: {"held": ()},
        Turn.LOCKED: {"locked_by": "x"},
        Turn.UNLOCKED: {"locked_by": None},
        Turn.UNBLOCKED: {"blocked_operations": ()},
        Turn.WITHOUT_TAG: {"tags": tuple(tag for tag in instance.tags if tag != text)},
        Turn.WITH_TAG: {"tags": (*instance.tags, text)},
        Turn.LAUNCHED: {"launched_at_ms": START_MS},
    }
    if way.turn is Turn.VM_STATE:
        made_so[way.turn] = {"vm_state": VmState(text), "launched_at_ms": launched_at_ms}
    return replace(instance, **made_so[way.turn]), submission, START_MS


def ruled(rule_id: str, verdict: Verdict, operations: set[Operation], **more: Any) -> Rule:
    return Rule(id=rule_id, verdict=verdict, operations=frozenset(operations), **more)


def site() -> CompiledPolicy:
    """Standard, with conditions that it does not have itself."""
    rules = (
        ruled("never-run", Verdict.DENY, {O.RESCUE, O.SNAPSHOT}, launched=False),
        ruled("no-idle-gpu", Verdict.DENY, {O.PAUSE, O.SUSPEND}, tags=frozenset({"gpu"})),
        ruled(
            "maintained", Verdict.ADMIT, {O.REBUILD}, tags=frozenset({"maintained"}), vm_states=frozenset({V.PAUSED})
        ),
        ruled("one-held", Verdict.DENY, {O.START, O.STOP}, held=frozenset({O.START})),
    )
    standard = load("standard")
    return CompiledPolicy(msgspec.structs.replace(standard, name="site", rules=(*rules, *standard.rules)))


WITH_SITE = {**POLICIES, "site": site()}


@settings(max_examples=tier(50, 1250))
@given(
    name=st.sampled_from([*sorted(POLICIES), "site", "site"]),
    vm_state=st.sampled_from(list(V)),
    task=st.sampled_from(["none", "none", *TASK_STATES]),
    operation=st.sampled_from(list(O)),
    silent_ms=st.sampled_from([0, 20_000, 400_000]),
    role=st.sampled_from(Role),
    held=st.lists(st.sampled_from([O.START]), max_size=1),
    waiting=st.lists(st.sampled_from([O.STOP, O.START, O.DELETE, O.SWAP_VOLUME]), max_size=2),
    tags=st.lists(st.sampled_from(["gpu", "maintained"]), max_size=2, unique=True),
    hard=st.booleans(),
    locked=st.booleans(),
    blocked=st.booleans(),
    reachable=st.booleans(),
    launched=st.booleans(),
)
def test_every_way_that_is_claimed_leads_to_an_admission(
    name: str,
    vm_state: VmState,
    task: str,
    operation: Operation,
    silent_ms: int,
    role: Role,
    held: list[Operation],
    waiting: list[Operation],
    tags: list[str],
    *,
    hard: bool,
    locked: bool,
    blocked: bool,
    reachable: bool,
    launched: bool,
) -> None:
    policy = WITH_SITE[name]
    start = made(
        vm_state,
        task,
        silent_ms=silent_ms,
        held=held,
        waiting=waiting,
        tags=tags,
        locked=locked,
        blocked=[operation] if blocked else [],
        launched=launched,
    )
    submission = asking(operation, role=role, host_reachable=reachable, parameters={"hard": hard})
    found = ways(start, submission, policy, START_MS)
    assert [*found] == sorted(found, key=lambda way: TURNS.index(way.turn))
    for way in found:
        instance, asked, now_ms = changed(way, start, submission, policy)
        answer = judge(instance, asked, policy, now_ms)
        assert isinstance(answer, Admitted), way
        assert answer.rule == way.rule


def test_an_imagined_instance_looks_as_it_was_described() -> None:
    start = made(
        V.ACTIVE, "rebooting_hard", silent_ms=5_000, running_ms=9_000, waiting=[O.STOP], held=[O.START],
        tags=["a"], locked=True, launched=False, blocked=[O.PAUSE],
    )  # fmt: skip
    view = build_view(start, asking(O.PAUSE), START_MS)
    assert (view.task_state, view.silent_ms, view.running_ms) == ("rebooting_hard", 5_000, 9_000)
    assert view.outstanding == BIT[O.REBOOT] | BIT[O.STOP]
    assert (view.held, view.tags, view.locked, view.blocked) == (BIT[O.START], ("a",), True, True)
    assert not build_view(made(V.STOPPED, "none", launched=False), asking(O.START), START_MS).launched


def test_conditions_on_launched_and_held_are_explained() -> None:
    rules = (
        ruled("a", Verdict.DENY, {O.STOP}, launched=False),
        ruled("b", Verdict.DENY, {O.STOP}, held=frozenset({O.START})),
        ruled("c", Verdict.ADMIT, {O.STOP}),
    )
    policy = CompiledPolicy(Policy(name="made", rules=rules))
    explanation = explain(made(V.ACTIVE, "none"), asking(O.STOP), policy, START_MS)
    assert [(tried.key, tried.failed) for tried in explanation.tried] == [
        ("launched", "launched: wants false, found true"),
        ("held", "held: wants start, found nothing"),
        (None, None),
    ]
