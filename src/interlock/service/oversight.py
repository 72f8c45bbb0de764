"""What is true of all instances together: how many there are in which state, and which of them are stuck."""

from __future__ import annotations

from collections.abc import Callable

from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.records import Admitted
from interlock.policies import explaining
from interlock.ports import Role, Store, every_instance
from interlock.service.answers import Stuck
from interlock.service.callers import Caller


async def stuck(
    store: Store, policy: CompiledPolicy, caller: Caller | None, reachable: Callable[[str], bool]
) -> tuple[Stuck, ...]:
    """The caller's instances (None: those of all projects) that something could take over now, longest silent first.

    `reachable` says of a host's name whether its guests may still run.
    """
    by = "" if caller is None else caller.name
    found = []
    takeovers = {rule.id for rule in policy.rules if rule.verdict is Verdict.AFTER}
    for instance in await store.unsettled():
        serving = next((one for one in instance.outstanding if one.last_progress_at_ms is not None), None)
        if serving is None or (caller is not None and instance.project != caller.project):
            continue
        answers = explaining.dispositions(
            instance, Role.ADMIN.value, by, policy, store.now_ms(), host_reachable=reachable(instance.host)
        )
        admitted = {op: one for op, one in answers.items() if isinstance(one, Admitted)}
        over = tuple(op for op, one in admitted.items() if one.rule in takeovers)
        if over:
            found.append(
                Stuck(
                    instance=instance,
                    request=serving,
                    silent_since_ms=serving.last_progress_at_ms or 0,
                    allowed=tuple(admitted),
                    takes_over=over,
                )
            )
    return tuple(sorted(found, key=lambda one: one.silent_since_ms))


async def census(store: Store) -> tuple[dict[str, int], int]:
    """How many instances of all projects there are by vm_state, and how many requests are outstanding."""
    states: dict[str, int] = {}
    async for instance in every_instance(store):
        states[instance.vm_state.value] = states.get(instance.vm_state.value, 0) + 1
    return states, sum(len(one.outstanding) for one in await store.unsettled())
