"""Thresholds from recorded history: the bound, what is measured, and what is made of it."""

from __future__ import annotations

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from benchmarks.recorded_history import Plan, record_history
from interlock.core.durations import parse_duration
from interlock.core.errors import Invalid
from interlock.core.operations import TASK_OPERATION, Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import Request, Status
from interlock.policies.history.suggested_policies import policy_text, shown, titled, written
from interlock.policies.history.threshold_advisor import (
    THRESHOLD_MIN_MS,
    Aim,
    Measures,
    Proposal,
    Recorded,
    ServiceRow,
    Suggestion,
    Watch,
    measure,
    rank_of_bound,
    rank_of_percentile,
    record,
    rounded_up,
    suggest,
    values_needed,
    watches_of,
)
from interlock.policies.history.threshold_plot import draw
from interlock.policies.language.loader import builtin_names, load, read
from interlock.stores.history import History

O = Operation  # noqa: E741
LAST, STARTED = MeasuredFrom.LAST_PROGRESS, MeasuredFrom.TASK_STARTED
STOPPING = Watch(O.STOP, ("powering_off", "powering_off_hard"), LAST)
REBOOTING = tuple(phase for phase, operation in TASK_OPERATION.items() if operation is O.REBOOT)


# ------------------------------------------------------------------------------------------------------------ the bound


def below(count: int, share: Fraction, rank: int) -> Fraction:
    """The probability that fewer than `rank` of `count` values lie below the percentile, counted out exactly."""
    return sum(
        (math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(rank)),
        start=Fraction(0),
    )


@given(st.integers(1, 150), st.integers(50, 99), st.integers(50, 99))
def test_the_bound_is_the_first_rank_that_is_sure_enough(count: int, percentile: int, confidence: int) -> None:
    share, sure = Fraction(percentile, 100), Fraction(confidence, 100)
    rank = rank_of_bound(count, percentile / 100, confidence / 100)
    slack = Fraction(1, 10**9)
    if rank is None:
        assert below(count, share, count) < sure + slack
        return
    assert below(count, share, rank) >= sure - slack
    assert rank == 1 or below(count, share, rank - 1) < sure + slack


@given(st.floats(50, 99.9), st.floats(50, 99.9))
def test_so_many_values_are_needed_and_not_one_fewer(percentile: float, confidence: float) -> None:
    share, sure = percentile / 100, confidence / 100
    needed = values_needed(share, sure)
    assert rank_of_bound(needed + 1, share, sure) is not None
    assert needed < 2 or rank_of_bound(needed - 1, share, sure) is None


@pytest.mark.parametrize(("share", "confidence", "needed"), [(0.99, 0.95, 299), (0.95, 0.95, 59), (0.9, 0.9, 22)])
def test_the_numbers_that_every_table_has(share: float, confidence: float, needed: int) -> None:
    """Of Wilks (1941): 59 values bound the 95th percentile with 95 % confidence."""
    assert values_needed(share, confidence) == needed
    assert rank_of_bound(needed, share, confidence) == needed


def test_the_bound_holds_as_often_as_it_says() -> None:
    chance, holds, rounds = Random(11), 0, 2_000
    truth = math.exp(1.2815515655446004)  # the 90th percentile of exp(N(0, 1))
    rank = rank_of_bound(200, 0.9, 0.9)
    assert rank is not None
    for _ in range(rounds):
        values = sorted(chance.lognormvariate(0, 1) for _ in range(200))
        holds += values[rank - 1] >= truth
    assert 0.88 < holds / rounds < 0.96


def test_millions_of_values_are_bounded_at_once() -> None:
    rank = rank_of_bound(5_000_000, 0.99, 0.95)
    assert rank is not None
    normal = 4_950_000 + 1.6449 * math.sqrt(5_000_000 * 0.99 * 0.01)
    assert abs(rank - normal) < 3


@pytest.mark.parametrize(("count", "share", "rank"), [(1, 0.5, 1), (100, 0.99, 99), (101, 0.99, 100), (10, 0.5, 5)])
def test_the_percentile_of_what_was_recorded_is_the_nearest_rank(count: int, share: float, rank: int) -> None:
    assert rank_of_percentile(count, share) == rank


# -------------------------------------------------------------------------------------------------- what is measured


def told(kind: str, at_ms: int, request: str | None = "r", **data: Any) -> ServiceRow:
    return (request, kind, at_ms, json.dumps(data))


def taken(at_ms: int, operation: Operation, phase: str, request: str = "r") -> ServiceRow:
    return told("request.taken", at_ms, request, operation=operation.value, phase=phase, fence=0)


