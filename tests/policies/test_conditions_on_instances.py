"""Conditions on what is recorded of the instance."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from policy_samples import START_MS, instance, serving

from interlock.core.admission import judge
from interlock.core.errors import PolicyError
from interlock.core.lifecycle import relabel
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Denied, Instance, Request, Submission
from interlock.core.roles import Role
from interlock.core.states import PowerState, VmState
from interlock.policies.explanation import explain
from interlock.policies.language.loader import load
from interlock.policies.model_checker import explore

O = Operation  # noqa: E741
V = VmState


def site(rules: str, base: str = "standard") -> CompiledPolicy:
    """Return a policy that extends a built-in one."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "site.toml"
        path.write_text(f'[policy]\nextends = "{base}"\n{rules}')
        return CompiledPolicy(load(path))


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
    assert "`power_state` is always running; it is a condition of dump-first." in found.assumptions
