"""Conversion of wire types to core records, to evaluate a policy locally."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from interlock.api.schemas import responses
from interlock.cli.output.formatting import seconds_of
from interlock.core.condition_kinds import Takes
from interlock.core.conditions import CONDITIONS
from interlock.core.operations import Operation
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import Instance, Request
from interlock.core.roles import Role
from interlock.core.states import VmState

if TYPE_CHECKING:
    from collections.abc import Iterable


def instance_of(wire: responses.Instance) -> Instance:
    """Return an instance record with the fields that the wire type has."""
    return Instance(
        id=wire.id,
        name=wire.name,
        project=wire.project,
        host=wire.host,
        vm_state=wire.vm_state,
        prior_vm_state=wire.prior_vm_state,
        further_vm_states=wire.further_vm_states,
        power_state=wire.power_state,
        generation=wire.generation,
        created_at_ms=_ms(wire.created_at) or 0,
        updated_at_ms=_ms(wire.updated_at) or 0,
        state_since_ms=_ms(wire.state_since_at) or 0,
        failures=wire.failures,
        launched_at_ms=_ms(wire.launched_at),
        locked_by=wire.locked_by,
        lock_role=wire.lock_role or Role.MEMBER,
        blocked_operations=wire.blocked_operations,
        tags=wire.tags,
        error=wire.error,
        outstanding=tuple(_request_of(request) for request in wire.outstanding),
        held=tuple(_request_of(request) for request in wire.held),
    )


def _request_of(wire: responses.Request) -> Request:
    return Request(
        id=wire.id,
        instance_id=wire.instance,
        operation=wire.operation,
        parameters=wire.parameters,
        requested_by=wire.requested_by,
        role=wire.role,
        project=wire.project,
        groups=wire.groups,
        windows=wire.windows,
        approver=tuple(sorted({word for one in wire.approvals for word in one.belongs})),
        rule=wire.rule,
        admitted_at_ms=_ms(wire.admitted_at) or 0,
        status=wire.status,
        preempts=wire.preempts,
        phase=wire.phase,
        taken_at_ms=_ms(wire.taken_at),
        last_progress_at_ms=_ms(wire.last_sign_of_life_at),
        interrupt_at_ms=_ms(wire.interrupt_at),
        interrupt_deadline_ms=_ms(wire.interrupt_deadline_at),
        interrupted_for=wire.interrupted_for,
    )


def _ms(moment: str | None) -> int | None:
    return None if moment is None else round(seconds_of(moment) * 1000)


def policy_of(document: dict[str, Any]) -> CompiledPolicy:
    """Return the server's policy; names unknown to this version are left out."""
    rules = tuple(_rule_of(rule) for rule in document.get("rules", ()))
    limit = int(document.get("outstanding_max", 16))
    limits = document.get("served_at_most_s", {})
    policy = Policy(
        name=str(document.get("name", "")),
        rules=rules,
        outstanding_max=limit,
        protected_tags=tuple(document.get("protected_tags", ())),
        served_at_most={
            operation: _milliseconds(limits[operation.value]) or 0
            for operation in Operation
            if operation.value in limits
        },
        digest=str(document.get("digest", "")),
    )
    return CompiledPolicy(policy)


def _rule_of(wire: dict[str, Any]) -> Rule:
    facts: dict[str, Any] = {key: wire[key] for key in ("in_turn", "reason", "because", "fixed") if key in wire}
    return Rule(
        id=wire["id"],
        source=wire.get("source", ""),
        verdict=Verdict(wire["verdict"]),
        operations=_known(Operation, wire["operations"]),
        vm_states=None if wire.get("vm_state") is None else _known(VmState, wire["vm_state"]),
        task_states=None if wire.get("task_state") is None else frozenset(wire["task_state"]),
        **{condition.field: _condition_of(condition.kind.takes, wire.get(condition.wire)) for condition in CONDITIONS},
        threshold_ms=_milliseconds(wire.get("threshold_s")),
        measured_from=MeasuredFrom(wire.get("measured_from") or MeasuredFrom.LAST_PROGRESS),
        before=Before(wire.get("before") or Before.DENY),
        grace_ms=_milliseconds(wire.get("grace_s")) or 0,
        served_at_most_ms=_milliseconds(wire.get("served_at_most_s")),
        **facts,
    )


def _condition_of(takes: Takes, value: Any) -> Any:
    if value is None:
        return None
    match takes:
        case Takes.FLAG | Takes.COUNT:
            return value
        case Takes.TIME:
            return _milliseconds(value)
        case Takes.KINDS:
            return _known(Operation, value)
        case Takes.WORDS | Takes.TEXTS:
            return frozenset(value)
        case _:
            assert_never(takes)


def _known(kind: Any, words: Iterable[str]) -> frozenset[Any]:
    values = {member.value for member in kind}
    return frozenset(kind(word) for word in words if word in values)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
