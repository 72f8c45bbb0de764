"""Nova's `policy.yaml` becomes a policy under which the same roles may do the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.core.views import View
from interlock.policies.importer import Imported, import_nova_policy
from interlock.policies.importer.expressions import Evaluation, NotAnExpression, parsed
from interlock.policies.importer.nova_policy import BASE_RULES, NOVA_RULES, OPENSTACK_ROLES
from interlock.policies.language.loader import load
from interlock.policies.lint.checker import check
from interlock.policies.lint.findings import Severity

O = Operation  # noqa: E741
READER, MEMBER, MANAGER, ADMIN = Role.READER, Role.MEMBER, Role.PROJECT_ADMIN, Role.ADMIN
STATE = {O.CREATE: VmState.BUILDING, O.START: VmState.STOPPED, O.RESTORE: VmState.SOFT_DELETED}


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        ("@", {READER, MEMBER, MANAGER, ADMIN}),
        ("", {READER, MEMBER, MANAGER, ADMIN}),
        ([], {READER, MEMBER, MANAGER, ADMIN}),
        ("!", set()),
        ("role:admin", {ADMIN}),
        ("role:Admin", {ADMIN}),
        ("role:manager", {MANAGER, ADMIN}),
        ("role:member and not role:admin", {MEMBER, MANAGER}),
        ("not (role:manager or role:admin)", {READER, MEMBER}),
        ("not role:manager or role:admin", {READER, MEMBER, ADMIN}),
        ("role:admin or role:member and not role:manager", {ADMIN, MEMBER}),
        ("(role:admin or role:member) and not role:manager", {MEMBER}),
        ("role:admin OR (role:manager AND NOT role:admin)", {MANAGER, ADMIN}),
        ("is_admin:True", {ADMIN}),
        ("rule:admin_api", {ADMIN}),
        ("rule:project_member_or_admin", {MEMBER, MANAGER, ADMIN}),
        ("rule:project_manager_or_admin", {MANAGER, ADMIN}),
        ("rule:project_reader_or_admin", {READER, MEMBER, MANAGER, ADMIN}),
        ("project_id:%(project_id)s", {READER, MEMBER, MANAGER, ADMIN}),
        ("role:member and tenant_id:%(tenant_id)s", {MEMBER, MANAGER, ADMIN}),
        ("rule:no_such_rule", set()),
        ("role:auditor", set()),
        ([["role:admin"], ["role:member", "project_id:%(project_id)s"]], {MEMBER, MANAGER, ADMIN}),
        (["role:admin", "role:manager"], {MANAGER, ADMIN}),
        ([["role:member", "role:admin"]], {ADMIN}),
        ([[]], set()),
        ("user_id:%(user_id)s", set()),
        ("not user_id:%(user_id)s", set()),
        ("role:admin or user_id:%(user_id)s", {ADMIN}),
        ("role:member and (user_id:%(user_id)s or @)", {MEMBER, MANAGER, ADMIN}),
    ],
)
def test_a_rule_gives_for_each_role_what_oslo_policy_gives(rule: object, allowed: set[Role]) -> None:
    """With the roles that Keystone implies; what depends on something unknown is denied."""
    base = {name: parsed(text) for name, text in BASE_RULES.items()}
    expression = parsed(rule)
    for role, roles in OPENSTACK_ROLES.items():
        result = Evaluation(lambda name: base.get(name, parsed("!")), roles).result(expression)
        assert (result is True) == (role in allowed), role


@pytest.mark.parametrize(
    "text",
    ["role:admin and", "and role:admin", "(role:admin", "role:admin)", "role:admin role:member", "admin", "not", "( )",
     "(" * 200 + "@" + ")" * 200, "not " * 200 + "@", "@ or " * 5_000 + "@"],
)  # fmt: skip
def test_what_cannot_be_parsed_is_no_expression(text: str) -> None:
    with pytest.raises(NotAnExpression):
        parsed(text)


def test_a_rule_that_names_itself_never_holds() -> None:
    assert Evaluation(lambda _: parsed("rule:again"), ("admin",)).result(parsed("rule:again")) is False


def imported(text: str) -> Imported:
    return import_nova_policy(text, "policy.yaml")


def allowed_by(result: Imported, folder: Path, operation: Operation) -> set[Role]:
    """The roles whose submission no imported rule denies."""
    path = folder / "imported.toml"
    path.write_text(result.toml)
    compiled = CompiledPolicy(load(path))
    own = {rule.id for rule in compiled.rules if rule.source.startswith(str(path))}
    views = {role: View(operation=operation, vm_state=STATE.get(operation, VmState.ACTIVE), role=role) for role in Role}
    return {
        role
        for role, view in views.items()
        if (rule := compiled.decide(view)).id not in own and rule.reason != "role_required"
    }


FILE = """
"context_is_admin": "role:admin or role:cloud_admin"
"os_compute_api:servers:reboot": "rule:admin_or_owner"
"os_compute_api:servers:delete": "rule:context_is_admin or (role:manager and project_id:%(project_id)s)"
"os_compute_api:os-pause-server:pause": "!"
"os_compute_api:servers:stop": "role:admin or user_id:%(user_id)s"
"os_compute_api:os-lock-server:lock": [["role:admin"], ["role:manager", "project_id:%(project_id)s"]]
"os_compute_api:servers:resize": "role:admin and ("
"os_compute_api:os-flavor-manage:create": "rule:context_is_admin"
"os_compute_api:os-migrate-server:migrate": "rule:project_member_or_admin"
"os_compute_api:servers:create:forced_host": "rule:context_is_admin"
"""


def test_a_submission_is_denied_to_the_roles_to_which_the_api_denies_it(tmp_path: Path) -> None:
    result = imported(FILE)
    wanted = {
        O.REBOOT: {MEMBER, MANAGER, ADMIN},
        O.DELETE: {MANAGER, ADMIN},
        O.SOFT_DELETE: {MANAGER, ADMIN},
        O.PAUSE: set(),
        O.STOP: {ADMIN},
        O.LOCK: {MANAGER, ADMIN},
        O.RESIZE: set(),
        O.MIGRATE: {MEMBER, MANAGER, ADMIN},
        O.START: {MEMBER, MANAGER, ADMIN},
        O.EVACUATE: {ADMIN},
        O.RESTORE: {MANAGER, ADMIN},
        O.RESET_STATE: {ADMIN},
    }
    assert {operation: allowed_by(result, tmp_path, operation) for operation in wanted} == wanted


def test_what_was_not_carried_over_is_a_comment_with_line_and_reason() -> None:
    toml = imported(FILE).toml
    assert "#   line 6: os_compute_api:servers:stop: user_id:%(user_id)s is not known here: denied" in toml
    assert "#   line 8: os_compute_api:servers:resize: cannot be parsed (a check is missing): nobody may" in toml
    assert "#   line 9: os_compute_api:os-flavor-manage:create: not about an operation on a VM" in toml
    assert "#   line 11: os_compute_api:servers:create:forced_host: about a variant of an operation" in toml
    assert "role:cloud_admin: Interlock has no such role" in toml


def test_a_rule_that_is_not_defined_is_the_default_one_or_else_nobody_s_and_remarked(tmp_path: Path) -> None:
    text = '"os_compute_api:servers:stop": "rule:site"\n'
    alone, given = imported(text), imported(text + '"default": "role:admin"\n')
    assert (allowed_by(alone, tmp_path, O.STOP), allowed_by(given, tmp_path, O.STOP)) == (set(), {ADMIN})
    assert "line 1: os_compute_api:servers:stop: rule:site names no rule: it never holds" in alone.toml
    assert "names no rule" not in given.toml


def test_the_checks_of_an_is_admin_are_those_of_the_rule_behind_it() -> None:
    stop, admin = '"os_compute_api:servers:stop": "is_admin:True"\n', '"context_is_admin": "role:cloud_admin"\n'
    assert "servers:stop: role:cloud_admin: Interlock has no such role" in imported(stop + admin).toml
    assert "servers:stop:" not in imported(stop).toml


@pytest.mark.parametrize("text", ["", FILE])
def test_the_result_passes_the_check(tmp_path: Path, text: str) -> None:
    path = tmp_path / "imported.toml"
    path.write_text(imported(text).toml)
    assert {one.severity for one in check(load(path))} <= {Severity.NOTE}


def test_a_quoted_exclamation_mark_is_nobody_and_a_bare_one_is_everybody_as_in_yaml(tmp_path: Path) -> None:
    assert not allowed_by(imported('"os_compute_api:servers:stop": "!"'), tmp_path, O.STOP)
    bare = imported('"os_compute_api:servers:stop": !')
    assert allowed_by(bare, tmp_path, O.STOP) == {MEMBER, MANAGER, ADMIN}
    assert "everybody may" in bare.toml


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: b\nc: @all", 2), ("- a", 1), ("just text", 1), ("a: [", 1), ("a: !!python/object:os.system {}", 1)],
)
def test_a_file_that_is_no_policy_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(PolicyError, match=rf"^policy\.yaml:{line}: "):
        imported(text)


def test_text_of_the_file_cannot_leave_a_comment(tmp_path: Path) -> None:
    result = imported('"a:b\\n[[rule]]\\nid=1": "!"')
    path = tmp_path / "imported.toml"
    path.write_text(result.toml)
    assert load(path).rules
    assert "\n[[rule]]\nid=1" not in result.toml


def test_every_operation_has_a_rule_of_nova() -> None:
    assert set(NOVA_RULES) == set(Operation)
