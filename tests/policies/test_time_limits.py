"""`served_at_most`: the total time that a request may be served, so that a time which a refusal names is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from policy_samples import START_MS, Play, instance, said

from interlock.core.errors import PolicyError
from interlock.core.lifecycle import adopt, expire, finish, next_deadline_ms, progress
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Denied, Outcome, Redundant, Request, Status
from interlock.core.states import VmState
from interlock.policies.comparison import differ
from interlock.policies.language.loader import compile_named
from interlock.policies.rehearsal.runner import rehearse

O = Operation  # noqa: E741
MINUTE_MS = 60_000
GRACE_MS = 10_000
BEAT = """
[policy]
name = "beat"
extends = "standard"

[[rule]]
id = "delete-gives-a-minute"
operations = ["delete", "force_delete"]
task_state = ["*", "!none", "!@delete", "!@force_delete"]
verdict = "after"
threshold = "1m"
reason = "in_progress"
because = "A minute without progress is waited for."
"""
DENIED = '[[rule]]\nid = "x"\noperations = ["stop"]\nverdict = "deny"\n'
HALF_AN_HOUR = """
[served_at_most]
snapshot = "30m"
"""


@pytest.fixture
def site(tmp_path: Path) -> Any:
    """Compile a policy from its text."""

    def compiled(text: str) -> CompiledPolicy:
        path = tmp_path / "site.toml"
        path.write_text(text)
        return compile_named(path)

    return compiled


def play(policy: CompiledPolicy, *events: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(answer) for answer in rehearse([json.dumps(event) for event in events], policy)]


SNAPSHOT = ({"instance": {"vm_state": "active"}}, {"submit": "snapshot"}, {"take": "any"})


def test_a_refusal_behind_a_worker_that_may_beat_for_ever_names_a_time_only_if_it_is_silent_until_then(
    site: Any,
) -> None:
    beats = [
        event for _ in range(120) for event in ({"advance": "30s"}, {"progress": "snapshot"}, {"submit": "delete"})
    ]
    answers = [one for one in play(site(BEAT), *SNAPSHOT, *beats) if "disposition" in one][1:]
    assert {(one["disposition"], one["retry_after"]) for one in answers} == {("denied", 60)}
    assert all(one["if_silent"] and "retry_after_latest" not in one for one in answers)


def test_with_a_limit_the_refusal_names_the_latest_time_and_it_is_kept(site: Any) -> None:
    beats = [{"advance": "30s"}, {"progress": "snapshot"}] * 20
    policy = site(BEAT + HALF_AN_HOUR)
    *_, denied, ended, deleted = play(
        policy, *SNAPSHOT, *beats, {"submit": "delete"}, {"advance": "1210s"}, {"submit": "delete"}
    )
    assert (denied["retry_after"], denied["if_silent"], denied["retry_after_latest"]) == (60, True, 1210)
    assert ended["ended"] == {"r1": "failed"}
    assert deleted["disposition"] == "admitted"


@pytest.mark.parametrize(("advance", "left_s"), [("1790s", 20), ("1750s", 60)])
def test_near_its_limit_the_time_is_definite(site: Any, advance: str, left_s: int) -> None:
    *_, denied = play(
        site(BEAT + HALF_AN_HOUR), *SNAPSHOT, {"advance": advance}, {"progress": "snapshot"}, {"submit": "delete"}
    )
    assert (denied["retry_after"], denied["retry_after_latest"]) == (left_s, left_s)
    assert "if_silent" not in denied


def test_a_threshold_from_the_start_of_the_task_is_definite() -> None:
    standard = compile_named("standard")
    stage = Play(standard, instance(VmState.ACTIVE))
    stage.submit(O.REBOOT)
    stage.take()
    answer = stage.submit(O.REBOOT, hard=True)
    assert isinstance(answer, Denied)
    assert (answer.allowed_at_ms, answer.allowed_if_silent) == (START_MS + MINUTE_MS, False)


def test_the_same_again_says_that_it_takes_over_only_without_progress() -> None:
    standard = compile_named("standard")
    stage = Play(standard, instance(VmState.ACTIVE))
    stage.submit(O.PAUSE)
    stage.take()
    answer = stage.submit(O.PAUSE)
    assert isinstance(answer, Redundant)
    assert answer.allowed_if_silent
    assert answer.allowed_latest_at_ms == START_MS + 10 * MINUTE_MS + GRACE_MS


def overdue() -> Play:
    """A pause under `standard` that has been interrupted for its limit, with a stop behind it."""
    stage = Play(compile_named("standard"), instance(VmState.ACTIVE))
    stage.submit(O.PAUSE)
    stage.take()
    stage.submit(O.STOP)
    assert next_deadline_ms(stage.instance) == START_MS + 10 * MINUTE_MS
    stage.advance(10 * MINUTE_MS)
    return stage


def test_what_is_served_too_long_is_interrupted_and_after_a_grace_period_fenced_and_the_queue_goes_on() -> None:
    stage = overdue()
    pause = stage.requests["r1"]
    assert (pause.status, pause.overdue) == (Status.IN_FLIGHT, True)
    assert pause.interrupt_deadline_ms == stage.now_ms + GRACE_MS
    fence = stage.instance.fence
    stage.advance(GRACE_MS)
    ended = stage.requests["r1"]
    assert (ended.status, ended.reason) == (Status.FAILED, "served_too_long")
    assert "10 minutes" in (ended.message or "")
    assert stage.instance.fence == fence + 1
    taken = stage.take()
    assert taken is not None
    assert taken.operation is O.STOP


def test_progress_does_not_postpone_the_limit() -> None:
    stage = Play(compile_named("standard"), instance(VmState.ACTIVE))
    stage.submit(O.PAUSE)
    taken = stage.take()
    assert taken is not None
    for _ in range(60):
        stage.advance(10_000)
        if stage.requests["r1"].overdue:
            break
        change = progress(stage.instance, "r1", taken.fence, stage.now_ms)
        stage.instance = change.instance
    assert stage.now_ms == START_MS + 10 * MINUTE_MS


@pytest.mark.parametrize("outcome", [Outcome.INTERRUPTED, Outcome.FAILED, Outcome.UNTOUCHED])
def test_a_worker_that_stops_in_the_grace_period_ends_its_request_as_failed_for_the_limit(outcome: Outcome) -> None:
    stage = overdue()
    stage.finish("r1", outcome)
    assert (stage.requests["r1"].status, stage.requests["r1"].reason) == (Status.FAILED, "served_too_long")


def test_a_success_in_the_grace_period_is_a_success() -> None:
    stage = overdue()
    stage.finish("r1")
    assert stage.requests["r1"].status is Status.SUCCEEDED


def test_a_deletion_that_preempts_it_meanwhile_supersedes_it() -> None:
    stage = overdue()
    stage.submit(O.DELETE)
    stage.advance(GRACE_MS)
    assert stage.requests["r1"].status is Status.SUPERSEDED


def test_a_state_change_that_fails_for_its_limit_leads_where_its_failure_leads(site: Any) -> None:
    policy = site('[policy]\nname = "x"\nextends = "standard"\n[served_at_most]\nstart = "1h"\n')
    *_, failed = play(
        policy, {"instance": {"vm_state": "stopped"}}, {"submit": "start"}, {"take": "any"}, {"advance": "3610s"}
    )
    assert (failed["vm_state"], failed["ended"]) == ("error", {"r1": "failed"})


def test_the_limit_is_the_one_at_the_admission_and_outlives_a_restart_and_another_policy() -> None:
    stage = Play(compile_named("standard"), instance(VmState.ACTIVE))
    stage.submit(O.PAUSE)
    stage.take()
    adopted = adopt(stage.instance, START_MS + MINUTE_MS).instance
    take2 = compile_named("take2")
    change = expire(adopted, take2, START_MS + 10 * MINUTE_MS)
    (request,) = change.requests
    assert request.overdue
    fenced = expire(change.instance, take2, START_MS + 10 * MINUTE_MS + GRACE_MS)
    assert [one.reason for one in fenced.requests] == ["served_too_long"]


def test_a_rule_has_a_limit_of_its_own_or_none(site: Any) -> None:
    text = """
    [policy]
    name = "x"
    extends = "standard"
    [[rule]]
    id = "admins-pause"
    operations = ["pause"]
    vm_state = ["active"]
    roles = ["admin"]
    verdict = "admit"
    served_at_most = "2m"
    [[rule]]
    id = "dump"
    operations = ["stop"]
    vm_state = ["active"]
    verdict = "admit"
    served_at_most = "unlimited"
    """
    stage = Play(site(text), instance(VmState.ACTIVE))
    assert said(stage.submit(O.PAUSE, role="admin"))[0] == "admitted"  # type: ignore[arg-type]
    assert stage.requests["r1"].served_at_most_ms == 2 * MINUTE_MS
    stage = Play(site(text), instance(VmState.ACTIVE))
    stage.submit(O.STOP)
    assert stage.requests["r1"].served_at_most_ms is None


def test_a_policy_inherits_the_limits_of_the_one_it_extends_and_may_lift_them(site: Any) -> None:
    policy = site(
        '[policy]\nname = "x"\nextends = "standard"\n[served_at_most]\nstop = "unlimited"\nset-password = "1m"\n'
    )
    stage = Play(policy, instance(VmState.ACTIVE))
    for operation in (O.STOP, O.SET_PASSWORD, O.PAUSE):
        stage = Play(policy, instance(VmState.ACTIVE))
        stage.submit(operation)
        assert stage.requests["r1"].served_at_most_ms == {
            O.STOP: None, O.SET_PASSWORD: MINUTE_MS, O.PAUSE: 10 * MINUTE_MS
        }[operation]  # fmt: skip


def test_standard_limits_nothing_that_moves_data() -> None:
    limited = {operation for operation, limit_ms in compile_named("standard").policy.served_at_most.items() if limit_ms}
    moves = {O.SNAPSHOT, O.BACKUP, O.MIGRATE, O.LIVE_MIGRATE, O.EVACUATE, O.RESIZE, O.REBUILD, O.SHELVE, O.UNSHELVE}
    moves |= {O.CREATE, O.START, O.SUSPEND, O.RESUME, O.RESCUE, O.SWAP_VOLUME, O.CRASH_DUMP}
    assert limited.isdisjoint(moves)
    assert {O.PAUSE, O.UNPAUSE, O.STOP, O.REBOOT} <= limited
    assert all(CATALOGUE[operation].lane is not Lane.RECORD for operation in limited)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[served_at_most]\nlock = "1m"', "'lock' is not an operation that is served for a time"),
        ('[served_at_most]\npauze = "1m"', "Did you mean 'pause'"),
        ('[served_at_most]\npause = "0s"', "must be greater than zero"),
        ('[served_at_most]\npause = "never"', "Invalid pause: 'never'"),
        (
            '[[rule]]\nid = "x"\noperations = ["stop"]\nverdict = "deny"\nserved_at_most = "1m"',
            "served_at_most is valid only",
        ),
    ],
)
def test_an_invalid_limit_is_rejected_with_its_place(site: Any, text: str, says: str) -> None:
    with pytest.raises(PolicyError, match=r"site\.toml:\d+:\d+: ") as caught:
        site(f'[policy]\nname = "x"\nextends = "standard"\n{text}\n')
    assert says in f"{caught.value.message} {caught.value.remedy}"


def test_policies_that_differ_in_a_limit_differ(site: Any) -> None:
    standard = compile_named("standard")
    found = differ(standard, site('[policy]\nname = "x"\nextends = "standard"\n[served_at_most]\npause = "5m"\n'))
    assert found.any
    assert found.served_at_most is not None
    assert found.served_at_most[1]["pause"] == 5 * MINUTE_MS


def test_both_in_flight_lose_their_workers_when_one_is_served_too_long() -> None:
    """There is one fence per instance: nothing may build on what a fenced worker left unfinished."""
    stage = Play(compile_named("standard"), instance(VmState.ACTIVE))
    stage.submit(O.REBOOT)
    stage.take()
    stage.submit(O.SWAP_VOLUME)
    assert stage.take(Lane.COMPONENT) is not None
    stage.advance(60 * MINUTE_MS)
    stage.advance(GRACE_MS)
    ended: dict[str, Request] = stage.requests
    assert (ended["r1"].status, ended["r2"].status) == (Status.FAILED, Status.SUPERSEDED)
    late = finish(stage.instance, "r1", 0, Outcome.SUCCEEDED, stage.policy, stage.now_ms)
    assert late.instance is stage.instance
