"""Conditions on what is recorded of the instance."""

from __future__ import annotations

import json

import msgspec
import pytest
from policy_samples import START_MS, instance, serving, site

from interlock.core.admission import admit, judge
from interlock.core.errors import PolicyError
from interlock.core.lifecycle import expire, finish, relabel, take
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Denied, Instance, Outcome, Request, Submission
from interlock.core.request_queue import foresee
from interlock.core.roles import Role
from interlock.core.states import PowerState, VmState
from interlock.policies.comparison import differ
from interlock.policies.explanation import explain
from interlock.policies.lint import check
from interlock.policies.model_checker import explore
from interlock.policies.rehearsal.runner import rehearse

O = Operation  # noqa: E741
V = VmState


def asked(operation: Operation, role: Role = Role.MEMBER, **parameters: object) -> Submission:
    return Submission(request_id="r1", operation=operation, requested_by="alice", role=role, parameters=parameters)


def rule_for(instance: Instance, operation: Operation, policy: CompiledPolicy) -> str:
    return judge(instance, asked(operation), policy, START_MS).rule  # type: ignore[union-attr]


NO_RESTART_AFTER_CRASH = """
[[rule]]
id = "dump-first"
operations = ["start", "rebuild"]
power_state = ["crashed"]
verdict = "deny"
reason = "dump_first"
"""


def test_a_rule_holds_for_what_the_hypervisor_last_reported() -> None:
    policy = site(NO_RESTART_AFTER_CRASH)
    for power_state, holds in ((PowerState.CRASHED, True), (PowerState.NONE, False), (PowerState.RUNNING, False)):
        found = instance(V.ERROR, power_state=power_state)
        assert (rule_for(found, O.START, policy) == "dump-first") is holds
    tried = explain(instance(V.ERROR), asked(O.START), policy, START_MS).tried
    assert {one.rule: one.failed for one in tried}["dump-first"] == "power_state: wants crashed, found none"


def test_behind_other_requests_the_power_state_is_the_one_that_they_lead_to() -> None:
    rule = '[[rule]]\nid = "runs"\noperations = ["start"]\ntask_state = ["none"]\npower_state = ["running"]\n'
    policy = site(rule + 'verdict = "deny"\n')
    assert rule_for(instance(V.ACTIVE, power_state=PowerState.RUNNING), O.START, policy) == "runs"
    stopping = serving(V.ACTIVE, "powering_off", power_state=PowerState.RUNNING)
    assert rule_for(stopping, O.START, policy) == "in-turn"
    rebooting = serving(V.ACTIVE, "rebooting", power_state=PowerState.NONE)
    denied = judge(rebooting, asked(O.START), policy, START_MS)
    assert isinstance(denied, Denied)
    assert (denied.rule, denied.foreseen) == ("runs", True)


def test_a_queued_request_is_judged_again_on_the_power_state_of_the_record() -> None:
    policy = site(NO_RESTART_AFTER_CRASH)
    queued = Request(
        id="r1", instance_id="i1", operation=O.START, requested_by="alice", rule="start", admitted_at_ms=START_MS
    )
    for power_state, left in ((PowerState.NONE, ("r1",)), (PowerState.CRASHED, ())):
        found = instance(V.ERROR, power_state=power_state, outstanding=(queued,))
        after = relabel(found, policy, "alice", START_MS, tags=("x",)).instance
        assert tuple(request.id for request in after.outstanding) == left


def test_what_no_hypervisor_reports_is_refused_with_the_nearest_word() -> None:
    with pytest.raises(PolicyError, match="Unknown power_state 'crash'"):
        site(NO_RESTART_AFTER_CRASH.replace("crashed", "crash"))


def test_the_model_checker_says_that_it_does_not_vary_the_power_state() -> None:
    found = explore(site(NO_RESTART_AFTER_CRASH), operations=[O.START, O.DELETE], outstanding_max=1)
    assert any("(`power_state`)" in one for one in found.assumptions)


