"""The classes of ages that the rules of a policy distinguish, for instances of the core."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from interlock.core.operations import Lane, Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Rule
from interlock.core.records import SERVED, Instance, Request
from interlock.core.states import NO_TASK, VmState


class Ages:
    """The age bounds in each state at which some rule's answer changes."""

    def __init__(self, policy: CompiledPolicy, operations: Iterable[Operation]) -> None:
        wanted = frozenset(operations)
        self._rules = [rule for rule in policy.rules if rule.operations & wanted and _is_timed(rule)]
        self._bounds: dict[tuple[VmState, str], tuple[list[int], list[int]]] = {}

    def bounds_ms(self, vm_state: VmState, task_state: str) -> tuple[list[int], list[int]]:
        """Return the bounds of silence and of running time at which some rule's answer changes."""
        key = (vm_state, task_state)
        known = self._bounds.get(key)
        if known is None:
            known = self._bounds[key] = self._collect(*key)
        return known

    def _collect(self, vm_state: VmState, task_state: str) -> tuple[list[int], list[int]]:
        silent: set[int] = set()
        running: set[int] = set()
        for rule in self._rules:
            if rule.vm_states is not None and vm_state not in rule.vm_states:
                continue
            if rule.task_states is not None and task_state not in rule.task_states:
                continue
            if rule.silent_ms_min is not None:
                silent.add(rule.silent_ms_min)
            if rule.threshold_ms is not None:
                (silent if rule.measured_from is MeasuredFrom.LAST_PROGRESS else running).add(rule.threshold_ms)
        return sorted(silent), sorted(running)

    def moments_ms(self, instance: Instance, now_ms: int) -> Iterator[int]:
        """Yield the times at which the age on which a submission is judged passes its next bounds."""
        silent, running = self.bounds_ms(instance.vm_state, instance.task_state)
        silent_since_ms, running_since_ms = _since_ms(instance)
        yield from (silent_since_ms + bound for bound in silent if silent_since_ms + bound > now_ms)
        yield from (running_since_ms + bound for bound in running if running_since_ms + bound > now_ms)

    def idle_class(self, instance: Instance, now_ms: int) -> tuple[int, int]:
        """Return the age class of an instance with nothing in service."""
        if any(request.status in SERVED for request in instance.outstanding):
            return (0, 0)
        silent, running = self.bounds_ms(instance.vm_state, NO_TASK)
        age_ms = now_ms - instance.updated_at_ms
        return bisect_right(silent, age_ms), bisect_right(running, age_ms)

    def served_class(self, instance: Instance, request: Request, now_ms: int) -> tuple[int, int]:
        """Return the age class of a request in service; (0, 0) for a queued one."""
        if request.status not in SERVED:
            return (0, 0)
        task_state = (request.phase or NO_TASK) if request.lane is Lane.STATE else NO_TASK
        silent, running = self.bounds_ms(instance.vm_state, task_state)
        taken_at_ms = request.taken_at_ms or 0
        return (
            bisect_right(silent, now_ms - (request.last_progress_at_ms or taken_at_ms)),
            bisect_right(running, now_ms - taken_at_ms),
        )


def _is_timed(rule: Rule) -> bool:
    return rule.silent_ms_min is not None or rule.threshold_ms is not None


def _since_ms(instance: Instance) -> tuple[int, int]:
    serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
    if serving is None:
        return instance.updated_at_ms, instance.updated_at_ms
    taken_at_ms = serving.taken_at_ms or 0
    return serving.last_progress_at_ms or taken_at_ms, taken_at_ms