def measured(rows: list[ServiceRow], watch: Watch) -> Measures:
    return measure(rows, [watch])[watch]


def reboot(*, ends: str = "request.succeeded") -> list[ServiceRow]:
    return [
        taken(1_000, O.REBOOT, "rebooting"),
        told("request.progress", 4_000, operation="reboot", phase="reboot_pending"),
        told("request.progress", 4_500, operation="reboot", phase="reboot_pending", detail="…"),
        told("request.progress", 12_500, operation="reboot", phase="reboot_started"),
        told(ends, 15_000, operation="reboot"),
    ]


@pytest.mark.parametrize(
    ("phases", "measured_from", "value"),
    [
        (REBOOTING, LAST, 8_000),
        (("rebooting",), LAST, 3_000),
        (("reboot_started",), LAST, 2_500),
        (REBOOTING, STARTED, 14_000),
        (("rebooting", "reboot_pending"), STARTED, 11_500),
        (("rebooting_hard",), LAST, None),
    ],
)
def test_a_rule_measures_only_while_it_holds(
    phases: tuple[str, ...], measured_from: MeasuredFrom, value: int | None
) -> None:
    found = measured(reboot(), Watch(O.REBOOT, phases, measured_from))
    assert list(found.values_ms) == ([] if value is None else [value])


@pytest.mark.parametrize("end", ["failed", "cancelled", "superseded"])
def test_only_what_succeeded_is_healthy_and_the_rest_is_counted(end: str) -> None:
    found = measured(reboot(ends=f"request.{end}"), Watch(O.REBOOT, REBOOTING, LAST))
    counted = {"failed": found.failed, "cancelled": found.cancelled, "superseded": found.superseded}
    assert list(found.values_ms) == []
    assert counted == {name: int(name == end) for name in counted}


def test_what_began_before_the_history_or_has_not_ended_is_no_measure() -> None:
    assert list(measured(reboot()[1:], Watch(O.REBOOT, REBOOTING, LAST)).values_ms) == []
    assert list(measured(reboot()[:-1], Watch(O.REBOOT, REBOOTING, LAST)).values_ms) == []


def test_a_restart_of_the_server_ends_a_silence_that_nobody_kept() -> None:
    rows = [
        taken(0, O.STOP, "powering_off"),
        told("instance.adopted", 600_000, None, fence=1, requests=["r", "another"]),
        told("request.succeeded", 602_000, operation="stop"),
    ]
    assert list(measured(rows, STOPPING).values_ms) == [2_000]
    whole = measured(rows, Watch(O.STOP, STOPPING.phases, STARTED))
    assert (list(whole.values_ms), whole.adopted) == ([], 1)


def test_requests_of_different_instances_are_told_apart() -> None:
    rows = [
        taken(0, O.STOP, "powering_off", "a"),
        taken(1_000, O.STOP, "powering_off", "b"),
        told("request.succeeded", 5_000, "b", operation="stop"),
        told("request.succeeded", 9_000, "a", operation="stop"),
    ]
    assert sorted(measured(rows, STOPPING).values_ms) == [4_000, 9_000]


@pytest.mark.parametrize("data", ["", "[]", '{"operation": 7}', "{"])
def test_an_event_that_cannot_be_read_measures_nothing(data: str) -> None:
    rows: list[ServiceRow] = [("r", "request.taken", 0, data), told("request.succeeded", 5, operation="stop")]
    assert list(measured(rows, STOPPING).values_ms) == []


def rule(**how: Any) -> Rule:
    return Rule(**{"id": "r", "operations": frozenset(O), "verdict": Verdict.AFTER, "threshold_ms": 60_000, **how})


def test_a_rule_takes_over_from_the_operations_of_its_task_states() -> None:
    two = rule(task_states=frozenset({"powering_off", "pausing", "rebooting"}), measured_from=STARTED)
    assert watches_of(two) == (
        Watch(O.STOP, ("powering_off",), STARTED),
        Watch(O.REBOOT, ("rebooting",), STARTED),
        Watch(O.PAUSE, ("pausing",), STARTED),
    )
    assert watches_of(rule(verdict=Verdict.DENY, threshold_ms=None)) == ()


def test_a_rule_about_no_task_takes_over_from_component_changes() -> None:
    components = frozenset({O.ATTACH_VOLUME, O.SWAP_VOLUME})
    found = watches_of(rule(task_states=frozenset({"none"}), outstanding=components))
    assert {watch.operation for watch in found} == components
    anything = {watch.operation for watch in watches_of(rule())}
    assert {O.ATTACH_VOLUME, O.DELETE, O.STOP} <= anything
    assert O.LOCK not in anything