# ---------------------------------------------------------------------------------------------------------------- ages

YOUNG = """
[[rule]]
id = "too-young"
operations = ["resize", "shelve"]
age_max = "1h"
verdict = "deny"
reason = "too_young"

[[rule]]
id = "cools-down"
operations = ["start"]
vm_state = ["stopped"]
state_for = "10m"
verdict = "admit"

[[rule]]
id = "cooling"
operations = ["start"]
vm_state = ["stopped"]
task_state = ["none"]
verdict = "deny"
reason = "cooling"
"""
HOUR_MS = 3_600_000


def test_a_denial_for_an_age_names_the_time_at_which_the_request_is_admitted() -> None:
    policy = site(YOUNG)
    young = instance(V.ACTIVE)
    for asked_at_ms in (START_MS, START_MS + HOUR_MS):
        denied = judge(young, asked(O.SHELVE), policy, asked_at_ms)
        assert isinstance(denied, Denied)
        assert (denied.reason, denied.allowed_at_ms) == ("too_young", START_MS + HOUR_MS + 1)
    assert rule_for_at(young, O.SHELVE, policy, START_MS + HOUR_MS + 1) == "copy"
    stopped = instance(V.STOPPED, state_since_ms=START_MS + 5_000)
    denied = judge(stopped, asked(O.START), policy, START_MS + 6_000)
    assert isinstance(denied, Denied)
    assert denied.allowed_at_ms == START_MS + 605_000
    assert rule_for_at(stopped, O.START, policy, START_MS + 605_000) == "cools-down"


def rule_for_at(instance: Instance, operation: Operation, policy: CompiledPolicy, at_ms: int) -> str:
    return judge(instance, asked(operation), policy, at_ms).rule  # type: ignore[union-attr]


def test_a_denial_that_no_age_ends_names_no_time() -> None:
    denied = judge(instance(V.PAUSED, locked_by="bob"), asked(O.SHELVE), site(YOUNG), START_MS)
    assert isinstance(denied, Denied)
    assert (denied.rule, denied.allowed_at_ms) == ("locked", None)


def test_a_state_recorded_by_an_older_version_has_lasted_since_the_last_change() -> None:
    old = instance(V.STOPPED)
    assert rule_for_at(old, O.START, site(YOUNG), START_MS + 599_999) == "cooling"
    assert rule_for_at(old, O.START, site(YOUNG), START_MS + 600_000) == "cools-down"


def test_a_queued_request_keeps_the_age_at_which_it_was_submitted() -> None:
    """Law 2: what was admitted to a young instance is not cancelled because it has grown old meanwhile."""
    policy = site('[[rule]]\nid = "old"\noperations = ["pause"]\nage_min = "1h"\nverdict = "deny"\n')
    rebooting = serving(V.ACTIVE, "rebooting", power_state=PowerState.RUNNING)
    admitted = admit(rebooting, asked(O.PAUSE), policy, START_MS + HOUR_MS - 1)
    assert isinstance(admitted.answer, Admitted)
    later = START_MS + 2 * HOUR_MS
    assert rule_for_at(rebooting, O.PAUSE, policy, later) == "old"
    after = finish(admitted.instance, "r0", 0, Outcome.SUCCEEDED, policy, later).instance
    assert [request.operation for request in after.outstanding] == [O.PAUSE]


def test_a_held_request_is_admitted_when_the_instance_is_old_enough() -> None:
    policy = site(YOUNG)
    hold = msgspec.structs.replace(asked(O.SHELVE), hold_ms=2 * HOUR_MS)
    held = admit(instance(V.ACTIVE), hold, policy, START_MS).instance
    assert held.held_due_ms == START_MS
    due = expire(held, policy, START_MS).instance
    assert due.held_due_ms == START_MS + HOUR_MS + 1
    after = expire(due, policy, START_MS + HOUR_MS + 1).instance
    assert [request.operation for request in after.outstanding] == [O.SHELVE]


