"""Roles: what each may do under every built-in policy, and that an unknown one is refused everywhere."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest
from policy_samples import instance

from interlock.core.admission import judge
from interlock.core.errors import Invalid, PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.records import Admitted, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.fleet import judge_fleet
from interlock.policies.language.loader import builtin_names, compile_named

O = Operation  # noqa: E741
V = VmState
POLICIES = {name: compile_named(name) for name in builtin_names()}


def allowed(policy: CompiledPolicy, role: Role, **how: Any) -> set[O]:
    """Return the operations that are admitted in some vm_state."""
    return {
        operation
        for operation in O
        for vm_state in V
        if isinstance(judge(instance(vm_state, **how), asking(operation, role), policy, 0), Admitted)
    }


def asking(operation: O, role: str) -> Submission:
    return Submission(request_id="r1", operation=operation, requested_by="me", role=cast("Role", role))


@pytest.mark.parametrize("role", ["guest", "readr", "Member", ""])
def test_a_submission_with_an_unknown_role_is_never_judged(role: str) -> None:
    """No rule would name it, so that `guest` would be let through wherever a rule names who may not."""
    with pytest.raises(Invalid, match=f"Unknown role '{role}'"):
        asking(O.RESET_STATE, role)
    with pytest.raises(Invalid, match="Unknown role"):
        msgspec.structs.replace(asking(O.STOP, "admin"), role=role)
    with pytest.raises(Invalid, match="Unknown role"):
        judge_fleet([instance(V.ACTIVE)], POLICIES["standard"], 0, caller={"role": role})
    assert asking(O.STOP, "project_admin").role is Role.PROJECT_ADMIN


def test_a_rule_with_an_unknown_role_is_no_policy() -> None:
    rule = Rule(id="site", operations=frozenset(O), verdict=Verdict.DENY, roles=cast("frozenset[Role]", {"membr"}))
    with pytest.raises(PolicyError, match="Rule 'site': unknown role 'membr'"):
        CompiledPolicy(Policy(name="site", rules=(rule,)))


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("locked_by", [None, "me"])
def test_a_project_admin_may_do_what_a_member_may_and_an_agent_what_a_reader_may(
    name: str, locked_by: str | None
) -> None:
    powers = {role: allowed(POLICIES[name], role, locked_by=locked_by) for role in Role}
    assert powers[Role.AGENT] == powers[Role.READER] == set()
    assert powers[Role.PROJECT_ADMIN] == powers[Role.MEMBER]
    assert powers[Role.MEMBER] < powers[Role.ADMIN]
    assert O.RESET_STATE not in powers[Role.PROJECT_ADMIN]


def test_each_role_includes_those_that_may_do_less_or_the_same() -> None:
    members = [Role.AGENT, Role.READER, Role.MEMBER, Role.PROJECT_ADMIN]
    included = [[Role.AGENT], [Role.AGENT, Role.READER], members, members, list(Role)]
    assert [[other for other in Role if role.includes(other)] for role in Role] == included
