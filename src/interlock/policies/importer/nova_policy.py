"""Importer of OpenStack Nova's `policy.yaml`: who may perform which operation, as rules that extend `nova`.

Nova has two gates: its API's policy says who may ask, by oslo.policy's rules, and its compute API what the state of an
instance permits. The built-in policy `nova` is the second; this converts the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.roles import Role
from interlock.policies.importer.expressions import (
    NOBODY,
    Check,
    Evaluation,
    Expression,
    NotAnExpression,
    checks_of,
    is_own_project,
    parsed,
)

SIZE_MAX_BYTES: Final = 1024 * 1024
_LINE_MAX: Final = 110
_API: Final = "os_compute_api:"
_MEMBER: Final = "rule:project_member_or_admin"
_MANAGER: Final = "rule:project_manager_or_admin"
_ADMIN: Final = "rule:context_is_admin"

BASE_RULES: Final = {
    "context_is_admin": "role:admin",
    "admin_or_owner": "is_admin:True or project_id:%(project_id)s",
    "admin_api": "is_admin:True",
    "project_manager_api": "role:manager and project_id:%(project_id)s",
    "project_member_api": "role:member and project_id:%(project_id)s",
    "project_reader_api": "role:reader and project_id:%(project_id)s",
    "project_manager_or_admin": "rule:project_manager_api or rule:context_is_admin",
    "project_member_or_admin": "rule:project_member_api or rule:context_is_admin",
    "project_reader_or_admin": "rule:project_reader_api or rule:context_is_admin",
}
"""The rules that others refer to, with Nova's defaults (nova/policies/base.py)."""

NOVA_RULES: Final = {
    Operation.CREATE: ("servers:create", _MEMBER),
    Operation.START: ("servers:start", _MEMBER),
    Operation.STOP: ("servers:stop", _MEMBER),
    Operation.REBOOT: ("servers:reboot", _MEMBER),
    Operation.PAUSE: ("os-pause-server:pause", _MEMBER),
    Operation.UNPAUSE: ("os-pause-server:unpause", _MEMBER),
    Operation.SUSPEND: ("os-suspend-server:suspend", _MEMBER),
    Operation.RESUME: ("os-suspend-server:resume", _MEMBER),
    Operation.RESCUE: ("os-rescue", _MEMBER),
    Operation.UNRESCUE: ("os-unrescue", _MEMBER),
    Operation.REBUILD: ("servers:rebuild", _MEMBER),
    Operation.RESIZE: ("servers:resize", _MEMBER),
    Operation.CONFIRM_RESIZE: ("servers:confirm_resize", _MEMBER),
    Operation.REVERT_RESIZE: ("servers:revert_resize", _MEMBER),
    Operation.SHELVE: ("os-shelve:shelve", _MEMBER),
    Operation.SHELVE_OFFLOAD: ("os-shelve:shelve_offload", _ADMIN),
    Operation.UNSHELVE: ("os-shelve:unshelve", _MEMBER),
    Operation.SNAPSHOT: ("servers:create_image", _MEMBER),
    Operation.BACKUP: ("os-create-backup", _MEMBER),
    Operation.MIGRATE: ("os-migrate-server:migrate", _MANAGER),
    Operation.LIVE_MIGRATE: ("os-migrate-server:migrate_live", _MANAGER),
    Operation.EVACUATE: ("os-evacuate", _ADMIN),
    Operation.CRASH_DUMP: ("servers:trigger_crash_dump", _MEMBER),
    Operation.DELETE: ("servers:delete", _MEMBER),
    Operation.SOFT_DELETE: ("servers:delete", _MEMBER),
    Operation.RESTORE: ("os-deferred-delete:restore", _MANAGER),
    Operation.FORCE_DELETE: ("os-deferred-delete:force", _MANAGER),
    Operation.ATTACH_VOLUME: ("os-volumes-attachments:create", _MEMBER),
    Operation.DETACH_VOLUME: ("os-volumes-attachments:delete", _MEMBER),
    Operation.SWAP_VOLUME: ("os-volumes-attachments:swap", _ADMIN),
    Operation.ATTACH_INTERFACE: ("os-attach-interfaces:create", _MEMBER),
    Operation.DETACH_INTERFACE: ("os-attach-interfaces:delete", _MEMBER),
    Operation.LOCK: ("os-lock-server:lock", _MEMBER),
    Operation.UNLOCK: ("os-lock-server:unlock", _MEMBER),
    Operation.RESET_STATE: ("os-admin-actions:reset_state", _ADMIN),
    Operation.SET_PASSWORD: ("os-admin-password", _MEMBER),
    Operation.SET_METADATA: ("server-metadata:update_all", _MEMBER),
    Operation.LIVE_MIGRATE_ABORT: ("servers:migrations:delete", _MANAGER),
    Operation.LIVE_MIGRATE_FORCE_COMPLETE: ("servers:migrations:force_complete", _MANAGER),
    Operation.RENAME: ("servers:update", _MEMBER),
    # Nova changes no interface: whoever may attach one may do that.
    Operation.MOVE_INTERFACE: ("os-attach-interfaces:create", _MEMBER),
    Operation.SET_INTERFACE: ("os-attach-interfaces:create", _MEMBER),
    Operation.ADD_FORWARD: ("os-attach-interfaces:create", _MEMBER),
    Operation.REMOVE_FORWARD: ("os-attach-interfaces:create", _MEMBER),
}
"""For each operation the rule of Nova's API, without `os_compute_api:`, and its default (nova/policies/)."""