# ------------------------------------------------------------------------------------------------------------ failures

THRICE = """
[[rule]]
id = "give-up"
operations = ["start", "rebuild"]
failures_min = 2
verdict = "deny"
reason = "give_up"
"""


def failed(found: Instance, policy: CompiledPolicy, outcome: Outcome = Outcome.FAILED) -> Instance:
    """Submit a start and end it."""
    submitted = admit(found, asked(O.START), policy, START_MS)
    assert isinstance(submitted.answer, Admitted)
    taken = take(submitted.instance, None, START_MS).instance
    return finish(taken, "r1", taken.fence, outcome, policy, START_MS).instance


def test_failures_count_for_their_operation_until_it_succeeds() -> None:
    policy = site(THRICE)
    once = failed(instance(V.STOPPED), policy)
    assert once.failures == {O.START: 1}
    assert failed(once, policy, Outcome.SUCCEEDED).failures == {}
    twice = failed(once, policy)
    assert rule_for(twice, O.START, policy) == "give-up"
    assert rule_for(twice, O.REBUILD, policy) == "rescue-rebuild"
    tried = explain(twice, asked(O.REBUILD), policy, START_MS).tried
    assert next(one.failed for one in tried if one.rule == "give-up") == "failures_min: wants at least 2, found 0"


def test_behind_a_request_of_the_same_operation_nothing_has_failed() -> None:
    policy = site(THRICE)
    rebuilding = serving(V.ERROR, "rebuilding", failures={O.REBUILD: 1, O.START: 2})
    there = foresee(rebuilding)
    view = [there.view(asked(operation), START_MS) for operation in (O.REBUILD, O.START)]
    assert [one.failures for one in view] == [0, 2]
    assert policy.decide(view[1]).id == "give-up"


# ---------------------------------------------------------------------------------------------------------- parameters

SIZES = """
[[rule]]
id = "small"
operations = ["resize"]
vcpus_max = 8
memory_mib_max = 16384
verdict = "admit"

[[rule]]
id = "large"
operations = ["resize"]
roles = ["member"]
any = [{ vcpus_min = 1 }, { memory_mib_min = 1 }]
verdict = "deny"
reason = "too_large"

[[rule]]
id = "rack2"
operations = ["migrate"]
target_hosts = ["rack2-*"]
verdict = "deny"
reason = "rack2_is_full"
"""


@pytest.mark.parametrize(
    ("parameters", "rule"),
    [
        ({"vcpus": 8, "memory_mib": 16384}, "small"),
        ({"vcpus": 9, "memory_mib": 16384}, "large#1"),
        ({"memory_mib": 32768}, "large#2"),
        ({"root_gib": 20}, "resize-migrate"),
    ],
)
def test_a_rule_sees_the_size_that_a_resize_asks_for(parameters: dict[str, int], rule: str) -> None:
    answer = judge(
        instance(V.STOPPED), msgspec.structs.replace(asked(O.RESIZE), parameters=parameters), site(SIZES), START_MS
    )
    assert answer.rule == rule  # type: ignore[union-attr]


def test_a_rule_sees_the_host_that_a_migration_names() -> None:
    policy = site(SIZES)
    for host, rule in (("rack2-7", "rack2"), ("rack1-7", "resize-migrate"), ("any", "resize-migrate")):
        answer = judge(instance(V.STOPPED), asked(O.MIGRATE, host=host), policy, START_MS)
        assert answer.rule == rule  # type: ignore[union-attr]


