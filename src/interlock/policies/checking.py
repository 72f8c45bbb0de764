"""What is wrong with a policy, found without walking the queue: in every cell, by what its rules say.

What only shows when several requests meet is not here (see `exploring`). The searches are `dead_rules`, `ways_out` and
`strange_verdicts`; here they are put together, for a policy and for a file that may not even be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import Policy
from interlock.policies.dead_rules import DeadRules
from interlock.policies.findings import Finding, Severity, file_of
from interlock.policies.reaching import Reaching
from interlock.policies.reading import PolicyText, read
from interlock.policies.strange_verdicts import StrangeVerdicts
from interlock.policies.ways_out import WaysOut

_MESSAGE: Final = re.compile(r"(.+?:\d+(?::\d+)?): (.*)", re.DOTALL)
_ORDER: Final = tuple(Severity)


def check(policy: Policy | PolicyText, performs: Iterable[Operation] | None = None) -> tuple[Finding, ...]:
    """Everything that is found, errors first, then in the order in which it is written.

    With `performs`, the operations of a driver, also what the policy admits and nobody would perform. Of a bare policy
    that extends another, the file of its first rule that is not fixed counts as its own.
    """
    own = policy.source if isinstance(policy, PolicyText) else None
    rules = (policy.policy if isinstance(policy, PolicyText) else policy).rules
    subject = policy.policy if isinstance(policy, PolicyText) else policy
    if not rules:
        return ()
    reaching = Reaching(rules)
    dead = DeadRules(reaching, _own_file(subject) if own is None else own)
    ways_out = WaysOut(subject, reaching)
    strange = StrangeVerdicts(reaching, dead, ways_out)
    found = [*dead.findings(), *ways_out.findings(), *strange.findings()]
    if performs is not None:
        found += strange.unperformed(performs)
    positions = {one.id: number for number, one in enumerate(dead.written)}
    last = len(positions)
    return tuple(sorted(found, key=lambda one: (_ORDER.index(one.severity), positions.get(one.rule or "", last))))


def check_file(name_or_path: str | Path, performs: Iterable[Operation] | None = None) -> tuple[Finding, ...]:
    """The same for a built-in policy or a file. One that cannot be read is told as a finding with its position."""
    try:
        text = read(name_or_path)
    except PolicyError as error:
        return (unreadable(error, str(name_or_path)),)
    return check(text, performs)


def unreadable(error: PolicyError, name: str) -> Finding:
    """An error of reading, as a finding."""
    found = _MESSAGE.fullmatch(error.message)
    place, message = (found.group(1), found.group(2)) if found else (f"{name}:1", error.message)
    return Finding(
        severity=Severity.ERROR, code="unreadable", rule=None, place=place, message=message, remedy=error.remedy
    )


def _own_file(policy: Policy) -> str:
    return file_of(next((rule for rule in policy.rules if not rule.fixed), policy.rules[0]))