OPENSTACK_ROLES: Final = {
    Role.READER: ("reader",),
    Role.MEMBER: ("member", "reader"),
    Role.PROJECT_ADMIN: ("manager", "member", "reader"),
    Role.ADMIN: ("admin", "manager", "member", "reader"),
}
"""The OpenStack roles of a caller with each role that may change instances, as Keystone implies them."""
_KNOWN_ROLES: Final = frozenset(OPENSTACK_ROLES[Role.ADMIN])
_DECIDED: Final = (Role.MEMBER, Role.PROJECT_ADMIN, Role.ADMIN)
"""The roles that `nova` leaves to its API's policy: it lets readers change nothing."""


class RuleLine(NamedTuple):
    """One rule of the file."""

    name: str
    number: int
    value: Any


class Remark(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was not carried over, or not as it stands."""

    line: int
    rule: str
    why: str


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """The result."""

    toml: str
    """The policy, which extends `nova`."""
    rules: int
    """The number of its own rules."""
    remarks: tuple[Remark, ...]


def import_nova_policy(text: str, source: str = "policy.yaml", name: str = "imported") -> Imported:
    """Convert a policy file of Nova, YAML or JSON, to a policy that extends `nova`.

    Where a rule depends on what Interlock does not know, the operation is denied.

    Raises:
        PolicyError: the file is not a mapping of rules; with its line.
    """
    return _Importer(list(_lines(text, source)), source, name).result()


def _lines(text: str, source: str) -> Iterator[RuleLine]:
    import yaml

    if len(text.encode()) > SIZE_MAX_BYTES:
        raise PolicyError(f"{source}:1: The file is larger than {SIZE_MAX_BYTES} bytes.")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise PolicyError(f"{source}:1: Not a policy of oslo.policy: expected names of rules with their values.")
        constructor = yaml.constructor.SafeConstructor()
        for key, value in root.value:
            made = constructor.construct_object(value, deep=True)
            yield RuleLine(str(key.value), key.start_mark.line + 1, made)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "invalid YAML"
        raise PolicyError(
            f"{source}:{mark.line + 1 if mark else 1}: {problem}.",
            remedy='Quote what begins with "@" or "!", as oslo.policy requires.',
        ) from None
    except RecursionError:
        raise PolicyError(f"{source}:1: Nested too deep.") from None


class _Importer:
    def __init__(self, lines: list[RuleLine], source: str, name: str) -> None:
        self._source, self._name = source, name
        self._lines = {line.name: line for line in lines}
        """As in oslo.policy, the last of several with one name counts."""
        self._remarks: list[Remark] = []
        self._expressions: dict[str, Expression] = {}
        for name_of, text in BASE_RULES.items():
            self._expressions[name_of] = parsed(text)
        for line in lines:
            if self._lines[line.name] is not line:
                self._remark(line, f"overridden by line {self._lines[line.name].number}")
                continue
            try:
                self._expressions[line.name] = parsed(line.value)
            except NotAnExpression as error:
                self._expressions[line.name] = NOBODY
                self._remark(line, f"cannot be parsed ({error}): nobody may, as in oslo.policy")

    def result(self) -> Imported:
        denied: dict[tuple[Role, ...], list[Operation]] = {}
        for operation in NOVA_RULES:
            refused = self._refused(operation)
            if refused:
                denied.setdefault(refused, []).append(operation)
        self._remark_the_rest()
        remarks = tuple(sorted(set(self._remarks), key=lambda one: (one.line, one.rule, one.why)))
        text = "\n".join(self._text(denied, remarks)) + "\n"
        return Imported(toml=text, rules=len(denied), remarks=remarks)

    def _refused(self, operation: Operation) -> tuple[Role, ...]:
        """Return the roles that may not perform an operation."""
        expression = self._rule_for(operation)
        results = {role: Evaluation(self._rule, roles).result(expression) for role, roles in OPENSTACK_ROLES.items()}
        line = self._lines.get(_API + NOVA_RULES[operation][0])
        if line is not None:
            self._remark_checks(line, expression, results, operation)
        return tuple(role for role in _DECIDED if results[role] is not True)

    def _rule_for(self, operation: Operation) -> Expression:
        name, default = NOVA_RULES[operation]
        return self._expressions.get(_API + name) or parsed(default)

    def _rule(self, name: str) -> Expression:
        return self._expressions.get(name) or self._expressions.get("default", NOBODY)

    def _remark(self, line: RuleLine, why: str) -> None:
        self._remarks.append(Remark(line=line.number, rule=line.name, why=why))

    def _remark_checks(
        self, line: RuleLine, expression: Expression, results: dict[Role, bool | None], operation: Operation
    ) -> None:
        for check in self._all_checks(expression):
            why = _not_known(check)
            if why is not None:
                self._remark(line, why)
        if line.value in ("", None, []):
            self._remark(line, 'is empty, so everybody may, as in oslo.policy; nobody is "!", in quotes')
        if results[Role.READER]:
            self._remark(line, f"lets a reader {operation.value}: `nova` lets readers change nothing")
        if operation is Operation.RESET_STATE and (results[Role.MEMBER] or results[Role.PROJECT_ADMIN]):
            self._remark(line, "lets others than admins reset a state: `nova` does not")

    def _all_checks(self, expression: Expression) -> Iterator[Check]:
        """Yield the checks of an expression and of the rules that it names."""
        seen: set[str] = set()
        pending = [expression]
        while pending:
            for check in checks_of(pending.pop()):
                named = "context_is_admin" if check.kind == "is_admin" else check.match
                if check.kind not in {"rule", "is_admin"}:
                    yield check
                elif named not in seen:
                    seen.add(named)
                    pending.append(self._rule(named))
                    if check.kind == "rule" and named not in self._expressions and "default" not in self._expressions:
                        yield check

    def _remark_the_rest(self) -> None:
        imported = {_API + name for name, _ in NOVA_RULES.values()}
        for line in self._lines.values():
            if line.name in imported or line.name in BASE_RULES or line.name == "default":
                continue
            if line.name.startswith((*(f"{one}:" for one in imported), f"{_API}server-metadata:")):
                self._remark(line, "about a variant of an operation; Interlock decides about the operation as a whole")
            elif ":" in line.name:
                self._remark(line, "not about an operation on a VM")
            # What has no colon is a rule that others refer to.

    def _text(self, denied: dict[tuple[Role, ...], list[Operation]], remarks: Iterable[Remark]) -> Iterator[str]:
        yield f"# Who may perform which operation, from {_plain(self._source)}."
        yield "# Roles are OpenStack's, each with what it implies; project_admin is manager. A caller only reaches the"
        yield "# instances of the token's project, so that project_id:%(project_id)s always holds."
        listed = list(remarks)
        if listed:
            yield "#"
            yield "# Not carried over, or not as it stands:"
            yield from (f"#   line {one.line}: {_plain(one.rule)}: {_plain(one.why)}" for one in listed)
        yield ""
        yield "[policy]"
        yield f"name = {_quoted(self._name)}"
        yield 'extends = "nova"'
        yield 'description = "Converted from the policy file of Nova\'s API."'
        for roles, operations in denied.items():
            yield ""
            yield from self._rule_text(roles, operations)

    def _rule_text(self, roles: tuple[Role, ...], operations: list[Operation]) -> Iterator[str]:
        for name in dict.fromkeys(NOVA_RULES[operation][0] for operation in operations):
            line = self._lines.get(_API + name)
            where = f"line {line.number}" if line else "Nova's default"
            yield f"# {where}: {_API}{name}"
        allowed = [role.value for role in _DECIDED if role not in roles]
        yield "[[rule]]"
        yield f"id = {_quoted('for-' + '-and-'.join(allowed) if allowed else 'for-nobody')}"
        yield "operations = ["
        yield from (f"    {_quoted(operation.value)}," for operation in operations)
        yield "]"
        if allowed:
            but = ["*", *(f"!{role}" for role in allowed)]
            yield f"roles = [{', '.join(map(_quoted, but))}]"
        yield 'verdict = "deny"'
        yield 'reason = "role_required"'
        who = (
            f"Only the role {' or '.join(allowed)} may do this."
            if allowed
            else "The policy of the API lets nobody do this."
        )
        yield f"because = {_quoted(who)}"


def _not_known(check: Check) -> str | None:
    """Return why a check was not carried over; None if it was."""
    text = _plain(str(check))
    if check.kind == "rule":
        return f"{text} names no rule: it never holds, as in oslo.policy"
    if check.kind == "role" and "%(" not in check.match:
        if check.match.lower() in _KNOWN_ROLES:
            return None
        return f"{text}: Interlock has no such role, so nobody has it"
    if (check.kind in {"@", "!"} and not check.match) or is_own_project(check):
        return None
    return f"{text} is not known here: denied where the answer depends on it"


def _plain(text: str) -> str:
    """Return text for a comment: one line, printable."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= _LINE_MAX else f"{line[:_LINE_MAX]}…"


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()