# ---------------------------------------------------------------------------------------------- what is made of it


def policy(*rules: Rule) -> Policy:
    return Policy(name="today", rules=rules)


def filled(of: Policy, values: dict[Operation, list[int]]) -> Recorded:
    recorded = {watch: Measures() for rule in of.rules for watch in watches_of(rule)}
    for watch, found in recorded.items():
        found.values_ms.extend(values.get(watch.operation, []))
    return recorded


def proposed(of: Policy, values: dict[Operation, list[int]], **aim: float) -> Proposal:
    (proposal,) = suggest(of, filled(of, values), Aim(**aim)).proposals
    return proposal


STOP_RULE = rule(task_states=frozenset({"powering_off"}))
BOTH_RULE = rule(task_states=frozenset({"powering_off", "pausing"}))


def test_the_threshold_is_the_bound_times_the_factor_rounded_up() -> None:
    values = list(range(10, 10_010, 10))  # 1000 values; the bound of the 99th percentile is the 996th
    assert rank_of_bound(1000, 0.99, 0.95) == 996
    found = proposed(policy(STOP_RULE), {O.STOP: values}, factor=2)
    assert (found.proposed_ms, found.changed) == (20_000, True)
    assert proposed(policy(STOP_RULE), {O.STOP: values}, factor=6).proposed_ms == 60_000


def test_it_says_how_many_healthy_operations_a_threshold_would_have_cut_short() -> None:
    values = [1_000] * 990 + [70_000] * 5 + [400_000] * 5
    found = proposed(policy(STOP_RULE), {O.STOP: values}, factor=1, percentile=95)
    assert (found.proposed_ms, found.healthy) == (THRESHOLD_MIN_MS, 1000)
    assert (found.cut_short_today, found.cut_short) == (10, 10)
    assert proposed(policy(STOP_RULE), {O.STOP: [60_000, 59_999]}).cut_short_today == 1


def test_with_too_few_nothing_is_proposed_and_it_says_how_many_it_takes() -> None:
    today = policy(STOP_RULE)
    suggestion = suggest(today, filled(today, {O.STOP: [100] * 298}))
    assert (suggestion.needed, suggestion.findings[0].bound_ms, suggestion.findings[0].proposed_ms) == (299, None, None)
    assert suggestion.findings[0].cut_short == 0
    assert (suggestion.proposals[0].unknown, suggestion.proposals[0].changed) == (("stop",), False)
    assert suggest(today, filled(today, {O.STOP: [100] * 299})).proposals[0].changed


def test_one_unknown_operation_keeps_a_threshold_from_being_lowered_but_not_from_being_raised() -> None:
    quick, slow = [1_000] * 400, [50_000] * 400
    assert proposed(policy(BOTH_RULE), {O.STOP: quick}).proposed_ms == 60_000
    assert proposed(policy(BOTH_RULE), {O.STOP: slow}).proposed_ms == 150_000
    assert proposed(policy(BOTH_RULE), {O.STOP: quick, O.PAUSE: quick}).proposed_ms == 5_000
    assert proposed(policy(BOTH_RULE), {O.STOP: quick, O.PAUSE: slow}).proposed_ms == 150_000


def test_a_threshold_stays_above_its_own_silence_and_the_least() -> None:
    silent = rule(task_states=frozenset({"powering_off"}), silent_ms_min=15_000)
    assert proposed(policy(silent), {O.STOP: [10] * 400}).proposed_ms == 20_000
    assert proposed(policy(STOP_RULE), {O.STOP: [10] * 400}).proposed_ms == THRESHOLD_MIN_MS


def test_nothing_is_proposed_for_a_fixed_rule() -> None:
    fixed = rule(id="settled", task_states=frozenset({"powering_off"}), fixed=True)
    suggestion = suggest(policy(fixed), filled(policy(fixed), {O.STOP: [10] * 400}))
    assert (suggestion.proposals, suggestion.fixed) == ((), ("settled",))


@given(st.integers(0, 10**8))
def test_thresholds_are_rounded_up_to_what_somebody_would_write(milliseconds: int) -> None:
    found = rounded_up(milliseconds)
    assert found >= max(milliseconds, THRESHOLD_MIN_MS)
    step = 1_000 if found <= 15_000 else 5_000 if found <= 60_000 else 15_000 if found <= 300_000 else 60_000
    assert found % step == 0
    assert found - max(milliseconds, THRESHOLD_MIN_MS) < step
    assert parse_duration(written(found)) == found


