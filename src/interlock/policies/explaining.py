"""Why an operation gets the answer it gets, and which operations would be admitted now.

Nothing is decided here: the gate is asked, and what the rules said on the way is put into words. The words of a single
condition are here too, because the core has no use for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import msgspec

from interlock.core.admission import judge, look
from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, Lane, Operation
from interlock.core.policy import GONE, NO_RULE, CompiledPolicy, Rule, Verdict, View
from interlock.core.records import Admitted, Disposition, Instance, Request, Status, Submission
from interlock.core.request_queue import foresee
from interlock.core.states import NO_TASK, VmState
from interlock.policies.durations import format_seconds

NOT_SUBMITTED: Final = "not-submitted"
"""The id of a request that is judged and never kept."""


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """One rule that was asked."""

    rule: str
    source: str
    """Where it stands: `file:line`; empty for a rule that is not written anywhere."""
    verdict: Verdict
    matched: bool
    failed: str | None = None
    """The first condition that does not hold: its key, what the rule wants, and what was found; None if it matched."""
    key: str | None = None
    """The key of that condition alone."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """The way to one answer."""

    disposition: Disposition
    tried: tuple[Tried, ...]
    """The rules about the operation, in the order asked, up to the one that decided."""
    foreseen: VmState | None = None
    """The state in which it had to be permitted too, if it came to that."""
    tried_foreseen: tuple[Tried, ...] = ()
    """The same rules, asked of that state."""


def explain(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Explanation:
    """The answer that the submission would get now, with every rule that was asked for it."""
    view = look(instance, submission, now_ms)
    disposition = judge(instance, submission, policy, now_ms)
    tried, decided = _ask(policy, view)
    queued = any(request.lane is Lane.STATE for request in instance.outstanding)
    if decided.verdict is not Verdict.ADMIT or not decided.in_turn or not queued or _is_record(submission.operation):
        return Explanation(disposition=disposition, tried=tried)
    there = foresee(instance)
    settled = View(
        view.operation,
        there.vm_state,
        NO_TASK,
        role=submission.role,
        tags=instance.tags,
        hard=view.hard,
        launched=there.launched,
    )
    tried_foreseen, _ = _ask(policy, settled)
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
    """An instance that there need not be, to ask about: in that task since `running_ms`, silent since `silent_ms`."""
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
        role="admin",
        rule="imagined",
        admitted_at_ms=at_ms,
    )


def dispositions(
    instance: Instance,
    role: str,
    by: str,
    policy: CompiledPolicy,
    now_ms: int,
    *,
    host_reachable: bool,
    operations: Iterable[Operation] = tuple(Operation),
) -> dict[Operation, Disposition]:
    """The answer that each operation would get now from this caller, asked without parameters.

    `host_reachable` is false where the guests of the instance's host have ended for certain.
    """
    return {
        operation: judge(
            instance,
            Submission(
                request_id=NOT_SUBMITTED,
                operation=operation,
                requested_by=by,
                role=role,
                host_reachable=host_reachable,
            ),
            policy,
            now_ms,
        )
        for operation in operations
    }


def granted(answers: dict[Operation, Disposition]) -> tuple[Operation, ...]:
    """The operations that would be admitted, in the order of the catalogue."""
    return tuple(operation for operation, answer in answers.items() if isinstance(answer, Admitted))


def _is_record(operation: Operation) -> bool:
    return CATALOGUE[operation].lane is Lane.RECORD


def _ask(policy: CompiledPolicy, view: View) -> tuple[tuple[Tried, ...], Rule]:
    if view.vm_state is VmState.DELETED:
        return (_tried(GONE, None),), GONE
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
    """One condition of a rule, held against what there is."""

    key: str
    holds: bool
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.key}: wants {self.wanted}, found {self.found}"


def _checks(rule: Rule, view: View) -> Iterator[_Check]:
    """The conditions of a rule in the order in which the core asks them; those that always hold are left out."""
    if rule.vm_states is not None:
        wanted = _any_of(state.value for state in rule.vm_states)
        yield _Check("vm_state", view.vm_state in rule.vm_states, wanted, view.vm_state.value)
    if rule.task_states is not None:
        yield _Check("task_state", view.task_state in rule.task_states, _any_of(rule.task_states), view.task_state)
    for key, kinds, mask in (("outstanding", rule.outstanding, view.outstanding), ("held", rule.held, view.held)):
        if kinds is not None:
            yield _kinds(key, kinds, mask)
    if rule.roles is not None:
        yield _Check("roles", view.role in rule.roles, _any_of(rule.roles), view.role)
    for key, flag, found_flag in (
        ("locked", rule.locked, view.locked),
        ("blocked", rule.blocked, view.blocked),
        ("host_reachable", rule.host_reachable, view.host_reachable),
        ("hard", rule.hard, view.hard),
        ("launched", rule.launched, view.launched),
    ):
        if flag is not None:
            yield _Check(key, found_flag is flag, str(flag).lower(), str(found_flag).lower())
    if rule.tags is not None:
        found = ", ".join(view.tags) or "none"
        yield _Check("tags", not rule.tags.isdisjoint(view.tags), _any_of(rule.tags), found)
    if rule.silent_ms_min is not None:
        found = format_seconds(view.silent_ms)
        yield _Check("silent_for", view.silent_ms >= rule.silent_ms_min, format_seconds(rule.silent_ms_min), found)


def _kinds(key: str, kinds: frozenset[Operation], mask: int) -> _Check:
    there = [operation for operation in Operation if mask & BIT[operation]]
    holds = not kinds.isdisjoint(there) if kinds else not there
    wanted = _any_of(operation.value for operation in kinds) if kinds else "nothing"
    return _Check(key, holds, wanted, ", ".join(operation.value for operation in there) or "nothing")


def _any_of(words: Iterable[str]) -> str:
    shown = sorted(words)
    return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"
