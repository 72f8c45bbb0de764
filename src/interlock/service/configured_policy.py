"""The policy that the configuration names: as it was last read and taken, and why it is refused if it is."""

from __future__ import annotations

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.policy import Policy
from interlock.policies.findings import Severity
from interlock.policies.proving import Proof
from interlock.policies.reading import builtin_names
from interlock.policies.sources import Source


class RefusedPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """That what the configuration names is not in force because something is wrong with it."""

    name: str
    """As the configuration has it: of a built-in, or the path of a file."""
    at_ms: int
    why: str
    """Place and sentence."""
    remedy: str | None = None


class ConfiguredPolicy:
    """What the configuration names, by the name of a built-in policy or the path of a file. It is read at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source: Source | None = None
        """It as it was last taken, or was read at the start; None if that is refused."""
        self.refused: RefusedPolicy | None = None
        """Why it is not taken as it is now; None where nothing is known to speak against it."""
        self.wrong: PolicyError | None = None
        """Why it could not be read at the start; None if it could."""
        try:
            self.source = Source.read(name)
        except PolicyError as error:
            self.wrong = error

    @property
    def at_first(self) -> Policy:
        """What decides until it is known which policy is in force, which is before anything is served."""
        return Policy(name="none", rules=()) if self.source is None else self.source.policy

    @property
    def is_builtin(self) -> bool:
        """Whether it came with Interlock, and was proved before that."""
        return self.name in builtin_names()

    def take(self, source: Source) -> None:
        """Note that it is in force as it is now."""
        self.source, self.refused = source, None

    def refuse(self, why: str, remedy: str | None, at_ms: int) -> RefusedPolicy:
        """Note why it is not."""
        self.refused = RefusedPolicy(name=self.name, at_ms=at_ms, why=why, remedy=remedy)
        return self.refused


def against(proof: Proof) -> str:
    """What speaks against a policy, as one line."""
    errors = [f"{one.place}: {one.message}" for one in proof.findings if one.severity is Severity.ERROR]
    laws = [f"law {one.law}: {one.what}" for one in proof.violations]
    return proof.wrong or "; ".join((*errors, *laws))
