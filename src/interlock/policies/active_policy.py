"""The active policy of this process, and earlier ones that still bind the requests they admitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy

import msgspec

from interlock.core.policy import CompiledPolicy, Rule
from interlock.core.records import Instance
from interlock.core.request_queue import permits
from interlock.core.views import View


class Earlier(msgspec.Struct, frozen=True):
    """A formerly active policy whose admissions still hold."""

    compiled: CompiledPolicy
    until_ms: int
    """It admitted no request after this time."""


def _same(policy: CompiledPolicy) -> CompiledPolicy:
    return policy


class PolicyInForce:
    """The active policy, shared by all deciders.

    Read once per decision, so that one policy makes the whole decision. Replaced on the event loop, between decisions.
    """

    __slots__ = ("_bound", "_deciding", "_earlier", "_resolve", "compiled")

    def __init__(self, compiled: CompiledPolicy, resolve: Callable[[CompiledPolicy], CompiledPolicy] = _same) -> None:
        """`resolve` gives a policy the intervals of its time windows."""
        self._resolve = resolve
        self.compiled = compiled
        """The policy that judges new submissions."""
        self._earlier: tuple[Earlier, ...] = ()
        self._bound: dict[int, CompiledPolicy] = {}
        self._deciding: dict[int, CompiledPolicy] = {}

    @property
    def earlier(self) -> tuple[Earlier, ...]:
        """The policies that still bind, oldest first."""
        return self._earlier

    def replace(self, compiled: CompiledPolicy, earlier: Iterable[Earlier] = ()) -> None:
        """Activate a policy; `earlier` are those whose admissions still hold, oldest first."""
        self.compiled = self._resolve(compiled)
        self._earlier = tuple(earlier)
        self._bound, self._deciding = {}, {}

    def for_instance(self, instance: Instance) -> CompiledPolicy:
        """Return the active policy, with `for_queue` set to that of `for_waiting`."""
        bound = self.for_waiting(instance)
        if bound is self.compiled:
            return self.compiled
        deciding = self._deciding.get(id(bound))
        if deciding is None:
            deciding = self._deciding[id(bound)] = copy(self.compiled)
            deciding.for_queue = bound
        return deciding

    def resolved(self, policy: CompiledPolicy) -> CompiledPolicy:
        """Return a policy with the intervals of its time windows, as if it were active."""
        return self._resolve(policy)

    def resolve_windows(self) -> None:
        """Resolve the time windows of the active policy again; earlier policies judge nothing that depends on them."""
        self.replace(self.compiled, self._earlier)

    def for_waiting(self, instance: Instance) -> CompiledPolicy:
        """Return the policy that re-evaluates the queued requests of an instance.

        It is the active policy, combined with earlier ones that may have admitted one of the requests: a request is
        cancelled only if none of these permits it (law 2).
        """
        if not self._earlier:
            return self.compiled
        oldest_ms = min((request.admitted_at_ms for request in instance.outstanding), default=None)
        binding = [one for one in self._earlier if oldest_ms is not None and one.until_ms >= oldest_ms]
        if not binding:
            return self.compiled
        bound = self._bound.get(len(binding))
        if bound is None:
            bound = self._bound[len(binding)] = _Bound(self.compiled, [one.compiled for one in binding])
        return bound


class _Bound(CompiledPolicy):
    """The active policy, falling back to an earlier one that permits what it denies."""

    def __init__(self, now: CompiledPolicy, earlier: list[CompiledPolicy]) -> None:
        super().__init__(now.policy)
        self._now = now
        self._others = earlier[::-1]

    def decide(self, view: View) -> Rule:
        decided = self._now.decide(view)
        if permits(decided):
            return decided
        kept = (policy.decide(view) for policy in self._others)
        return next((rule for rule in kept if permits(rule)), decided)
