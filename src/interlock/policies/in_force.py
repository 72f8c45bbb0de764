"""The policy by which this process decides now. Where it came from, and how it is replaced, is not known here."""

from __future__ import annotations

from interlock.core.policy import CompiledPolicy


class PolicyInForce:
    """The one place where everything that decides finds its policy.

    Whoever decides reads `compiled` once, inside the decision: every decision is then made wholly by one policy. It is
    replaced by assigning it, on the event loop.
    """

    __slots__ = ("compiled",)

    def __init__(self, compiled: CompiledPolicy) -> None:
        self.compiled = compiled
