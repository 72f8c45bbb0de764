"""A prover that only reads: for servers whose policies are a test's own, and are not what it is about."""

from __future__ import annotations

from interlock.core.errors import PolicyError
from interlock.core.policy_switches import PolicyBundle
from interlock.policies import sources
from interlock.policies.proving import Proof
from interlock.service.proving import Prover


class TrustingProver(Prover):
    """Finds nothing wrong with a policy that can be read."""

    def __init__(self) -> None:
        pass

    async def prove(self, bundle: PolicyBundle, explore_ms: int) -> Proof:  # noqa: ARG002 - nothing is walked
        try:
            return Proof(policy=sources.read(bundle))
        except PolicyError as error:
            return Proof(wrong=error.message, remedy=error.remedy)
