"""Explanations of decisions: the rules evaluated, each with the condition that failed, and operations admitted now.

The gate decides; this describes the rules on the way, and words conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import msgspec

from interlock.core.admission import judge
from interlock.core.condition_kinds import one_of
from interlock.core.conditions import CONDITIONS
from interlock.core.operations import CATALOGUE, TASK_OPERATION, Lane, Operation
from interlock.core.policy import GONE, NO_RULE, TO_BE_DELETED, CompiledPolicy, Rule, Verdict
from interlock.core.records import Admitted, Disposition, Instance, Request, Status, Submission
from interlock.core.request_queue import foresee
from interlock.core.roles import Role
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import View, build_view, power_in

NOT_SUBMITTED: Final = "not-submitted"
"""The id of a request that is judged and never kept."""


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """One rule that was evaluated."""

    rule: str
    source: str
    """`file:line`; empty for a rule that is not in a file."""
    verdict: Verdict
    matched: bool
    failed: str | None = None
    """The first condition that failed: key, expected and found; None if the rule matched."""
    key: str | None = None
    """The key of that condition alone."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """The explanation of one answer."""

    disposition: Disposition
    tried: tuple[Tried, ...]
    """The rules about the operation, in order of evaluation, up to the one that decided."""
    foreseen: VmState | None = None
    """The foreseen state, if it had to be permitted there too."""
    tried_foreseen: tuple[Tried, ...] = ()
    """The same rules, evaluated on the foreseen state."""


def explain(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Explanation:
    """Return the answer that the submission would get now, with every rule that was evaluated."""
    submission = policy.timed(submission, now_ms)
    view = build_view(instance, submission, now_ms)
    disposition = judge(instance, submission, policy, now_ms)
    tried, decided = _ask(policy, view)
    queued = any(request.lane is Lane.STATE for request in instance.outstanding)
    if decided.verdict is not Verdict.ADMIT or not decided.in_turn or not queued or _is_record(submission.operation):
        return Explanation(disposition=disposition, tried=tried)
    there = foresee(instance, host_reachable=submission.host_reachable)
    tried_foreseen, _ = _ask(policy, there.view(submission, now_ms), TO_BE_DELETED)
    return Explanation(disposition=disposition, tried=tried, foreseen=there.vm_state, tried_foreseen=tried_foreseen)


def imagined(
    vm_state: VmState,
    task_state: str,
    now_ms: int,
    *,
    silent_ms: int = 0,
    running_ms: int = 0,
    waiting: Iterable[Operation] = (),
    held: Iterable[Operation] = (),
    locked: bool = False,
    blocked: Iterable[Operation] = (),
    tags: Iterable[str] = (),
    launched: bool = True,
) -> Instance:
    """Build a hypothetical instance, in a task since `running_ms`, silent since `silent_ms`."""
    running_ms = max(running_ms, silent_ms)
    requests = []
    if task_state != NO_TASK:
        requests.append(_imagined_request(TASK_OPERATION[task_state], "r1", now_ms - running_ms))
        taken = {"status": Status.IN_FLIGHT, "phase": task_state, "taken_at_ms": now_ms - running_ms}
        if task_state in CATALOGUE[TASK_OPERATION[task_state]].hard_phases:
            taken["parameters"] = {"hard": True}
        requests[0] = msgspec.structs.replace(requests[0], **taken, last_progress_at_ms=now_ms - silent_ms)
    for number, operation in enumerate(waiting, start=len(requests) + 1):
        requests.append(_imagined_request(operation, f"r{number}", now_ms))
    return Instance(
        id="imagined",
        name="imagined",
        project="imagined",
        host="imagined",
        vm_state=vm_state,
        power_state=power_in(vm_state, ()),
        created_at_ms=now_ms - running_ms,
        updated_at_ms=now_ms - silent_ms,
        launched_at_ms=now_ms - running_ms if launched else None,
        locked_by="somebody" if locked else None,
        blocked_operations=tuple(blocked),
        tags=tuple(tags),
        outstanding=tuple(requests),
        held=tuple(
            msgspec.structs.replace(_imagined_request(operation, f"h{number}", now_ms), status=Status.HELD)
            for number, operation in enumerate(held, start=1)
        ),
    )


def _imagined_request(operation: Operation, request_id: str, at_ms: int) -> Request:
    return Request(
        id=request_id,
        instance_id="imagined",
        operation=operation,
        requested_by="somebody",
        role=Role.ADMIN,
        rule="imagined",
        admitted_at_ms=at_ms,
    )


def granted(answers: dict[Operation, Disposition]) -> tuple[Operation, ...]:
    """Return the operations that would be admitted, in the order of the catalogue."""
    return tuple(operation for operation, answer in answers.items() if isinstance(answer, Admitted))


def _is_record(operation: Operation) -> bool:
    return CATALOGUE[operation].lane is Lane.RECORD


def _ask(policy: CompiledPolicy, view: View, of_deleted: Rule = GONE) -> tuple[tuple[Tried, ...], Rule]:
    if view.vm_state is VmState.DELETED:
        return (_tried(of_deleted, None),), of_deleted
    tried = []
    for rule in policy.rules:
        if view.operation not in rule.operations:
            continue
        failed = next((check for check in _checks(rule, view) if not check.holds), None)
        tried.append(_tried(rule, failed))
        if failed is None:
            return tuple(tried), rule
    tried.append(_tried(NO_RULE, None))
    return tuple(tried), NO_RULE


def _tried(rule: Rule, failed: _Check | None) -> Tried:
    return Tried(
        rule=rule.id,
        source=rule.source,
        verdict=rule.verdict,
        matched=failed is None,
        failed=None if failed is None else str(failed),
        key=None if failed is None else failed.key,
    )


class _Check(NamedTuple):
    """One condition of a rule, with the value found."""

    key: str
    holds: bool
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.key}: wants {self.wanted}, found {self.found}"


def _checks(rule: Rule, view: View) -> Iterator[_Check]:
    """Yield the conditions of a rule in the core's order; those that always hold are left out."""
    if rule.vm_states is not None:
        wanted = one_of(state.value for state in rule.vm_states)
        yield _Check("vm_state", view.vm_state in rule.vm_states, wanted, view.vm_state.value)
    if rule.task_states is not None:
        yield _Check("task_state", view.task_state in rule.task_states, one_of(rule.task_states), view.task_state)
    for condition in CONDITIONS:
        value = condition.of(rule)
        if value is not None:
            kind, found = condition.kind, condition.value(view)
            yield _Check(condition.key, bool(kind.test(value)(found)), kind.wanted(value), kind.found(found))
