"""Proving a policy before it is put in force: read, checked, and walked for a while, in a process of its own.

`python -m interlock.policies.proving` reads one `Question` from standard input and writes one `Proof`. A process of its
own, because a walk takes seconds of a processor and a policy comes from outside: whatever it does to its prover, the
gate goes on answering.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any, Final

import msgspec

from interlock.core.errors import Invalid, PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.policy_switches import PolicyBundle
from interlock.policies.findings import Finding, Severity

_NICER_BY: Final = 5
"""By how much the prover gives way to the gate, where both want the processor."""
_MIB: Final = 1024 * 1024


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be proved of which policy."""

    bundle: PolicyBundle
    performs: tuple[Operation, ...]
    """What the driver performs; every other operation is denied."""
    explore_ms: int
    """How long to walk; 0 does not."""
    memory_mib_max: int
    """How much address space the prover may take."""


class BrokenLaw(msgspec.Struct, frozen=True, kw_only=True):
    """A law that the policy lets be broken."""

    law: int
    what: str
    story: tuple[str, ...]
    """How it comes about: events as `rehearse` reads them."""


class Walk(msgspec.Struct, frozen=True, kw_only=True):
    """How far the walk through the reachable states came."""

    states: int
    transitions: int
    complete: bool
    """False if time or memory was up first; what lies behind was then not looked at."""
    seconds: float


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    policy: Policy | None = None
    """The policy as read; None if it cannot be."""
    wrong: str | None = None
    """Why it cannot be read, or not be proved: place and sentence."""
    remedy: str | None = None
    findings: tuple[Finding, ...] = ()
    walk: Walk | None = None
    violations: tuple[BrokenLaw, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against putting it in force."""
        return (
            self.policy is not None
            and self.wrong is None
            and not self.violations
            and all(finding.severity is not Severity.ERROR for finding in self.findings)
        )


def prove(question: Question) -> Proof:
    """Read, check and walk, in this process."""
    from interlock.policies.checking import check
    from interlock.policies.sources import read_text

    try:
        text = read_text(question.bundle)
    except PolicyError as error:
        return Proof(wrong=error.message, remedy=error.remedy)
    proof = Proof(policy=text.policy, findings=tuple(check(text, question.performs)))
    if not proof.holds or not question.explore_ms:
        return proof
    return _walked(proof, text.policy, question)


def _walked(proof: Proof, policy: Policy, question: Question) -> Proof:
    from interlock.policies.exploring import explore

    try:
        found = explore(CompiledPolicy(policy, question.performs), seconds_max=question.explore_ms / 1000)
    except Invalid:
        # Even one request at a time is too much, as with hundreds of thresholds: it speaks neither for nor against.
        return msgspec.structs.replace(proof, walk=Walk(states=0, transitions=0, seconds=0.0, complete=False))
    return msgspec.structs.replace(
        proof,
        walk=msgspec.convert(found, Walk, from_attributes=True),
        violations=tuple(msgspec.convert(one, BrokenLaw, from_attributes=True) for one in found.violations),
    )


def encode(message: Question | Proof) -> bytes:
    return msgspec.json.encode(message)


def main() -> int:
    """Answer the question on standard input."""
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    os.nice(_NICER_BY)
    limit: Any = question.memory_mib_max * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        proof = prove(question)
    except MemoryError:
        what = f"Proving the policy takes more than {question.memory_mib_max} MiB of memory."
        proof = Proof(wrong=what, remedy="Explore it for a shorter time, or not at all (0 seconds).")
    sys.stdout.buffer.write(encode(proof))
    return 0


if __name__ == "__main__":
    sys.exit(main())
