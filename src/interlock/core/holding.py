"""What is held: refused for now, and judged again whenever something may have changed for it.

Holding a submission is the gate's (see `admission`); when this is called is `lifecycle.expire`'s.
"""

from __future__ import annotations

from typing import Any

from interlock.core.admission import admit, look
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Change, Event, Instance, Redundant, Request, Status, Submission
from interlock.core.request_queue import Draft, replace


def judge_held(
    instance: Instance, policy: CompiledPolicy, now_ms: int, *, host_reachable: bool
) -> Change[tuple[str, ...]]:
    """Judge what is held, in the order held: admit what the policy allows now, and give up what has waited too long.

    The answer is the ids of those that are held no longer. What holds already, without anyone doing it, ends too.
    """
    before, requests, events, settled = instance, dict[str, Request](), list[Event](), list[str]()
    while True:
        for request in instance.held:
            change = _judge_one_held(instance, _submission(request, host_reachable), request, policy, now_ms)
            if change is not None:
                break
        else:
            break
        instance = change.instance
        requests.update((one.id, one) for one in change.requests)
        events.extend(change.events)
        settled.append(request.id)
    due_ms = [
        _next_judged_ms(instance, _submission(request, host_reachable), request, policy, now_ms)
        for request in instance.held
    ]
    generation = instance.generation if settled else before.generation + 1
    return Change(
        instance=replace(instance, held_due_ms=min(due_ms, default=None), generation=generation),
        requests=tuple(requests.values()),
        events=tuple(events),
        answer=tuple(settled),
    )


def _judge_one_held(
    instance: Instance, submission: Submission, request: Request, policy: CompiledPolicy, now_ms: int
) -> Change[Any] | None:
    """What becomes of a held request now; None if it goes on waiting."""
    alone = replace(instance, held=tuple(other for other in instance.held if other.id != request.id))
    change = admit(alone, submission, policy, now_ms)
    answer = change.answer
    if isinstance(answer, Admitted):
        return change
    draft = Draft(instance, now_ms)
    if isinstance(answer, Redundant) and answer.request is None:
        draft.end(request, Status.CANCELLED, answer.reason, answer.because)
    elif now_ms >= (request.held_until_ms or 0):
        draft.end(request, Status.CANCELLED, "hold_expired", "The policy did not admit it in time.")
    else:
        return None
    return draft.change(None)


def _next_judged_ms(
    instance: Instance, submission: Submission, request: Request, policy: CompiledPolicy, now_ms: int
) -> int:
    """When time alone may have it admitted, or ends it."""
    alone = replace(instance, held=tuple(other for other in instance.held if other.id != request.id))
    wait_ms = policy.changes_in_ms(look(alone, submission, now_ms))
    until_ms = request.held_until_ms or now_ms
    return until_ms if wait_ms is None else min(until_ms, now_ms + wait_ms)


def _submission(held: Request, host_reachable: bool) -> Submission:
    return Submission(
        request_id=held.id,
        operation=held.operation,
        parameters=held.parameters,
        requested_by=held.requested_by,
        role=held.role,
        host_reachable=host_reachable,
    )