@pytest.mark.parametrize(("ms", "text"), [(0, "0ms"), (780, "780ms"), (23_935, "23.9s"), (107_018, "1m47s")])
def test_measured_times_are_shown_to_three_digits(ms: int, text: str) -> None:
    assert shown(ms) == text


@pytest.mark.parametrize("aim", [Aim(percentile=100), Aim(percentile=10), Aim(confidence=100), Aim(factor=0.5)])
def test_an_aim_that_is_none_is_refused(aim: Aim) -> None:
    with pytest.raises(Invalid, match="must be from"):
        suggest(policy(STOP_RULE), filled(policy(STOP_RULE), {}), aim)


@pytest.mark.parametrize(
    "aim", [Aim(percentile=50, confidence=50, factor=1), Aim(percentile=99.999, confidence=99.999, factor=1_000)]
)
def test_an_aim_at_the_bounds_is_accepted(aim: Aim) -> None:
    aim.check()


# ------------------------------------------------------------------------------------------------------- end to end


class Known:
    """Durations that are remembered as they are drawn: uniform, so that their percentiles are known."""

    def __init__(self) -> None:
        self.drawn: dict[str, list[int]] = defaultdict(list)

    def __call__(self, request: Request, chance: Random) -> int:
        lasts_ms = chance.randrange(1_000, 11_000)
        self.drawn[request.id].append(lasts_ms)
        return lasts_ms


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[History, Known]]:
    durations = Known()
    path = tmp_path_factory.mktemp("known") / "interlock.db"
    asked_for = ((O.START, 10), (O.STOP, 10), (O.REBOOT, 12), (O.PAUSE, 1), (O.UNPAUSE, 1))
    plan = Plan(submissions=6_000, instances=50, durations=durations, between_ms=90_000, asked_for=asked_for)
    record_history(path, CompiledPolicy(load("standard")), plan)
    with History(path) as history:
        yield history, durations


def standard_suggestion(history: History, **aim: float) -> tuple[Suggestion, Recorded]:
    recorded = record(history.service(), load("standard"))
    return suggest(load("standard"), recorded, Aim(**aim)), recorded


def test_what_is_measured_of_a_recorded_history_is_what_was_drawn_for_it(known: tuple[History, Known]) -> None:
    history, durations = known
    _, recorded = standard_suggestion(history)
    rows: list[Any] = history._connection.execute("SELECT id, operation, body FROM requests").fetchall()
    for operation in (O.START, O.STOP, O.REBOOT):
        ended = {
            request_id
            for request_id, name, body in rows
            if name == operation.value and json.loads(body)["status"] == Status.SUCCEEDED.value
        }
        watch = next(one for one in recorded if one.operation is operation and one.measured_from is LAST and one.whole)
        expected = sorted(max(durations.drawn[request_id]) for request_id in ended)
        assert sorted(recorded[watch].values_ms) == expected
        assert len(expected) > 400


def test_the_proposals_are_those_of_the_known_distribution(known: tuple[History, Known]) -> None:
    suggestion, _ = standard_suggestion(known[0], percentile=90, confidence=90, factor=2)
    stop = next(one for one in suggestion.findings if one.operation == "stop" and one.all_phases)
    assert stop.bound_ms is not None
    assert stop.median_ms is not None
    assert abs(stop.median_ms - 6_000) < 600
    # The 90th percentile of the uniform distribution from 1 to 11 seconds.
    assert 9_700 <= stop.bound_ms <= 10_600
    proposals = {one.rule: one for one in suggestion.proposals}
    assert proposals["again-power.stop"].proposed_ms == rounded_up(2 * stop.bound_ms)
    assert proposals["again-power.stop"].cut_short == 0
    assert not proposals["silent-power.stop"].changed
    assert {"create", "soft_delete"} == set(proposals["silent-power.stop"].unknown)


