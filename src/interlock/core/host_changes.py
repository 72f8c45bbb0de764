"""Effects on an instance of its host being fenced, recovering, or being renamed."""

from __future__ import annotations

from interlock.core import lifecycle
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Change, Instance
from interlock.core.request_queue import Draft, judge_again, replace


def note_host(
    instance: Instance, what: str, policy: CompiledPolicy, now_ms: int, *, host_reachable: bool, by: str | None = None
) -> Change[tuple[str, ...]]:
    """Record that the instance's host was fenced or is back, and re-evaluate the queue; return the cancelled ids.

    `what` is the kind of the event, and `by` who reported it. Requests in flight go on.
    """
    draft = Draft(instance, now_ms, host_reachable=host_reachable)
    draft.emit(f"instance.{what}", None, host=instance.host, by=by)
    return draft.change(judge_again(draft, policy))


def rename_host(instance: Instance, name: str, now_ms: int) -> Change[Instance]:
    """Record the host's new name in the instance; the instance has not moved.

    Its worker is fenced, since it addresses the host by name, and another host may take the old name.
    """
    adopted = lifecycle.adopt(instance, now_ms)
    draft = Draft(adopted.instance, now_ms)
    draft.generation = instance.generation + 1
    draft.instance = replace(adopted.instance, host=name)
    draft.emit("instance.host_renamed", None, host=name, before=instance.host)
    renamed = draft.change(None)
    return Change(
        instance=renamed.instance,
        requests=(*adopted.requests, *renamed.requests),
        events=(*adopted.events, *renamed.events),
        answer=renamed.instance,
    )
