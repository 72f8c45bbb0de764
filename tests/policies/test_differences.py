"""Two policies beside each other: every difference is told, only differences are told, and none of it is a wall."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.cli.application import run
from interlock.cli.commands.policy.group import policy_commands
from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, Operation
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.roles import Role
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import View
from interlock.policies.comparison import differences
from interlock.policies.comparison.differences import Combination, Differences, Effect, cover, differ, product_text
from interlock.policies.language.loader import load
from interlock.policies.rendering.tables import TASKS, Selection, Variant
from tiers import tier

STANDARD = load("standard")

_OPERATIONS = [Operation.STOP, Operation.REBOOT, Operation.ATTACH_VOLUME]
_STATES = [VmState.ACTIVE, VmState.STOPPED]
_TASKS = [NO_TASK, "powering_off", "rebooting"]
_TAGS = ["a", "b"]
PART = Selection(
    variants=frozenset(Variant(operation, hard) for operation in _OPERATIONS for hard in (False, True)),
    vm_states=frozenset(_STATES),
    task_states=frozenset(_TASKS),
)


def rule(identifier: str, *operations: Operation, verdict: Verdict = Verdict.ADMIT, **more: Any) -> Rule:
    return Rule(id=identifier, operations=frozenset(operations or Operation), verdict=verdict, **more)


def policy(*rules: Rule, **more: Any) -> Policy:
    return Policy(name="p", rules=rules, **more)


def some(values: list[Any]) -> st.SearchStrategy[Any]:
    return st.none() | st.frozensets(st.sampled_from(values), min_size=1)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    verdict = draw(st.sampled_from(Verdict))
    conditions = {
        "vm_states": some(_STATES),
        "task_states": some(_TASKS),
        "outstanding": st.none() | st.frozensets(st.sampled_from(_OPERATIONS)),
        "held": st.none() | st.frozensets(st.sampled_from(_OPERATIONS)),
        "roles": some(["reader", "member", "admin"]),
        "tags": some(_TAGS),
        "locked": st.none() | st.booleans(),
        "launched": st.none() | st.booleans(),
        "hard": st.none() | st.booleans(),
        "host_reachable": st.none() | st.booleans(),
        "silent_ms_min": st.none() | st.sampled_from([1000, 2000]),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(conditions)), max_size=2, unique=True))
    return rule(
        "r",
        *draw(st.lists(st.sampled_from(_OPERATIONS), min_size=1, unique=True)),
        verdict=verdict,
        threshold_ms=draw(st.sampled_from([1000, 2000])) if verdict is Verdict.AFTER else None,
        **{name: draw(conditions[name]) for name in chosen},
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    drawn = draw(st.lists(rules(), min_size=1, max_size=5))
    return policy(*(msgspec.structs.replace(each, id=f"r{number}") for number, each in enumerate(drawn)))


@st.composite
def views(draw: st.DrawFn) -> View:
    task = draw(st.sampled_from(_TASKS))
    served = 0 if task == NO_TASK else BIT[TASK_OPERATION[task]]
    kinds = st.sets(st.sampled_from(_OPERATIONS)).map(lambda there: sum(BIT[each] for each in there))
    operation = draw(st.sampled_from(_OPERATIONS))
    return View(
        operation=operation,
        vm_state=draw(st.sampled_from(_STATES)),
        task_state=task,
        outstanding=served | draw(kinds),
        role=draw(st.sampled_from(Role)),
        locked=draw(st.booleans()),
        tags=tuple(sorted(draw(st.sets(st.sampled_from(_TAGS))))),
        host_reachable=draw(st.booleans()),
        hard=bool(CATALOGUE[operation].hard_phases) and draw(st.booleans()),
        silent_ms=draw(st.sampled_from([0, 1000, 5000])),
        launched=draw(st.booleans()),
        held=draw(kinds),
    )


def said(answering: Rule) -> tuple[Any, ...]:
    """What a client can tell of an answer."""
    threshold = answering.threshold_ms if answering.verdict is Verdict.AFTER else None
    admits = answering.verdict in (Verdict.ADMIT, Verdict.PREEMPT)
    return answering.verdict, threshold, None if admits else answering.code


def places(found: Differences) -> set[tuple[str, str, str]]:
    return {place for group in found.groups for product in group.products for place in places_of(product)}


def places_of(product: Any) -> set[tuple[str, str, str]]:
    return set(itertools.product(product.operations, product.vm_states, product.task_states))


@settings(max_examples=tier(30, 750))
@given(policies(), policies(), st.lists(views(), min_size=20, max_size=40))
def test_where_two_policies_answer_otherwise_is_told(before: Policy, after: Policy, tried: list[View]) -> None:
    found = places(differ(before, after, PART))
    one, other = CompiledPolicy(before), CompiledPolicy(after)
    for view in tried:
        if said(one.decide(view)) != said(other.decide(view)):
            words = {view.operation.value, f"{view.operation.value}_hard"}
            assert any((word, view.vm_state.value, view.task_state) in found for word in words)


@settings(max_examples=tier(20, 250))
@given(policies())
def test_a_policy_does_not_differ_from_itself_under_other_words(one: Policy) -> None:
    other = policy(
        *(
            msgspec.structs.replace(each, id=f"{each.id}-x", because="Other words.", source="elsewhere:1", fixed=True)
            for each in one.rules
        )
    )
    found = differ(one, other, PART)
    assert not found.any
    assert (found.groups, found.differing) == ((), 0)


@settings(max_examples=tier(20, 250))
@given(policies(), policies())
def test_what_is_told_plainly_is_so_in_every_combination(before: Policy, after: Policy) -> None:
    one, other = CompiledPolicy(before), CompiledPolicy(after)
    for group in differ(before, after, PART).groups:
        if group.condition:
            continue
        for product in group.products:
            for word, state, task in places_of(product):
                view = View(
                    operation=Operation(word.removesuffix("_hard")),
                    vm_state=VmState(state),
                    task_state=task,
                    outstanding=0 if task == NO_TASK else BIT[TASK_OPERATION[task]],
                    hard=word.endswith("_hard"),
                )
                assert (one.decide(view).id, other.decide(view).id) == (group.before.rule, group.after.rule)


@given(
    st.sets(
        st.builds(
            Combination,
            st.sampled_from(["stop", "start", "reboot", "reboot_hard"]),
            st.sampled_from([state.value for state in VmState][:5]),
            st.sampled_from(TASKS[:6]),
        ),
        min_size=1,
    )
)
def test_a_cover_has_every_place_once_and_no_other(wanted: set[Combination]) -> None:
    products = cover(wanted)
    covered = [place for product in products for place in places_of(product)]
    assert len(covered) == len(set(covered)) == sum(product.size for product in products)
    assert set(covered) == {tuple(place) for place in wanted}
    assert [product.size for product in products] == sorted((product.size for product in products), reverse=True)


def test_a_full_product_is_told_as_one() -> None:
    wanted = {
        Combination(*place)
        for place in itertools.product(["stop", "reboot"], ["active", "paused"], ["rebooting", "pausing"])
    }
    assert len(cover(wanted)) == 1


def site(*more: Rule) -> Policy:
    return msgspec.structs.replace(STANDARD, name="site", rules=(*more, *STANDARD.rules))


def test_a_rule_of_a_site_is_told_as_what_it_takes_away() -> None:
    found = differ(STANDARD, site(rule("no-pause", Operation.PAUSE, verdict=Verdict.DENY, reason="never")))
    assert {group.after.rule for group in found.groups} == {"no-pause"}
    assert all(product.operations == ("pause",) for group in found.groups for product in group.products)
    first = found.groups[0]
    assert (first.effect, first.before.rule, first.before.verdict) == (Effect.TIGHTER, "in-turn", Verdict.ADMIT)
    assert first.after.reason == "never"


def test_a_condition_is_told_with_the_difference_that_shows_under_it() -> None:
    found = differ(
        STANDARD,
        site(
            rule("builders", Operation.PAUSE, verdict=Verdict.DENY, tags=frozenset({"build"})),
            rule("quiet", Operation.RESUME, verdict=Verdict.DENY, silent_ms_min=90_000, locked=False),
            rule("admins", Operation.RESCUE, verdict=Verdict.DENY, roles=frozenset({"admin"})),
            rule("new", Operation.SHELVE, verdict=Verdict.DENY, launched=False),
            rule("queued", Operation.BACKUP, verdict=Verdict.DENY, outstanding=frozenset({Operation.RESIZE})),
        ),
    )
    conditions: dict[str, set[str]] = {}
    for group in found.groups:
        if not group.follows:
            conditions.setdefault(group.after.rule, set()).add(group.condition)
    assert conditions["builders"] == {"tagged build"}
    assert conditions["quiet"] == {"after 90s of silence"}
    assert conditions["admins"] == {"by an admin"}
    assert conditions["new"] == {"it has never run"}
    assert conditions["queued"] == {"", "resize is outstanding"}


def test_a_threshold_is_a_difference_of_one_rule_with_itself() -> None:
    patient = tuple(
        msgspec.structs.replace(each, threshold_ms=600_000) if each.id == "delete-again" else each
        for each in STANDARD.rules
    )
    found = differ(STANDARD, msgspec.structs.replace(STANDARD, rules=patient))
    [group] = [group for group in found.groups if not group.follows]
    assert (group.before.rule, group.after.rule, group.effect) == ("delete-again", "delete-again", Effect.TIGHTER)
    assert (group.before.threshold_s, group.after.threshold_s) == (300, 600)
    [product] = group.products
    assert product_text(product) == "delete, force_delete | in any state | while @delete, @force_delete"


@pytest.mark.parametrize(
    ("before", "after", "detail"),
    [
        ({"verdict": Verdict.ADMIT}, {"verdict": Verdict.ADMIT, "in_turn": False}, "in_turn true → false"),
        ({"verdict": Verdict.PREEMPT}, {"verdict": Verdict.PREEMPT, "grace_ms": 30_000}, "grace 10s → 30s"),
        (
            {"verdict": Verdict.AFTER, "threshold_ms": 1000},
            {"verdict": Verdict.AFTER, "threshold_ms": 1000, "measured_from": MeasuredFrom.TASK_STARTED},
            "measured_from last_progress → task_started",
        ),
        (
            {"verdict": Verdict.AFTER, "threshold_ms": 1000},
            {"verdict": Verdict.AFTER, "threshold_ms": 1000, "before": Before.REDUNDANT},
            "before deny → redundant",
        ),
        (
            {"verdict": Verdict.ADMIT, "served_at_most_ms": 120_000},
            {"verdict": Verdict.ADMIT, "served_at_most_ms": 0},
            "served_at_most 120s → unlimited",
        ),
        (
            {"verdict": Verdict.ADMIT},
            {"verdict": Verdict.ADMIT, "served_at_most_ms": 120_000},
            "served_at_most default → 120s",
        ),
    ],
)
def test_what_a_verdict_does_is_compared_too(before: dict[str, Any], after: dict[str, Any], detail: str) -> None:
    found = differ(policy(rule("x", **before)), policy(rule("x", **after)))
    assert [group.details for group in found.groups] == [(detail,)]
    assert found.groups[0].effect is Effect.OTHER


def test_how_many_may_be_outstanding_is_compared() -> None:
    found = differ(policy(rule("x")), policy(rule("x"), outstanding_max=3))
    assert found.outstanding_max == (16, 3)
    assert found.any


def test_a_part_of_the_matrix_is_compared_alone() -> None:
    found = differ(STANDARD, load("take2"), Selection(vm_states=frozenset({VmState.ACTIVE})))
    assert found.combinations * len(VmState) == differ(STANDARD, STANDARD).combinations
    assert {state for _, state, _ in places(found)} == {"active"}


def test_very_different_policies_are_told_in_seconds_and_in_groups() -> None:
    found = differ(STANDARD, load("take2"))
    assert found.complete
    assert found.differing > 20_000
    assert len(found.groups) < found.differing / 20
    assert places(found)


@pytest.mark.long
@pytest.mark.parametrize("other", ["propolis", "nova"])
def test_the_other_built_in_policies_are_compared_completely_too(other: str) -> None:
    assert differ(STANDARD, load(other)).complete


def test_what_needs_many_circumstances_at_once_is_found() -> None:
    conditions: dict[str, Any] = {
        "locked": True,
        "launched": False,
        "host_reachable": False,
        "roles": frozenset({"admin"}),
        "tags": frozenset({"a"}),
        "silent_ms_min": 1000,
        "held": frozenset({Operation.STOP}),
    }
    # Each condition is named by a rule of its own that decides nothing otherwise, and all of them matter at once.
    others = tuple(
        rule(f"not-{name}", verdict=Verdict.ADMIT, **{name: value})
        for name, value in (
            ("locked", False),
            ("launched", True),
            ("host_reachable", True),
            ("roles", frozenset({"member", "reader"})),
        )
    )
    last = {name: conditions[name] for name in ("tags", "silent_ms_min", "held")}
    found = differ(
        policy(*others, rule("admitted", verdict=Verdict.ADMIT)),
        policy(*others, rule("refused", verdict=Verdict.DENY, **last), rule("admitted", verdict=Verdict.ADMIT)),
        PART,
    )
    assert found.complete
    assert {group.after.rule for group in found.groups} == {"refused"}
    [condition] = {group.condition for group in found.groups}
    assert set(condition.split(", ")) == {
        "by an admin",
        "the instance is locked",
        "it has never run",
        "the host is unreachable",
        "tagged a",
        "after 1s of silence",
        "stop is held",
    }


def test_policies_of_many_rules_are_compared_within_bounds_and_what_is_left_out_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(differences, "WORK_MAX", 100_000)
    many = tuple(
        rule(
            f"r{number}",
            verdict=Verdict.DENY,
            tags=frozenset({f"t{number}"}),
            roles=frozenset({"admin"}),
            silent_ms_min=1000 * (number + 1),
            reason=f"r{number}",
        )
        for number in range(300)
    )
    found = differ(policy(rule("x")), policy(*many, rule("x")), PART)
    assert not found.complete
    assert found.any
    assert found.differing == found.combinations
    assert {group.after.rule for group in found.groups} <= {each.id for each in many}


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("COLUMNS", "100")
    text = '[policy]\nname = "site"\nextends = "standard"\n\n[[rule]]\nid = "no-pause"\noperations = ["pause"]\n'
    (tmp_path / "site.toml").write_text(f'{text}verdict = "deny"\nreason = "never"\n')

    def call(*arguments: str) -> tuple[int, str, str]:
        named = [str(tmp_path / "site.toml") if each == "site" else each for each in arguments]
        code = run(policy_commands, ["diff", *named], {})
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_command_ends_like_diff(diff: Any) -> None:
    assert diff("standard", "standard")[0] == 0
    assert "they answer alike in all" in diff("standard", "standard")[1]
    assert diff("standard", "site")[0] == 1
    code, _out, err = diff("standard", "nope")
    assert (code, err.splitlines()[0]) == (2, "Error: Built-in policy 'nope' not found.")


def test_the_command_tells_groups_and_not_rows(diff: Any) -> None:
    code, out, err = diff("standard", "site")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].startswith("standard → site: ")
    assert "- admit → deny (never)" in lines
    assert "    pause-suspend → no-pause, in 1 combination" in lines
    assert "      pause | in active | with no task" in lines
    assert max(map(len, lines)) <= 100
    assert len(lines) < 100
    assert len(diff("standard", "site", "--all")[1].splitlines()) > len(lines)


def test_json_has_all_of_it(diff: Any) -> None:
    code, out, _err = diff("standard", "site", "--json")
    document = json.loads(out)
    assert code == 1
    assert document["after"]["name"] == "site"
    assert {group["after"]["rule"] for group in document["groups"]} == {"no-pause"}
