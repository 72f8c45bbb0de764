"""The policy by which this process decides now, and those before it that still bind what they admitted.

Where a policy came from, and how one is loaded, is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from interlock.core.policy import CompiledPolicy, Rule, View
from interlock.core.records import Instance
from interlock.core.request_queue import permits


class Earlier(msgspec.Struct, frozen=True):
    """A policy that was in force, and whose admissions are to be kept."""

    compiled: CompiledPolicy
    until_ms: int
    """No request was admitted by it after this moment."""


class PolicyInForce:
    """The one place where everything that decides finds its policy.

    Whoever decides reads it once, inside the decision: every decision is then made wholly by one policy. It is replaced
    on the event loop, between two decisions.
    """

    __slots__ = ("_bound", "_earlier", "compiled")

    def __init__(self, compiled: CompiledPolicy) -> None:
        self.compiled = compiled
        """What judges whatever is asked for now."""
        self._earlier: tuple[Earlier, ...] = ()
        self._bound: dict[int, CompiledPolicy] = {}

    @property
    def earlier(self) -> tuple[Earlier, ...]:
        """Those that still bind, oldest first."""
        return self._earlier

    def replace(self, compiled: CompiledPolicy, earlier: Iterable[Earlier] = ()) -> None:
        """Put another policy in force; `earlier` are those whose admissions are to be kept, oldest first."""
        self.compiled = compiled
        self._earlier = tuple(earlier)
        self._bound = {}

    def for_waiting(self, instance: Instance) -> CompiledPolicy:
        """What judges again the requests that wait for this instance.

        It is the policy in force, unless one of them may have been admitted by an earlier one that still binds. A
        request is then dismissed only where neither would have it, so that what an earlier policy promised holds.
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
    """The policy in force, giving way to an earlier one where that permits what it refuses itself."""

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
