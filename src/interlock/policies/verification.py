"""Verifies a policy in a subprocess, with time and memory limits: loader, lints and model checker.

`python -m interlock.policies.verification` reads one `Question` from standard input and writes one
`Proof`. A subprocess, because verification takes seconds of CPU and the policy is untrusted: the gate stays responsive.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any, Final

import msgspec

from interlock import __version__
from interlock.core.errors import Invalid, PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.policy_switches import PolicyBundle, Walk
from interlock.policies.lint.findings import Finding, Severity
from interlock.policies.outstanding_work import BlockedInstance

_NICER_BY: Final = 5
"""The increment of `nice`, so that the gate goes first."""
_MIB: Final = 1024 * 1024


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """The policy to verify, and the limits."""

    bundle: PolicyBundle
    performs: tuple[Operation, ...]
    """The operations of the driver; every other one is denied."""
    explore_ms: int
    """Time limit of the model checker; 0 skips it."""
    memory_mib_max: int
    """Limit of the address space."""


class BrokenLaw(msgspec.Struct, frozen=True, kw_only=True):
    """A law that the policy violates."""

    law: int
    what: str
    story: tuple[str, ...]
    """The counterexample: events of `interlock rehearse`."""


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """The result."""

    policy: Policy | None = None
    """The policy as read; None if it is invalid."""
    wrong: str | None = None
    """Why it is invalid or cannot be verified, with the position."""
    remedy: str | None = None
    findings: tuple[Finding, ...] = ()
    walk: Walk | None = None
    violations: tuple[BrokenLaw, ...] = ()
    blocked: tuple[BlockedInstance, ...] = ()
    """Instances that could not be deleted any more because of their outstanding requests; found at the switch."""

    @property
    def holds(self) -> bool:
        """Whether it may be activated."""
        return (
            self.policy is not None
            and self.wrong is None
            and not self.violations
            and not self.blocked
            and all(finding.severity is not Severity.ERROR for finding in self.findings)
        )


def prove(question: Question) -> Proof:
    """Read, lint and model-check a policy in this process."""
    from interlock.policies.language.bundle import read_text
    from interlock.policies.lint.checker import check

    try:
        text = read_text(question.bundle)
    except PolicyError as error:
        return Proof(wrong=error.message, remedy=error.remedy)
    proof = Proof(policy=text.policy, findings=tuple(check(text, question.performs)))
    if not proof.holds or not question.explore_ms:
        return proof
    return _walked(proof, text.policy, question)


def _walked(proof: Proof, policy: Policy, question: Question) -> Proof:
    from interlock.policies.model_checker import explore

    try:
        found = explore(CompiledPolicy(policy, question.performs), seconds_max=question.explore_ms / 1000)
    except Invalid:
        # Too many states even with one request at a time, as with hundreds of thresholds: no verdict.
        nothing = Walk(states=0, transitions=0, seconds=0.0, complete=False, version=__version__)
        return msgspec.structs.replace(proof, walk=nothing)
    return msgspec.structs.replace(
        proof,
        walk=msgspec.structs.replace(
            msgspec.convert(found, Walk, from_attributes=True),
            role_limits=None if found.weaker is None else found.weaker.sentence,
            version=__version__,
        ),
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
        what = f"Verifying the policy takes more than {question.memory_mib_max} MiB of memory."
        proof = Proof(wrong=what, remedy="Explore it for a shorter time, or not at all (0 seconds).")
    sys.stdout.buffer.write(encode(proof))
    return 0


if __name__ == "__main__":
    sys.exit(main())
