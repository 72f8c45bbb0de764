"""Fleet status: counts of instances by state, stuck instances and guests in trouble."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.records import Admitted, Disposition, Instance
from interlock.core.states import GuestTrouble, VmState
from interlock.ports import HostCondition, InstanceFilter, Store, Tally, every_instance
from interlock.service.auth import Caller
from interlock.service.submission_results import Stuck

_NOWHERE = frozenset({VmState.DELETED, VmState.MIGRATED_OUT})


async def stuck(
    store: Store,
    policy: CompiledPolicy,
    caller: Caller | None,
    answers: Callable[[Instance], dict[Operation, Disposition]],
    lost: Mapping[str, HostCondition],
) -> tuple[Stuck, ...]:
    """Return the caller's instances (None: of all projects) that need attention, longest silent first.

    These have an operation that could be taken over now or that does not progress, a guest in trouble, or a host that
    is lost or fenced.

    `answers` returns the disposition of each operation on an instance now; `lost` has the lost and fenced hosts.
    """
    found = []
    takeovers = {rule.id for rule in policy.rules if rule.verdict is Verdict.AFTER}
    instances = [one for one in await store.unsettled() if one.host not in lost]
    for name in lost:
        project = None if caller is None else caller.project
        where = InstanceFilter(host=name, project=project)
        instances += [one async for one in every_instance(store, where) if one.vm_state not in _NOWHERE]
    for instance in instances:
        serving = next((one for one in instance.outstanding if one.last_progress_at_ms is not None), None)
        trouble = instance.guest_trouble_since_ms
        host = lost.get(instance.host)
        if serving is None and trouble is None and host is None:
            continue
        if caller is not None and instance.project != caller.project:
            continue
        admitted = {op: one for op, one in answers(instance).items() if isinstance(one, Admitted)}
        over = tuple(op for op, one in admitted.items() if one.rule in takeovers)
        warned = serving is not None and serving.warning is not None
        if over or warned or trouble is not None or host is not None:
            of_request = serving is not None and (over or warned)
            since_ms = trouble if host is None else host.since_ms
            silent_since_ms = (serving.last_progress_at_ms if serving is not None and of_request else since_ms) or 0
            found.append(
                Stuck(
                    instance=instance,
                    request=serving,
                    host=host,
                    silent_since_ms=silent_since_ms,
                    allowed=tuple(admitted),
                    takes_over=over,
                )
            )
    return tuple(sorted(found, key=lambda one: one.silent_since_ms))


async def troubled(store: Store) -> dict[str, int]:
    """Count the guests in trouble of all projects, by trouble."""
    found = dict.fromkeys((trouble.value for trouble in GuestTrouble), 0)
    for instance in await store.unsettled():
        if instance.guest_trouble is not None:
            found[instance.guest_trouble.value] += 1
    return found


async def census(store: Store) -> tuple[dict[str, int], int]:
    """Count the instances of all projects by vm_state, and the outstanding requests."""
    return store.tallies(Tally.STATES), sum(len(one.outstanding) for one in await store.unsettled())
