"""The condition `within`: weekly time windows, resolved to the store's clock."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import msgspec
import pytest
from policy_samples import START_MS, instance
from test_requested_by import ROBOTS, asked, written

from interlock.core import lifecycle
from interlock.core.admission import admit, judge
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Denied, Held, Instance, Outcome, Redundant, Status
from interlock.core.request_queue import replace
from interlock.core.states import VmState
from interlock.policies.explanation import explain, ways
from interlock.policies.history.replay import replay
from interlock.policies.language.loader import load
from interlock.policies.lint import check
from interlock.policies.model_checker import explore
from interlock.policies.rehearsal.runner import rehearse
from interlock.policies.time_windows import calendar, resolved

O = Operation  # noqa: E741
V = VmState
BERLIN = "Sat,Sun 02:00-06:00 Europe/Berlin"
FREEZE = "Fri 18:00-Mon 06:00 Europe/Berlin"
HOUR_MS = 3_600_000


def at(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def intervals(window: str, around: str) -> str:
    """The intervals of a window in the week from a time on, as times of UTC."""
    now_ms = at(around)
    spans = calendar([window], now_ms, 0).intervals[window]
    near = [span for span in spans if now_ms <= span[0] < now_ms + 7 * 24 * HOUR_MS]
    return ", ".join("-".join(f"{datetime.fromtimestamp(ms / 1000, UTC):%a %H:%M}" for ms in span) for span in near)


@pytest.mark.parametrize(
    ("window", "around", "expected"),
    [
        (BERLIN, "2026-01-05T00:00Z", "Sat 01:00-Sat 05:00, Sun 01:00-Sun 05:00"),
        (BERLIN, "2026-07-06T00:00Z", "Sat 00:00-Sat 04:00, Sun 00:00-Sun 04:00"),
        (FREEZE, "2026-01-05T00:00Z", "Fri 17:00-Mon 05:00"),
        ("Mon,Tue 22:00-02:00 UTC", "2026-01-05T00:00Z", "Mon 22:00-Tue 02:00, Tue 22:00-Wed 02:00"),
        ("Mon-Sun 00:00-24:00 UTC", "2026-01-05T00:00Z", ""),  # one interval, which began before
        ("Sun-Mon 12:00-13:00 UTC", "2026-01-05T00:00Z", "Mon 12:00-Mon 13:00, Sun 12:00-Sun 13:00"),
    ],
)
def test_a_weekly_window_is_resolved_in_its_time_zone(window: str, around: str, expected: str) -> None:
    assert intervals(window, around) == expected


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("Sun 01:00-04:00 Europe/Berlin", "Sun 00:00-Sun 02:00"),  # an hour is missing
        ("Sun 02:30-04:00 Europe/Berlin", "Sun 01:30-Sun 02:00"),  # begins at a time that is skipped
        ("Sun 02:00-03:00 Europe/Berlin", ""),  # all of it is skipped
    ],
)
def test_when_clocks_go_forward_a_skipped_time_counts_with_the_offset_before(window: str, expected: str) -> None:
    assert intervals(window, "2026-03-23T00:00Z") == expected


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("Sun 01:00-04:00 Europe/Berlin", "Sat 23:00-Sun 03:00"),  # an hour more
        ("Sun 02:15-02:45 Europe/Berlin", "Sun 00:15-Sun 01:45"),  # from the first to the second
    ],
)
def test_when_clocks_go_back_a_window_lasts_from_the_first_start_to_the_last_end(window: str, expected: str) -> None:
    assert intervals(window, "2026-10-19T00:00Z") == expected


def frozen(words: list[str], verdict: str = "deny") -> CompiledPolicy:
    text = ROBOTS.replace('requested_by = ["ci-*", "mallory"]', f"within = {json.dumps(words)}")
    return CompiledPolicy(written(text.replace('"deny"', f'"{verdict}"')))


def on(policy: CompiledPolicy, wall: str) -> CompiledPolicy:
    """The policy where `START_MS` on the store's clock is a time of the wall clock."""
    return resolved(policy, START_MS, at(wall) - START_MS)


