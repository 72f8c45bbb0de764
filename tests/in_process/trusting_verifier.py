"""A prover that only reads: for servers whose policies are a test's own, and are not what it is about."""

from __future__ import annotations

from interlock.core.errors import PolicyError
from interlock.core.policy_switches import PolicyBundle
from interlock.policies.language import bundle as bundles
from interlock.policies.verification import Proof
from interlock.service.policy_verifier import PolicyVerifier


class TrustingProver(PolicyVerifier):
    """Finds nothing wrong with a policy that can be read."""

    def __init__(self) -> None:
        pass

    async def prove(self, bundle: PolicyBundle, explore_ms: int) -> Proof:
        try:
            return Proof(policy=bundles.read(bundle))
        except PolicyError as error:
            return Proof(wrong=error.message, remedy=error.remedy)
