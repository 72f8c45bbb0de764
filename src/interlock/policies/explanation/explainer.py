"""Explanations of decisions: the rules evaluated, each with the condition that failed, and what would be admitted.

The gate decides; this describes the rules on the way, and words conditions. Every single change with which the
submission would be admitted is tried at the gate; none is inferred from the rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Final, NamedTuple

import msgspec

from interlock.core import lifecycle
from interlock.core.admission import judge
from interlock.core.condition_kinds import Choice, one_of
from interlock.core.conditions import CALLER, CONDITIONS
from interlock.core.durations import format_seconds
from interlock.core.evaluation import would_admit
from interlock.core.operations import CATALOGUE, TASK_OPERATION, Lane, Operation
from interlock.core.policy import GONE, NO_RULE, TO_BE_DELETED, CompiledPolicy, Rule, Verdict
from interlock.core.records import (
    SERVED,
    Admitted,
    Denied,
    Disposition,
    Instance,
    Outcome,
    Redundant,
    Request,
    StaleFence,
    Status,
    Submission,
)
from interlock.core.request_queue import foresee
from interlock.core.roles import Role
from interlock.core.state_stack import resolve_target
from interlock.core.states import NO_TASK, VmState
from interlock.core.view_classes import members_of
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


_MOMENTS_MAX: Final = 64
"""How many age bounds are tried; a policy has far fewer for one state."""
_replace = msgspec.structs.replace


class Turn(StrEnum):
    """The kinds of change but of the caller: the nearest and cheapest first."""

    TIME = "time"
    HARD = "hard"
    TASK_OVER = "task_over"
    NOTHING_WAITS = "nothing_waits"
    NOTHING_OUTSTANDING = "nothing_outstanding"
    NOTHING_HELD = "nothing_held"
    UNLOCKED = "unlocked"
    UNBLOCKED = "unblocked"
    WITHOUT_TAG = "without_tag"
    WITH_TAG = "with_tag"
    VM_STATE = "vm_state"
    LOCKED = "locked"
    HOST_REACHABLE = "host_reachable"
    LAUNCHED = "launched"


TURNS: Final = (
    *tuple(Turn)[: tuple(Turn).index(Turn.WITH_TAG) + 1],
    *(condition.reads for condition in CALLER),
    *tuple(Turn)[tuple(Turn).index(Turn.WITH_TAG) + 1 :],
)
"""Every `Way.turn`, in order of presentation."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One change after which the submission would be admitted."""

    turn: str
    """One of `Turn`, or the field of the caller that is another."""
    value: str | bool | None = None
    """The tag, value of the caller, vm_state or value of the flag; or the request that has to end."""
    at_ms: int | None = None
    """For `time`: when it is admitted."""
    if_silent: bool = False
    """Whether `at_ms` holds only if what is in flight makes no progress until then."""
    latest_ms: int | None = None
    """When it is admitted also if that makes progress for ever; None: unknown."""
    rule: str
    """The rule that would admit it."""
    by: tuple[Operation, ...] = ()
    """For `vm_state`: the operations that lead there and would be admitted now."""
    text: str
    """The same for people."""