def test_a_rule_sees_the_name_of_the_image_of_a_rebuild_also_behind_other_requests() -> None:
    golden = '[[rule]]\nid = "golden"\noperations = ["rebuild"]\ntask_state = ["none"]\nimages = ["golden-*"]\n'
    rest = '[[rule]]\nid = "other"\noperations = ["rebuild"]\ntask_state = ["none"]\nverdict = "deny"\n'
    policy = site(golden + 'verdict = "admit"\n' + rest)
    rebuild = asked(O.REBUILD, image="00000000-0000-0000-0000-000000000001")
    stopping = serving(V.ACTIVE, "powering_off")
    for name, admits in (("golden-12", True), ("debian", False), ("", False)):
        submission = msgspec.structs.replace(rebuild, image=name)
        for found in (instance(V.STOPPED), stopping):
            assert isinstance(judge(found, submission, policy, START_MS), Admitted) is admits
    admitted = admit(stopping, msgspec.structs.replace(rebuild, image="golden-12"), policy, START_MS)
    after = finish(admitted.instance, "r0", 0, Outcome.SUCCEEDED, policy, START_MS).instance
    assert [(request.operation, request.image) for request in after.outstanding] == [(O.REBUILD, "golden-12")]


def test_a_queued_request_is_judged_again_with_its_parameters() -> None:
    policy = site(SIZES)
    stopping = serving(V.ACTIVE, "powering_off")
    admitted = admit(stopping, asked(O.RESIZE, vcpus=4, memory_mib=4096), policy, START_MS)
    assert isinstance(admitted.answer, Admitted)
    assert admitted.answer.rule == "small"
    after = finish(admitted.instance, "r0", 0, Outcome.SUCCEEDED, policy, START_MS).instance
    assert [request.operation for request in after.outstanding] == [O.RESIZE]


# ------------------------------------------------------------------------------------------------------------ analyses


def test_the_check_finds_bounds_that_leave_no_value() -> None:
    never = '[[rule]]\nid = "never"\noperations = ["stop"]\nage_min = "2h"\nage_max = "1h"\nverdict = "deny"\n'
    assert "contradiction" in {one.code for one in check(site(never).policy)}
    rest = "".join(
        f'[[rule]]\nid = "r{number}"\noperations = ["stop"]\n{bound}\nverdict = "deny"\n'
        for number, bound in enumerate(('age_max = "1h"', 'age_min = "1h"', ""))
    )
    assert {one.rule for one in check(site(rest).policy) if one.code == "unreachable"} == {"r2"}


def test_a_comparison_finds_the_ages_sizes_and_failures_on_which_policies_differ() -> None:
    found = differ(site("").policy, site(YOUNG + THRICE + SIZES).policy)
    assert found.complete
    conditions = " | ".join(sorted({one.condition for one in found.groups}))
    for words in ("after 2 failures of it", "with vcpus 1", "to rack2-"):
        assert words in conditions


@pytest.mark.parametrize(
    ("rule", "sound"),
    [
        ('age_max = "30d"', True),
        ('age_min = "30d"', False),
        ('state_for = "1h"', False),
        ("failures_min = 3", True),
        ("vcpus_max = 2", True),
    ],
)
def test_the_model_checker_says_which_ages_and_parameters_it_assumes(rule: str, sound: bool) -> None:
    policy = site(f'[[rule]]\nid = "mine"\noperations = ["*", "!stop"]\n{rule}\nverdict = "deny"\n')
    found = explore(policy, operations=[O.STOP, O.DELETE], outstanding_max=1)
    assert (found.violations == ()) is sound
    assert any(f"`{rule.split(maxsplit=1)[0]}`" in one for one in found.assumptions)


def test_a_rehearsal_has_instances_of_any_age_with_failures() -> None:
    lines = [
        {"instance": {"vm_state": "stopped", "created": "2h", "state_for": "5m", "failures": {"rebuild": 2}}},
        {"submit": "start"},
        {"advance": "5m"},
        {"submit": "start"},
        {"submit": "rebuild"},
    ]
    answers = [
        json.loads(line) for line in rehearse([json.dumps(line).encode() for line in lines], site(YOUNG + THRICE))
    ]
    submitted = [answer for answer in answers if "disposition" in answer]
    assert [one["rule"] for one in submitted] == ["cooling", "cools-down", "give-up"]
    assert submitted[0]["retry_after"] == 300