def answered(policy: CompiledPolicy, there: Instance | None = None) -> Admitted | Redundant | Denied | Held:
    return judge(there or instance(V.ACTIVE), asked("alice"), policy, START_MS)


def test_a_refusal_in_a_freeze_window_names_its_end() -> None:
    answer = answered(on(frozen([FREEZE]), "2026-12-05T12:00+01:00"))
    assert isinstance(answer, Denied)
    assert answer.rule == "robots"
    assert answer.allowed_at_ms == START_MS + at("2026-12-07T06:00+01:00") - at("2026-12-05T12:00+01:00")
    assert isinstance(answered(on(frozen([FREEZE]), "2026-12-08T12:00+01:00")), Admitted)


def test_a_refusal_outside_of_office_hours_names_the_next_morning_across_a_change_of_clocks() -> None:
    office = "!Mon-Fri 08:00-18:00 Europe/Berlin"
    friday, monday = "2026-03-27T18:00+01:00", "2026-03-30T08:00+02:00"
    answer = answered(on(frozen([office]), friday))
    assert isinstance(answer, Denied)
    assert answer.allowed_at_ms == START_MS + at(monday) - at(friday)
    assert isinstance(answered(on(frozen([office]), "2026-03-30T08:00+02:00")), Admitted)
    assert isinstance(answered(on(frozen([office]), "2026-03-30T07:59:59+02:00")), Denied)


def test_a_time_in_one_window_is_not_named_if_another_forbids_it_then() -> None:
    policy = on(frozen([FREEZE, "Mon 05:00-12:00 UTC"]), "2026-12-05T12:00+00:00")
    answer = answered(policy)
    assert isinstance(answer, Denied)
    assert answer.allowed_at_ms == START_MS + at("2026-12-07T12:00+00:00") - at("2026-12-05T12:00+00:00")


def test_a_held_request_is_admitted_when_the_window_ends() -> None:
    policy = on(frozen([FREEZE]), "2026-12-05T12:00+01:00")
    held = admit(instance(V.ACTIVE), replace(asked("alice"), hold_ms=72 * HOUR_MS), policy, START_MS)
    assert isinstance(held.answer, Held)
    due_ms = lifecycle.next_deadline_ms(lifecycle.expire(held.instance, policy, START_MS).instance)
    assert due_ms == START_MS + 42 * HOUR_MS
    before = lifecycle.expire(held.instance, policy, due_ms - 1)
    assert before.instance.held
    after = lifecycle.expire(held.instance, policy, due_ms)
    assert [one.status for one in after.requests] == [Status.QUEUED]


def test_a_queued_request_is_judged_again_with_the_windows_of_its_submission() -> None:
    """A stop that was submitted in time is served, although its turn comes in the freeze."""
    policy = on(frozen([FREEZE]), "2026-12-04T17:59+01:00")
    stopping = admit(instance(V.ACTIVE), asked("alice", O.PAUSE), policy, START_MS).instance
    queued = admit(stopping, replace(asked("alice"), request_id="r2"), policy, START_MS).instance
    taken = lifecycle.take(queued, None, START_MS).instance
    later_ms = START_MS + HOUR_MS
    ended = lifecycle.finish(taken, "r1", taken.outstanding[0].fence, Outcome.FAILED, policy, later_ms)
    assert [request.operation for request in ended.instance.outstanding] == [O.STOP]
    assert isinstance(judge(instance(V.ACTIVE), asked("alice"), policy, later_ms), Denied)


def test_an_explanation_names_the_window_and_when_it_ends() -> None:
    policy = on(frozen([FREEZE]), "2026-12-05T12:00+01:00")
    tried = next(
        one for one in explain(instance(V.ACTIVE), asked("alice"), policy, START_MS).tried if one.rule == "robots"
    )
    assert tried.failed is None
    found = ways(instance(V.ACTIVE), asked("alice"), policy, START_MS)
    assert next(way for way in found if way.turn == "time").at_ms == START_MS + 42 * HOUR_MS
    later = next(
        one
        for one in explain(instance(V.ACTIVE), asked("alice"), policy, START_MS + 43 * HOUR_MS).tried
        if one.rule == "robots"
    )
    assert later.failed == f"within: wants {FREEZE}, found none"