def ways(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> tuple[Way, ...]:
    """Yield every single change with which it would be admitted, nearest first; none if it is admitted now."""
    if instance.vm_state is VmState.DELETED or would_admit(instance, submission, policy, now_ms):
        # Nothing leads out of a deletion.
        return ()
    found = [*_in_time(instance, submission, policy, now_ms)]
    for turn, value, text, changed, asked in _changes(instance, submission, policy, now_ms):
        answer = judge(changed, asked, policy, now_ms)
        if isinstance(answer, Admitted):
            by = _leading_to(value, instance, submission, policy, now_ms) if turn is Turn.VM_STATE else ()
            found.append(Way(turn=turn, value=value, rule=answer.rule, by=by, text=text))
    return tuple(sorted(found, key=lambda way: (TURNS.index(way.turn), not way.by)))


def _in_time(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Iterator[Way]:
    answer = judge(instance, submission, policy, now_ms)
    named_ms = answer.allowed_at_ms if isinstance(answer, Denied | Redundant) else None
    for at_ms in _moments(named_ms, instance, submission, policy, now_ms):
        # By then, what may be served for a limited time only may have been fenced.
        later = judge(_expired(instance, policy, at_ms), submission, policy, at_ms)
        if isinstance(later, Admitted):
            if_silent, latest_ms = bool(_served(instance)), None
            if isinstance(answer, Denied | Redundant) and at_ms == named_ms:
                if_silent, latest_ms = answer.allowed_if_silent, answer.allowed_latest_at_ms
            text = f"in {format_seconds(at_ms - now_ms)}" + (", if nothing makes progress until then" * if_silent)
            yield Way(turn=Turn.TIME, at_ms=at_ms, if_silent=if_silent, latest_ms=latest_ms, rule=later.rule, text=text)
            return


def _moments(
    named_ms: int | None, instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int
) -> Iterator[int]:
    """Yield the time that the answer names, and then those at which the rules' answer changes."""
    if named_ms is not None:
        yield named_ms
    at_ms = now_ms
    for _ in range(_MOMENTS_MAX):
        wait_ms = policy.changes_in_ms(policy.view(instance, submission, at_ms), at_ms)
        if wait_ms is None:
            return
        at_ms += wait_ms
        yield at_ms


def _expired(instance: Instance, policy: CompiledPolicy, at_ms: int) -> Instance:
    """Return the instance at a time, if nothing happens until then but what is due."""
    while (due_ms := lifecycle.next_deadline_ms(instance)) is not None and due_ms <= at_ms:
        instance = lifecycle.expire(instance, policy, due_ms).instance
    return instance


def _served(instance: Instance) -> tuple[Request, ...]:
    return tuple(request for request in instance.outstanding if request.status in SERVED)


_Changed = tuple[str, str | bool | None, str, Instance, Submission]


def _changes(
    instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int
) -> Iterator[_Changed]:  # fmt: skip
    hard = submission.parameters.get("hard") is True
    if CATALOGUE[submission.operation].hard_phases or hard:
        asked = _replace(submission, parameters={**submission.parameters, "hard": not hard})
        yield (
            Turn.HARD,
            not hard,
            f"if the {'soft' if hard else 'hard'} variant is requested",
            instance,
            asked,
        )
    yield from _queue(instance, submission, policy, now_ms)
    yield from _instance(instance, submission, policy)
    about = [rule for rule in policy.rules if submission.operation in rule.operations]
    for condition in CALLER:
        if isinstance(condition.kind, Choice):
            for value in condition.kind.values(condition.wanted(about)):
                asked = _replace(submission, **{condition.reads: value})
                text = f"if requested {condition.because(value)}"
                yield condition.reads, condition.kind.found(value), text, instance, asked
    other = not submission.host_reachable
    asked = _replace(submission, host_reachable=other)
    yield Turn.HOST_REACHABLE, other, f"if its host {'can' if other else 'cannot'} be reached", instance, asked
    for state in VmState:
        if state not in (instance.vm_state, VmState.DELETED):
            # `launched` stays as it is, and the guest is as it belongs to the vm_state.
            launched_at_ms = instance.updated_at_ms if instance.launched else None
            power_state = power_in(state, instance.state_stack)
            changed = _replace(instance, vm_state=state, launched_at_ms=launched_at_ms, power_state=power_state)
            yield Turn.VM_STATE, state.value, f"if it is {state.value}", changed, submission


def _queue(
    instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int
) -> Iterator[_Changed]:  # fmt: skip
    for request in _served(instance):
        over = lifecycle.finish(
            instance,
            request.id,
            request.fence,
            Outcome.SUCCEEDED,
            policy,
            now_ms,
            host_reachable=submission.host_reachable,
        )
        if not isinstance(over.answer, StaleFence):
            text = f"once {_named(request)} has succeeded, and left it {over.instance.vm_state.value}"
            yield Turn.TASK_OVER, request.id, text, over.instance, submission
    served = _served(instance)
    if served and len(served) < len(instance.outstanding):
        changed = _replace(instance, outstanding=served)
        yield Turn.NOTHING_WAITS, None, "if nothing is queued behind the operation in progress", changed, submission
    if instance.outstanding:
        changed = _replace(instance, outstanding=())
        text = f"if nothing is outstanding, and it is {instance.vm_state.value} as now"
        yield Turn.NOTHING_OUTSTANDING, None, text, changed, submission
    if instance.held:
        changed = _replace(instance, held=(), held_due_ms=None)
        yield Turn.NOTHING_HELD, None, "if nothing is held", changed, submission


def _named(request: Request) -> str:
    return f"{request.operation.value} ({request.id})"


def _instance(instance: Instance, submission: Submission, policy: CompiledPolicy) -> Iterator[_Changed]:
    if instance.locked_by is None:
        yield Turn.LOCKED, True, "if it is locked", _replace(instance, locked_by="somebody"), submission
    else:
        by = "" if submission.role.includes(instance.lock_role) else " by an admin"
        yield Turn.UNLOCKED, None, f"if it is unlocked{by}", _replace(instance, locked_by=None), submission
    blocked = instance.blocked_operations
    if submission.operation in blocked:
        left = tuple(operation for operation in blocked if operation is not submission.operation)
        text = f"if its list of blocked operations does not name {submission.operation.value}"
        yield Turn.UNBLOCKED, None, text, _replace(instance, blocked_operations=left), submission
    for tag in instance.tags:
        tags = tuple(other for other in instance.tags if other != tag)
        text = f"if it has no tag {tag!r}{_who_may(policy, tag)}"
        yield Turn.WITHOUT_TAG, tag, text, _replace(instance, tags=tags), submission
    about = [rule for rule in policy.rules if submission.operation in rule.operations]
    named = set(members_of("tags", about))
    for tag in sorted(named.difference(instance.tags)):
        changed = _replace(instance, tags=(*instance.tags, tag))
        yield Turn.WITH_TAG, tag, f"if it has the tag {tag!r}{_who_may(policy, tag)}", changed, submission
    if not instance.launched:
        yield Turn.LAUNCHED, True, "if it has run before", _replace(instance, launched_at_ms=0), submission


def _who_may(policy: CompiledPolicy, tag: str) -> str:
    return ", which only an admin may set or remove" if policy.protected((tag,)) else ""


def _leading_to(
    state: str | bool | None, instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int
) -> tuple[Operation, ...]:
    """Return the operations that lead to the vm_state and would be admitted for the same caller now."""
    return tuple(
        operation
        for operation, entry in CATALOGUE.items()
        if entry.lane is Lane.STATE
        and resolve_target(operation, instance.vm_state, instance.state_stack)[0] == state
        and would_admit(instance, _replace(submission, operation=operation, parameters={}), policy, now_ms)
    )
