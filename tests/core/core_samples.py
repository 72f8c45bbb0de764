"""Policies and instances that the tests of the core are written against."""

from __future__ import annotations

from typing import Any

from interlock.core.admission import admit
from interlock.core.lifecycle import take
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import Before, CompiledPolicy, Policy, Rule, Verdict
from interlock.core.records import Admitted, Change, Disposition, Instance, Request, StaleFence, Submission
from interlock.core.states import VmState

O = Operation  # noqa: E741
V = VmState

STUCK_MS = 180_000
GRACE_MS = 10_000
START_MS = 1_000_000


def rule(identity: str, operations: set[Operation] | frozenset[Operation], verdict: Verdict, **more: Any) -> Rule:
    return Rule(id=identity, operations=frozenset(operations), verdict=verdict, **more)


def _allowed_in(operation: Operation, *vm_states: VmState, **more: Any) -> Rule:
    identity = f"{operation.value}-allowed"
    return rule(identity, {operation}, Verdict.ADMIT, vm_states=frozenset(vm_states), **more)


COMPONENTS = frozenset(operation for operation, entry in CATALOGUE.items() if entry.lane is Lane.COMPONENT)
BUSY = frozenset(phase for entry in CATALOGUE.values() for phase in entry.phases + entry.hard_phases)
_STATE_CHANGES = frozenset(operation for operation, entry in CATALOGUE.items() if entry.lane is Lane.STATE)
_CHANGES = _STATE_CHANGES | COMPONENTS

GUARD = (
    rule(
        "delete-again",
        {O.DELETE},
        Verdict.AFTER,
        outstanding=frozenset({O.DELETE}),
        threshold_ms=STUCK_MS,
        before=Before.REDUNDANT,
        reason="stuck",
    ),
    rule("delete-always", {O.DELETE}, Verdict.PREEMPT, grace_ms=GRACE_MS),
    rule("on-its-way", {O.STOP, O.START, O.REBOOT}, Verdict.DENY, outstanding=frozenset({O.DELETE}), reason="deleting"),
)
PLAIN = (
    rule("records", {O.LOCK, O.UNLOCK, O.RESET_STATE}, Verdict.ADMIT),
    rule("stuck-reboot", {O.REBOOT}, Verdict.AFTER, task_states=frozenset({"rebooting", "rebooting_hard"}),
         threshold_ms=STUCK_MS, reason="rebooting"),
    rule("stop-again", {O.STOP}, Verdict.REDUNDANT, outstanding=frozenset({O.STOP})),
    rule("start-again", {O.START}, Verdict.REDUNDANT, outstanding=frozenset({O.START})),
    rule("halt-pending", {O.REBOOT}, Verdict.DENY, outstanding=frozenset({O.STOP}), reason="halt_pending"),
    rule("stop-a-start", {O.STOP}, Verdict.PREEMPT, task_states=frozenset({"powering_on"}), grace_ms=GRACE_MS),
    rule("in-turn", _CHANGES, Verdict.ADMIT, outstanding=_STATE_CHANGES),
    _allowed_in(O.CREATE, V.BUILDING, outstanding=frozenset()),
    _allowed_in(O.START, V.STOPPED, V.ERROR),
    _allowed_in(O.STOP, V.ACTIVE, V.PAUSED, V.ERROR),
    _allowed_in(O.REBOOT, V.ACTIVE, V.PAUSED, V.STOPPED, V.ERROR),
    _allowed_in(O.PAUSE, V.ACTIVE),
    _allowed_in(O.UNPAUSE, V.PAUSED),
    _allowed_in(O.SUSPEND, V.ACTIVE, V.PAUSED),
    _allowed_in(O.RESUME, V.SUSPENDED),
    _allowed_in(O.RESCUE, V.ACTIVE, V.STOPPED),
    _allowed_in(O.UNRESCUE, V.RESCUED),
    _allowed_in(O.RESIZE, V.ACTIVE, V.STOPPED),
    _allowed_in(O.CONFIRM_RESIZE, V.RESIZED),
    _allowed_in(O.REVERT_RESIZE, V.RESIZED),
    _allowed_in(O.SHELVE, V.ACTIVE, V.STOPPED, V.PAUSED, V.SUSPENDED),
    _allowed_in(O.SHELVE_OFFLOAD, V.SHELVED),
    _allowed_in(O.UNSHELVE, V.SHELVED, V.SHELVED_OFFLOADED),
    _allowed_in(O.SOFT_DELETE, *(set(V) - {V.SOFT_DELETED, V.DELETED, V.MIGRATED_OUT})),
    _allowed_in(O.RESTORE, V.SOFT_DELETED),
    rule("components", COMPONENTS, Verdict.ADMIT, vm_states=frozenset({V.ACTIVE, V.PAUSED, V.STOPPED})),
)  # fmt: skip

ORDINARY = Policy(name="ordinary", rules=(*GUARD, *PLAIN), outstanding_max=8)
"""A small policy in which every verdict occurs."""


def compiled(*rules: Rule, outstanding_max: int = 8) -> CompiledPolicy:
    return CompiledPolicy(Policy(name="for a test", rules=rules, outstanding_max=outstanding_max))


def instance_in(vm_state: VmState = VmState.ACTIVE, **more: Any) -> Instance:
    fields: dict[str, Any] = {"fence": 1, "updated_at_ms": START_MS, "vm_state": vm_state} | more
    return Instance(id="i-1", name="web", project="p", host="h", **fields)


def ask(operation: Operation, request_id: str = "r1", **more: Any) -> Submission:
    return Submission(request_id=request_id, operation=operation, requested_by="ada", **more)


def serving(operation: Operation, vm_state: VmState = VmState.ACTIVE, *, now_ms: int = START_MS) -> Instance:
    """An instance for which a worker serves `operation` as request `r0`, taken at `now_ms`."""
    entry = CATALOGUE[operation]
    request = Request(
        id="r0", instance_id="i-1", operation=operation, requested_by="bob", rule="earlier", admitted_at_ms=now_ms,
    )  # fmt: skip
    waiting = instance_in(vm_state, outstanding=(request,))
    taken = take(waiting, entry.lane, now_ms).instance
    assert taken.outstanding[0].taken_at_ms == now_ms
    return taken


def admitted(change: Change[Disposition]) -> Admitted:
    assert isinstance(change.answer, Admitted), change.answer
    return change.answer


def queue(instance: Instance, policy: CompiledPolicy, *operations: Operation, now_ms: int = START_MS) -> Instance:
    """Admit `operations` one after the other as `q1`, `q2` and so on."""
    for number, operation in enumerate(operations, 1):
        change = admit(instance, ask(operation, f"q{number}"), policy, now_ms)
        admitted(change)
        instance = change.instance
    return instance


def accepted(change: Change[Request | StaleFence]) -> Request:
    assert isinstance(change.answer, Request), change.answer
    return change.answer


def waiting_for(instance: Instance) -> list[str]:
    return [request.operation.value for request in instance.outstanding]


def kinds_told(change: Change[Any]) -> list[str]:
    return [event.kind for event in change.events]