def test_the_file_says_its_numbers_and_is_a_policy(known: tuple[History, Known], tmp_path: Path) -> None:
    suggestion, _ = standard_suggestion(known[0])
    text = policy_text(suggestion, "standard", "a week")
    document = tomllib.loads(text)
    assert document["policy"] == {"name": "standard-suggested", "extends": "standard"}
    proposals = {one.rule: one for one in suggestion.proposals}
    assert document["thresholds"]
    for key, value in document["thresholds"].items():
        assert parse_duration(value) == proposals[key].proposed_ms
    stop = next(one for one in suggestion.findings if one.operation == "stop" and one.all_phases)
    assert f"99 % of {stop.healthy} healthy ones" in text.replace("\n# ", " ")
    assert "too few were recorded of" in text.replace("\n# ", " ")
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_file_loads_and_has_the_proposed_thresholds(known: tuple[History, Known], tmp_path: Path) -> None:
    suggestion, _ = standard_suggestion(known[0])
    file = tmp_path / "suggested.toml"
    file.write_text(policy_text(suggestion, "standard", "a week"))
    before = {rule.id: rule.threshold_ms for rule in load("standard").rules}
    after = {rule.id: rule.threshold_ms for rule in read(file).policy.rules}
    changed = {rule: threshold for rule, threshold in after.items() if threshold != before[rule]}
    assert changed == {one.rule: one.proposed_ms for one in suggestion.proposals if one.changed}


@pytest.mark.parametrize("name", builtin_names())
def test_every_built_in_can_be_measured_and_its_file_loads(
    known: tuple[History, Known], name: str, tmp_path: Path
) -> None:
    recorded = record(known[0].service(), load(name))
    file = tmp_path / "suggested.toml"
    file.write_text(policy_text(suggest(load(name), recorded), name, "a week"))
    assert read(file).policy.name == f"{name}-suggested"


def test_a_family_with_one_threshold_is_written_once() -> None:
    family = [proposal_of(f"again.{name}", 9_000, "f:1") for name in ("stop", "start")]
    other = [proposal_of("again.pause", 9_000, "f:2"), proposal_of("single", 9_000, "f:3")]
    assert [title for title, _ in titled([*family, *other], [*family, *other])] == ["again", "again.pause", "single"]
    unlike = [family[0], proposal_of("again.start", 8_000, "f:1")]
    assert [title for title, _ in titled(unlike, unlike)] == ["again.stop", "again.start"]
    assert [title for title, _ in titled(family[:1], family)] == ["again.stop"]


def proposal_of(name: str, proposed_ms: int, source: str) -> Proposal:
    return Proposal(
        rule=name,
        today_ms=60_000,
        proposed_ms=proposed_ms,
        measured_from=LAST,
        operations=(),
        unknown=(),
        healthy=0,
        cut_short_today=0,
        cut_short=0,
        source=source,
    )


def test_a_name_cannot_end_the_comment_or_the_string_that_it_stands_in() -> None:
    today = Policy(name='a"b\n[[rule]]\u2028\x7f#', rules=(STOP_RULE,))
    suggestion = suggest(today, filled(today, {O.STOP: [10] * 400}))
    document = tomllib.loads(policy_text(suggestion, 'odd"\\name.toml', "x\ny"))
    assert document["policy"]["name"] == 'a"b\n[[rule]]\u2028\x7f#-suggested'
    assert document["policy"]["extends"] == 'odd"\\name.toml'
    assert set(document) == {"policy", "thresholds"}


# ------------------------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize(
    ("name", "begins"),
    [("a.png", b"\x89PNG\r\n"), ("a.svg", b"<?xml"), ("a.html", b"<!DOCTYPE html>"), ("A.PNG", b"\x89")],
)
def test_the_picture_is_of_the_kind_that_its_name_says(
    known: tuple[History, Known], tmp_path: Path, name: str, begins: bytes
) -> None:
    suggestion, recorded = standard_suggestion(known[0])
    drawn = draw(suggestion, recorded, tmp_path / name)
    assert drawn == sum(one.healthy > 0 for one in suggestion.findings) >= 4
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_picture_of_nothing_and_of_no_kind_is_refused(tmp_path: Path) -> None:
    empty = suggest(policy(STOP_RULE), filled(policy(STOP_RULE), {}))
    with pytest.raises(Invalid, match="nothing to draw"):
        draw(empty, filled(policy(STOP_RULE), {}), tmp_path / "a.png")
    with pytest.raises(Invalid, match="no kind of picture"):
        draw(empty, {}, tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_one_value_and_a_silence_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    today = policy(STOP_RULE)
    recorded = filled(today, {O.STOP: [0]})
    assert draw(suggest(today, recorded), recorded, tmp_path / "a.png") == 1


def test_what_the_lines_mean_has_room_below_one_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    today = policy(STOP_RULE)
    recorded = filled(today, {O.STOP: [0]})
    draw(suggest(today, recorded), recorded, tmp_path / "a.png")
    (figure,) = figures
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert 0 <= place.x0 < place.x1 <= figure.bbox.x1
