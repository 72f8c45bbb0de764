"""Held requests: denied for now, and evaluated again whenever the result may have changed.

`admission` holds a submission; `lifecycle.expire` decides when held requests are evaluated again.
"""

from __future__ import annotations

from typing import Any

from interlock.core.admission import admit_there
from interlock.core.conditions import CALLER
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Change, Event, Instance, Redundant, Request, Status, Submission
from interlock.core.request_queue import Draft, replace


def judge_held(
    instance: Instance, policy: CompiledPolicy, now_ms: int, *, host_reachable: bool
) -> Change[tuple[str, ...]]:
    """Evaluate held requests in order: admit what the policy allows now, and cancel those whose hold has expired.

    Return the ids of those no longer held. A request that has become redundant ends too.
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


def refuse_name(
    instance: Instance, policy: CompiledPolicy, now_ms: int, because: str, *, host_reachable: bool
) -> Change[bool]:
    """Cancel the held request whose admission now would give the instance another name, since that name is taken.

    The answer is whether there is one.
    """
    state, held = instance, list(instance.held)
    while held:
        for request in held:
            change = _judge_one_held(state, _submission(request, host_reachable), request, policy, now_ms)
            if change is not None:
                break
        else:
            break
        if change.instance.name != instance.name:
            draft = Draft(instance, now_ms)
            draft.end(request, Status.CANCELLED, "name_taken", because)
            return draft.change(True)
        state = change.instance
        held.remove(request)
    return Change(instance=instance, answer=False)


def _judge_one_held(
    instance: Instance, submission: Submission, request: Request, policy: CompiledPolicy, now_ms: int
) -> Change[Any] | None:
    """Admit or end a held request; return None if it stays held."""
    alone = replace(instance, held=tuple(other for other in instance.held if other.id != request.id))
    change = admit_there(alone, submission, policy, now_ms)
    answer = change.answer
    if isinstance(answer, Admitted):
        return change
    draft = Draft(instance, now_ms)
    if isinstance(answer, Redundant) and answer.request is None:
        draft.end(request, Status.CANCELLED, answer.reason, answer.because)
    elif now_ms >= (request.held_until_ms or 0):
        draft.end(request, Status.CANCELLED, "hold_expired", "The hold expired before the policy admitted it.")
    else:
        return None
    return draft.change(None)


def _next_judged_ms(
    instance: Instance, submission: Submission, request: Request, policy: CompiledPolicy, now_ms: int
) -> int:
    """Return the next time at which it may be admitted without any other change, or expires."""
    alone = replace(instance, held=tuple(other for other in instance.held if other.id != request.id))
    wait_ms = policy.changes_in_ms(policy.view(alone, submission, now_ms), now_ms)
    until_ms = request.held_until_ms or now_ms
    return until_ms if wait_ms is None else min(until_ms, now_ms + wait_ms)


def _submission(held: Request, host_reachable: bool) -> Submission:
    return Submission(
        request_id=held.id,
        operation=held.operation,
        parameters=held.parameters,
        **{condition.reads: getattr(held, condition.reads) for condition in CALLER},
        image=held.image,
        host_reachable=host_reachable,
    )
