"""What another policy would change for a fleet as it is now: which instances would answer an operation otherwise."""

from __future__ import annotations

import msgspec
import numpy as np

from interlock.core.operations import Operation
from interlock.policies.fleet_gate import Answered, FleetAnswers, reason_of
from interlock.policies.fleets import Times

_EXAMPLES = 3


class FleetChange(msgspec.Struct, frozen=True, kw_only=True):
    """Some instances whose disposition differs, for one and the same pair of rules."""

    operation: Operation
    instances: int
    before: Answered
    rule_before: str
    reason_before: str | None
    after: Answered
    rule_after: str
    reason_after: str | None
    examples: tuple[int, ...]
    """The first rows of the fleet to which this happens."""


def compare(before: FleetAnswers, after: FleetAnswers) -> tuple[FleetChange, ...]:
    """Where two policies' dispositions differ, for one fleet; the greatest first. Another reason is no difference.

    Raises:
        ValueError: the answers are of two fleets, or of other operations.
    """
    if before.fleet is not after.fleet or before.operations != after.operations:
        raise ValueError("Only answers of one fleet to the same operations can be compared.")
    changes = [change for operation in before.operations for change in _changes(before, after, operation)]
    return tuple(sorted(changes, key=lambda change: -change.instances))


def _changes(before: FleetAnswers, after: FleetAnswers, operation: Operation) -> list[FleetChange]:
    rows = np.flatnonzero(before.dispositions(operation) != after.dispositions(operation))
    if not len(rows):
        return []
    pairs: Times = before.deciding(operation)[rows].astype(np.int64) << np.int64(32) | after.deciding(operation)[rows]
    # A rule may give two dispositions, by the time that has passed.
    pairs = pairs * len(Answered) ** 2
    pairs += before.dispositions(operation)[rows] * np.int64(len(Answered)) + after.dispositions(operation)[rows]
    _values, which, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    found = []
    for group, count in enumerate(counts.tolist()):
        examples = rows[np.flatnonzero(which == group)[:_EXAMPLES]].tolist()
        was, becomes = before.answer(operation, examples[0]), after.answer(operation, examples[0])
        found.append(
            FleetChange(
                operation=operation,
                instances=count,
                before=was.disposition,
                rule_before=was.rule.id,
                reason_before=reason_of(was.disposition, was.rule),
                after=becomes.disposition,
                rule_after=becomes.rule.id,
                reason_after=reason_of(becomes.disposition, becomes.rule),
                examples=tuple(examples),
            )
        )
    return found
