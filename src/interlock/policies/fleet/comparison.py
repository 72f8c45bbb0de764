"""Comparison of two policies on a fleet: the instances whose answers to an operation differ."""

from __future__ import annotations

import msgspec

from interlock.core.operations import Operation
from interlock.policies.fleet.gate import Answered, FleetAnswer, FleetAnswers, Group

_EXAMPLES = 3


class FleetChange(msgspec.Struct, frozen=True, kw_only=True):
    """Instances whose disposition differs, for one pair of rules."""

    operation: Operation
    instances: int
    before: Answered
    rule_before: str
    reason_before: str | None
    after: Answered
    rule_after: str
    reason_after: str | None
    examples: tuple[int, ...]
    """The indexes of the first such instances."""


def compare(before: FleetAnswers, after: FleetAnswers) -> tuple[FleetChange, ...]:
    """Return where two policies' dispositions differ on one fleet, the largest first. Reasons are not compared.

    Raises:
        ValueError: the answers are of different fleets or operations.
    """
    if before.instances is not after.instances or before.operations != after.operations:
        raise ValueError("Only answers of one fleet to the same operations can be compared.")
    rows: dict[tuple[Group, Group], list[int]] = {}
    for row, pair in enumerate(zip(before.groups, after.groups, strict=True)):
        rows.setdefault(pair, []).append(row)
    changes = []
    for operation in before.operations:
        differing: dict[tuple[FleetAnswer, FleetAnswer], list[int]] = {}
        for (mine, yours), alike in rows.items():
            was = before.of(operation, mine)._replace(allowed_in_ms=None)
            becomes = after.of(operation, yours)._replace(allowed_in_ms=None)
            if was.disposition != becomes.disposition:
                differing.setdefault((was, becomes), []).extend(alike)
        changes += [_change(operation, *pair, alike) for pair, alike in differing.items()]
    return tuple(sorted(changes, key=lambda change: -change.instances))


def _change(operation: Operation, was: FleetAnswer, becomes: FleetAnswer, rows: list[int]) -> FleetChange:
    return FleetChange(
        operation=operation,
        instances=len(rows),
        before=was.disposition,
        rule_before=was.rule,
        reason_before=was.reason,
        after=becomes.disposition,
        rule_after=becomes.rule,
        reason_after=becomes.reason,
        examples=tuple(sorted(rows)[:_EXAMPLES]),
    )
