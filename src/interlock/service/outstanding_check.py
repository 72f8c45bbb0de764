"""Checks at a policy switch that no VM with outstanding requests loses its way to be deleted; see `SwitchCheck`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from msgspec.structs import replace

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.policy_switches import Outstanding
from interlock.policies.active_policy import Earlier, PolicyInForce
from interlock.policies.outstanding_work import SwitchCheck
from interlock.policies.verification import Proof
from interlock.ports import Store

TIMEOUT_MS: Final = 60_000
PAUSED_MS_MAX: Final = 2_000
"""Time limit of a check during which no decision is made: it covers what has come up since the check before."""


class OutstandingCheck:
    """The check of one switch, against the instances that the store has at each call."""

    def __init__(
        self,
        store: Store,
        in_force: PolicyInForce,
        new: Policy,
        outstanding: Outstanding,
        *,
        performs: Iterable[Operation],
        reachable: Callable[[str], bool],
    ) -> None:
        """`in_force` is what is replaced by `new`."""
        performed = frozenset(performs)
        # Compiled anew, since the check runs in another thread than the gate.
        before = PolicyInForce(in_force.resolved(CompiledPolicy(in_force.compiled.policy, performed)))
        earlier = [Earlier(CompiledPolicy(one.compiled.policy, performed), one.until_ms) for one in in_force.earlier]
        before.replace(before.compiled, earlier)
        self._check = SwitchCheck(before, in_force.resolved(CompiledPolicy(new, performed)), outstanding, reachable)
        self._store = store

    async def run(self, proof: Proof, timeout_ms: int = TIMEOUT_MS) -> Proof:
        """Return the proof with the instances that block the switch, or with the reason why they are not known.

        Instances like those of an earlier call are only counted, so that a call while the store is paused is short.
        """
        unsettled = await self._store.unsettled()
        until_s = time.monotonic() + timeout_ms / 1000
        try:
            blocked = await asyncio.to_thread(self._check.blocked, unsettled, self._store.now_ms(), until_s=until_s)
        except TimeoutError:
            what = f"Checking {len(unsettled)} VMs with outstanding requests timed out after {timeout_ms / 1000:g} s."
            return replace(proof, wrong=what, remedy="Load the policy again while fewer requests are outstanding.")
        remedy = blocked[0].remedy if blocked else proof.remedy
        return replace(proof, blocked=blocked, remedy=remedy)