@pytest.mark.parametrize(
    ("window", "wrong"),
    [
        ("Sat 02:00-06:00 Europe/Berln", "Time zone 'Europe/Berln' not found"),
        ("Sat,Sun 18:00-Mon 06:00 UTC", "begins on one day, not on Sat,Sun"),
        ("Sat 25:00-26:00 UTC", "must be a list of 1 to 64 windows"),
        ("Sat 02:00-06:00", "must be a list of 1 to 64 windows"),
    ],
)
def test_a_window_that_cannot_be_is_refused_with_its_place(window: str, wrong: str) -> None:
    with pytest.raises(Exception, match=r"site\.toml:\d+:\d+: ") as refused:
        frozen([window])
    assert wrong in f"{refused.value} {getattr(refused.value, 'remedy', '')}"


def test_policy_check_finds_windows_that_never_or_always_hold() -> None:
    codes = {
        code: [one.rule for one in check(frozen(words).policy) if one.code == code]
        for words, code in (
            ([BERLIN, "!Sat 00:00-Mon 00:00 Europe/Berlin"], "windows-never"),
            (["Mon-Fri 00:00-24:00 UTC", "Sat 00:00-Mon 01:00 UTC"], "windows-always"),
        )
    }
    assert codes == {"windows-never": ["robots"], "windows-always": ["robots"]}
    assert not [one for one in check(frozen([FREEZE]).policy) if one.code.startswith("windows")]


def test_the_model_checker_submits_within_a_window_and_outside_of_it() -> None:
    """What can be deleted in a window only is never stuck; where no moment is left to delete it, it is."""
    text = ROBOTS.replace('["stop", "rebuild"]', '["delete"]')
    some = text.replace('requested_by = ["ci-*", "mallory"]', f'within = ["{FREEZE}"]')
    few = [O.STOP, O.START, O.DELETE]
    assert not explore(CompiledPolicy(written(some)), operations=few, outstanding_max=2).violations
    never = some + some[some.index("[[rule]]") :].replace('"robots"', '"rest"').replace(
        f'["{FREEZE}"]', f'["!{FREEZE}"]'
    )
    assert explore(CompiledPolicy(written(never)), operations=few, outstanding_max=2).violations


def test_a_rehearsal_has_a_clock() -> None:
    lines = [
        '{"instance": {"vm_state": "active", "role": "member", "at": "2026-12-05T12:00:00+01:00"}}',
        '{"submit": "stop", "hold": "3d"}',
        '{"advance": "41h59m"}',
        '{"advance": "1m"}',
        '{"instance": {"vm_state": "active", "at": "12 o\'clock"}}',
        '{"instance": {"vm_state": "active"}}',
        json.dumps({"submit": "stop", "windows": [FREEZE]}),
    ]
    answers = [json.loads(answer) for answer in rehearse(lines, frozen([FREEZE]))]
    assert (answers[1]["disposition"], answers[1]["retry_after"]) == ("held", 42 * 3600)
    assert "admitted" not in answers[2]
    assert answers[3]["admitted"] == {"r1": "stop"}
    assert "expected one such as" in answers[4]["error"]
    assert answers[6]["rule"] == "robots"


def test_a_recorded_submission_is_replayed_with_the_windows_that_were_open_then() -> None:
    answer = admit(instance(V.ACTIVE), asked("alice"), CompiledPolicy(load("standard")), START_MS)
    data = next(msgspec.json.encode(one.data).decode() for one in answer.events if one.kind == "request.admitted")
    times = ("2026-12-04T17:59+01:00", "2026-12-04T18:00+01:00", "2026-12-07T05:59+01:00", "2026-12-07T06:00+01:00")
    rows = [(number, 1, "default", "request.admitted", at(time), data) for number, time in enumerate(times)]
    assert replay(rows, frozen([FREEZE])).totals.refused == 2
