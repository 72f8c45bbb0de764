"""The policy named in the configuration: its last accepted source, and why it was rejected if so."""

from __future__ import annotations

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.policy import Policy
from interlock.policies.language.bundle import Source
from interlock.policies.language.loader import builtin_names
from interlock.policies.lint.findings import Severity
from interlock.policies.verification import Proof


class RefusedPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The configured policy was rejected and is not in force."""

    name: str
    """As configured: a built-in policy or a file path."""
    at_ms: int
    why: str
    """Location and message."""
    remedy: str | None = None


class ConfiguredPolicy:
    """The configured policy: the name of a built-in or a file path. Read on construction."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source: Source | None = None
        """Last accepted source, or the one read at the start; None if that is rejected."""
        self.refused: RefusedPolicy | None = None
        """Why its present content is rejected; None if it is not known to be invalid."""
        self.wrong: PolicyError | None = None
        """Why it could not be read at the start; None if it could."""
        try:
            self.source = Source.read(name)
        except PolicyError as error:
            self.wrong = error

    @property
    def at_first(self) -> Policy:
        """The policy used until `Policies.open` has determined the active one; no request is served before that."""
        return Policy(name="none", rules=()) if self.source is None else self.source.policy

    @property
    def is_builtin(self) -> bool:
        """Whether it ships with Interlock, and so was verified at build time."""
        return self.name in builtin_names()

    def take(self, source: Source) -> None:
        """Record the source as accepted."""
        self.source, self.refused = source, None

    def refuse(self, why: str, remedy: str | None, at_ms: int) -> RefusedPolicy:
        """Record why it was rejected."""
        self.refused = RefusedPolicy(name=self.name, at_ms=at_ms, why=why, remedy=remedy)
        return self.refused


def against(proof: Proof) -> str:
    """Return the errors and law violations of a policy, and the VMs that block its activation, as one line."""
    errors = [f"{one.place}: {one.message}" for one in proof.findings if one.severity is Severity.ERROR]
    laws = [f"law {one.law}: {one.what}" for one in proof.violations]
    blocked = [one.message for one in proof.blocked]
    return proof.wrong or "; ".join((*errors, *laws, *blocked))
