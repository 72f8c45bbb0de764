"""Static checks (lints) of a policy: dead rules, missing exits and misleading verdicts.

These look at single decisions; `exploring` checks sequences of requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.policies.language.loader import PolicyText, builtin_names, read
from interlock.policies.lint.dead_rules import DeadRules, window_findings
from interlock.policies.lint.deletion_lints import Undeletable
from interlock.policies.lint.exit_lints import WaysOut
from interlock.policies.lint.finding_kinds import finding
from interlock.policies.lint.findings import Finding, Severity, file_of, file_of_place
from interlock.policies.lint.reachability import Reaching
from interlock.policies.lint.verdict_lints import StrangeVerdicts

_MESSAGE: Final = re.compile(r"(.+?:\d+(?::\d+)?): (.*)", re.DOTALL)
_ORDER: Final = tuple(Severity)


def check(policy: Policy | PolicyText, performs: Iterable[Operation] | None = None) -> tuple[Finding, ...]:
    """Return all findings, errors first, then in the order of the rules.

    With `performs`, the operations of a driver, also those that the policy admits and the driver does not perform. The
    own file of a bare `Policy` that extends another is that of its first rule that is not fixed.
    """
    subject = policy.policy if isinstance(policy, PolicyText) else policy
    if not subject.rules:
        return ()
    own = policy.source if isinstance(policy, PolicyText) else _own_file(subject)
    reaching = Reaching(subject.rules)
    dead = DeadRules(reaching, own)
    compiled = CompiledPolicy(subject)
    ways_out = WaysOut(reaching, compiled.limits)
    strange = StrangeVerdicts(reaching, dead, ways_out)
    lints = (dead, Undeletable(reaching, ways_out), ways_out, strange)
    found = [_inherited(one, own) for lint in lints for one in lint.findings()]
    found += strange.unbinding(compiled.protected)
    found += window_findings(dead.written, own)
    if reaching.exhausted:
        found.append(_exhausted(own))
    if performs is not None:
        found += strange.unperformed(performs)
    positions = {one.id: number for number, one in enumerate(dead.written)}
    last = len(positions)
    return tuple(sorted(found, key=lambda one: (_ORDER.index(one.severity), positions.get(one.rule or "", last))))


def check_file(name_or_path: str | Path, performs: Iterable[Operation] | None = None) -> tuple[Finding, ...]:
    """Check a built-in policy or a file. One that cannot be read gives a finding with its position."""
    try:
        text = read(name_or_path)
    except PolicyError as error:
        return (unreadable(error, str(name_or_path)),)
    return check(text, performs)


def unreadable(error: PolicyError, name: str) -> Finding:
    """Return a read error as a finding."""
    found = _MESSAGE.fullmatch(error.message)
    place, message = (found.group(1), found.group(2)) if found else (f"{name}:1", error.message)
    return finding("unreadable", place, message, remedy=error.remedy)


def _exhausted(own: str) -> Finding:
    return finding(
        "not-all-seen", f"{own}:1",
        "The rules are too many and too complex to analyse within limits: some that never decide may not have been "
        "found.",
    )  # fmt: skip


def _inherited(finding: Finding, own: str) -> Finding:
    """Reduce a finding to a detail if the policy inherits it unchanged from a built-in one."""
    file = file_of_place(finding.place)
    if file == own or (finding.code, finding.rule, finding.message) not in _of_builtin(file):
        return finding
    return msgspec.structs.replace(finding, severity=Severity.NOTE, detail=True)


@cache
def _of_builtin(file: str) -> frozenset[tuple[str, str | None, str]]:
    """Return the findings of a built-in policy; none if `file` is not one."""
    name = file.removesuffix(".toml")
    if name not in builtin_names() or file == name:
        return frozenset()
    return frozenset((one.code, one.rule, one.message) for one in check(read(name)))


def _own_file(policy: Policy) -> str:
    return file_of(next((rule for rule in policy.rules if not rule.fixed), policy.rules[0]))
