"""Instances and steps that the tests of the policies are written with."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from interlock.core.admission import admit, admit_there
from interlock.core.lifecycle import expire, finish, observe, take
from interlock.core.operations import TASK_OPERATION, Lane, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    Admitted,
    Denied,
    Disposition,
    GuestEvent,
    Held,
    Instance,
    Outcome,
    Redundant,
    Request,
    Status,
    Submission,
)
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named

START_MS = 1_000_000_000_000
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def site(rules: str, base: str = "standard") -> CompiledPolicy:
    """A site's policy: rules before those of a built-in policy."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "site.toml"
        path.write_text(f'[policy]\nname = "site"\nextends = "{base}"\n{rules}')
        return compile_named(str(path))


def instance(vm_state: VmState, **more: Any) -> Instance:
    return Instance(
        id="i1",
        name="vm",
        project="p",
        host="h",
        vm_state=vm_state,
        **{"created_at_ms": START_MS, "updated_at_ms": START_MS, **more},
    )


def serving(vm_state: VmState, task_state: str, age_ms: int = 0, **more: Any) -> Instance:
    """An instance of which the operation with that phase is in flight, silent since `age_ms`."""
    since = START_MS - age_ms
    request = Request(
        id="r0",
        instance_id="i1",
        operation=TASK_OPERATION[task_state],
        requested_by="somebody",
        rule="made",
        admitted_at_ms=since,
        status=Status.IN_FLIGHT,
        phase=task_state,
        taken_at_ms=since,
        last_progress_at_ms=since,
    )
    return msgspec.structs.replace(instance(vm_state, **more), outstanding=(request,), updated_at_ms=since)


class Play:
    """One instance under one policy, and what happens to it."""

    def __init__(self, policy: CompiledPolicy, start: Instance) -> None:
        self.policy = policy
        self.instance = start
        self.now_ms = START_MS
        self.host_reachable = True
        self.requests: dict[str, Request] = {request.id: request for request in start.outstanding}

    def _keep(self, change: Any) -> Any:
        self.instance = change.instance
        self.requests.update({request.id: request for request in change.requests})
        return change.answer

    def submit(
        self, operation: Operation, *, hard: bool = False, role: Role = Role.MEMBER, host_reachable: bool = True
    ) -> Disposition:
        self.host_reachable = host_reachable
        submission = Submission(
            request_id=f"r{len(self.requests) + 1}",
            operation=operation,
            parameters={"hard": True} if hard else {},
            requested_by="me",
            role=role,
            host_reachable=host_reachable,
        )
        answer: Disposition = self._keep(admit(self.instance, submission, self.policy, self.now_ms))
        return answer

    def take(self, lane: Lane | None = None) -> Request | None:
        taken: Request | None = self._keep(take(self.instance, lane, self.now_ms, host_reachable=self.host_reachable))
        return taken

    def finish(self, request_id: str, outcome: Outcome = Outcome.SUCCEEDED, *, arrived: bool = False) -> Any:
        fence = self.requests[request_id].fence
        reachable = self.host_reachable
        return self._keep(
            finish(
                self.instance,
                request_id,
                fence,
                outcome,
                self.policy,
                self.now_ms,
                arrived=arrived,
                host_reachable=reachable,
            )
        )

    def observe(self, event: GuestEvent) -> None:
        self._keep(observe(self.instance, event, self.policy, self.now_ms, host_reachable=self.host_reachable))

    def advance(self, milliseconds: int) -> None:
        self.now_ms += milliseconds
        self._keep(expire(self.instance, self.policy, self.now_ms, host_reachable=self.host_reachable))


def dispositions(
    start: Instance, role: Role, by: str, policy: CompiledPolicy, now_ms: int, *, host_reachable: bool
) -> dict[Operation, Disposition]:
    """What each operation would be answered now, asked without parameters."""
    return {
        operation: admit_there(
            start,
            Submission(
                request_id="judged", operation=operation, requested_by=by, role=role, host_reachable=host_reachable
            ),
            policy,
            now_ms,
        ).answer
        for operation in Operation
    }


def said(answer: Disposition) -> tuple[str, str | None]:
    """An answer in two words: what it is, and why."""
    match answer:
        case Admitted():
            return "admitted", None
        case Redundant(reason=reason):
            return "redundant", reason
        case Denied(reason=reason):
            return "denied", reason
        case Held(denied=denied):
            return "held", denied.reason
