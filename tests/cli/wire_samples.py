"""Answers of a server, as they go over the wire."""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.api.schemas import responses
from interlock.api.schemas.hosts import Host, Resources
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import PowerState, VmState
from interlock.ports import HostState

AT = "2026-03-01T12:00:03.000Z"
NOW = 1_772_366_422.0
"""2026-03-01 12:00:22 UTC, the scripted server's clock."""


def request(**changes: Any) -> responses.Request:
    fields: dict[str, Any] = {
        "id": "r-1",
        "instance": "i-1",
        "operation": Operation.REBOOT,
        "parameters": {},
        "status": Status.QUEUED,
        "requested_by": "alice",
        "role": "member",
        "rule": "reboot",
        "preempts": False,
        "admitted_at": AT,
    }
    optional = {field.name: None for field in msgspec.structs.fields(responses.Request) if field.required}
    return responses.Request(**{**optional, **fields, **changes})


def instance(**changes: Any) -> responses.Instance:
    fields: dict[str, Any] = {
        "id": "i-1",
        "name": "demo",
        "project": "default",
        "host": "here",
        "vm_state": VmState.ACTIVE,
        "prior_vm_state": None,
        "further_vm_states": [],
        "task_state": "none",
        "power_state": PowerState.RUNNING,
        "generation": 7,
        "created_at": AT,
        "updated_at": AT,
        "locked_by": None,
        "blocked_operations": (),
        "tags": (),
        "metadata": {},
        "error": None,
        "launched_at": AT,
        "restart": None,
        "restarts": 0,
        "restart_due_at": None,
        "image": responses.ImageReference(id="im-1", name="small"),
        "vcpus": 1,
        "memory_mib": 128,
        "root_gib": 0,
        "forwards": (),
        "volumes": (),
        "outstanding": (),
        "held": (),
    }
    return responses.Instance(**{**fields, **changes})


def refusal(**changes: Any) -> responses.Refusal:
    fields: dict[str, Any] = {
        "type": "urn:interlock:problem:refused",
        "title": "Refused",
        "status": 409,
        "detail": "A stop is on its way and goes first.",
        "operation": Operation.REBOOT,
        "reason": "halt_pending",
        "rule": "no-reboot-before-stop",
        "because": "A stop is on its way and goes first.",
        "vm_state": VmState.STOPPED,
        "foreseen": True,
        "blocked_by": blocker(),
        "allowed_at": None,
        "retry_after_s": None,
        "allowed_instead": (Operation.DELETE, Operation.ATTACH_VOLUME),
    }
    return responses.Refusal(**{**fields, **changes})


def blocker(**changes: Any) -> responses.Blocker:
    fields: dict[str, Any] = {
        "request": "r-0",
        "operation": Operation.STOP,
        "phase": None,
        "status": Status.QUEUED,
        "since": AT,
        "last_sign_of_life": None,
        "by": "alice",
    }
    return responses.Blocker(**{**fields, **changes})


def admitted(one: responses.Request | None = None) -> responses.Admitted:
    return responses.Admitted(rule="reboot", because=None, request=one or request(), supersedes=(), cancels=())


def problem(status: int, detail: str, **more: Any) -> dict[str, Any]:
    return {"type": "urn:interlock:problem:x", "title": "X", "status": status, "detail": detail, **more}


def event(sequence: int, kind: str, **data: Any) -> responses.Event:
    return responses.Event(
        sequence=sequence, kind=kind, instance="i-1", request="r-1", at=AT, generation=sequence, data=data
    )


def other_host(name: str, state: HostState, *, linked: bool) -> Host:
    """A host of which no limits are known."""
    nothing = Resources(memory_mib=None, vcpus=None, disk_mib=None)
    return Host(
        name=name,
        identity=None,
        state=state,
        linked=linked,
        last_seen_at=AT,
        fenced_by=None,
        address=None,
        shared=None,
        instances=1,
        total=nothing,
        promised=nothing,
        free=nothing,
        disk_free_mib=None,
    )
