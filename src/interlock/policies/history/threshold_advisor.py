"""Threshold advisor: proposes thresholds of `after` rules from recorded history.

A threshold should be longer than any progress gap of a healthy operation. The proposal is a distribution-free upper
confidence bound on a percentile of the recorded gaps, times a factor, rounded up. Where too little was recorded for a
bound, the current threshold is never lowered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from interlock.core.errors import Invalid
from interlock.core.policy import MeasuredFrom, Policy, Rule, Verdict
from interlock.policies.history.progress_gaps import Measures, ServiceRow, Watch, measure, watches_of
from interlock.policies.history.quantile_bounds import rank_of_bound, rank_of_percentile, values_needed

THRESHOLD_MIN_MS: Final = 5_000
"""The shortest threshold that is proposed."""
_AFTER_SILENT_MS: Final = 1_000
"""The least difference of a threshold to its rule's `silent_for`; a shorter one would never deny."""
_STEPS_MS: Final = ((15_000, 1_000), (60_000, 5_000), (300_000, 15_000))
"""Rounding steps in ms: (up to this threshold, multiple)."""
_LONG_STEP_MS: Final = 60_000


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    """The target of the proposed thresholds."""

    percentile: float = 99.0
    """Percentile of the progress gaps of healthy operations."""
    confidence: float = 95.0
    """Confidence of the bound, in per cent."""
    factor: float = 3.0
    """Safety factor of the bound."""

    def check(self) -> None:
        """Raise `Invalid` if a value is out of range."""
        for name in ("percentile", "confidence"):
            if not 50 <= getattr(self, name) <= 99.999:  # noqa: PLR2004 - per cent
                raise Invalid(f"{name} is {getattr(self, name):g}; it must be from 50 to 99.999.")
        if not 1 <= self.factor <= 1_000:  # noqa: PLR2004
            raise Invalid(f"factor is {self.factor:g}; it must be from 1 to 1000.")

    @property
    def needed(self) -> int:
        """The number of healthy operations that a proposal needs."""
        return values_needed(self.percentile / 100, self.confidence / 100)


class OperationStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of one operation as some rules measure it."""

    operation: str
    phases: tuple[str, ...]
    """The phases in which the rules may take over from it."""
    all_phases: bool
    measured_from: MeasuredFrom
    rules: tuple[str, ...]
    """The rules that measure it."""
    today_ms: tuple[int, ...]
    """Their current thresholds, the shortest first."""
    healthy: int
    """How many succeeded; the figures below are of these."""
    failed: int
    cancelled: int
    superseded: int
    adopted: int
    """Succeeded across a restart of the server, and left out; only where durations are measured."""
    median_ms: int | None = None
    percentile_ms: int | None = None
    """The percentile of the sample."""
    bound_ms: int | None = None
    """The upper confidence bound on the percentile; None if too few were recorded."""
    longest_ms: int | None = None
    proposed_ms: int | None = None
    """The bound times the factor, rounded up; None if there is no bound."""
    cut_short_today: int = 0
    """How many healthy ones the shortest current threshold would have ended."""
    cut_short: int = 0
    """How many healthy ones the proposed threshold would have ended."""


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """The proposed threshold of one rule."""

    rule: str
    today_ms: int
    proposed_ms: int
    """The current one if too little was recorded for another."""
    measured_from: MeasuredFrom
    operations: tuple[str, ...]
    """The operations that it takes over from."""
    unknown: tuple[str, ...]
    """Operations with too few records, because of which the threshold is not lowered."""
    healthy: int
    cut_short_today: int
    cut_short: int
    """How many healthy ones the proposed threshold would have ended."""
    source: str
    """The position of the rule."""

    @property
    def changed(self) -> bool:
        return self.proposed_ms != self.today_ms


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """The proposals for a policy's thresholds."""

    policy: str
    digest: str
    aim: Aim
    needed: int
    """The number of healthy operations that a proposal needs."""
    findings: tuple[OperationStatistics, ...]
    proposals: tuple[Proposal, ...]
    fixed: tuple[str, ...]
    """Fixed rules with a threshold, which cannot be changed."""


Recorded = dict[Watch, Measures]


def record(rows: Iterable[ServiceRow], policy: Policy) -> Recorded:
    """Measure what the rules of `policy` measure, from recorded events in order."""
    watches = dict.fromkeys(watch for rule in policy.rules for watch in watches_of(rule))
    return measure(rows, watches)


def suggest(policy: Policy, recorded: Recorded, aim: Aim = Aim()) -> Suggestion:  # noqa: B008 - a frozen value
    """Propose thresholds for the `after` rules of `policy`. Sorts the measurements in place.

    Raises:
        Invalid: `aim` is out of range.
    """
    aim.check()
    rules = [rule for rule in policy.rules if rule.verdict is Verdict.AFTER]
    found = {watch: _find(watch, measures, rules, aim) for watch, measures in recorded.items()}
    open_rules = [rule for rule in rules if not rule.fixed]
    return Suggestion(
        policy=policy.name,
        digest=policy.digest,
        aim=aim,
        needed=aim.needed,
        findings=tuple(found[watch] for watch in sorted(found)),
        proposals=tuple(_propose(rule, found, recorded) for rule in open_rules),
        fixed=tuple(rule.id for rule in rules if rule.fixed),
    )


def _find(watch: Watch, measures: Measures, rules: list[Rule], aim: Aim) -> OperationStatistics:
    watching = [rule for rule in rules if watch in watches_of(rule)]
    today_ms = tuple(sorted({rule.threshold_ms or 0 for rule in watching}))
    finding = OperationStatistics(
        operation=watch.operation.value,
        phases=watch.phases,
        all_phases=watch.whole,
        measured_from=watch.measured_from,
        rules=tuple(rule.id for rule in watching),
        today_ms=today_ms,
        healthy=len(measures.values_ms),
        failed=measures.failed,
        cancelled=measures.cancelled,
        superseded=measures.superseded,
        adopted=measures.adopted,
    )
    if not measures.values_ms:
        return finding
    values = sorted(measures.values_ms)
    share = aim.percentile / 100
    rank = rank_of_bound(len(values), share, aim.confidence / 100)
    bound_ms = None if rank is None else values[rank - 1]
    proposed_ms = None if bound_ms is None else rounded_up(bound_ms * aim.factor)
    return msgspec.structs.replace(
        finding,
        median_ms=values[rank_of_percentile(len(values), 0.5) - 1],
        percentile_ms=values[rank_of_percentile(len(values), share) - 1],
        bound_ms=bound_ms,
        longest_ms=values[-1],
        proposed_ms=proposed_ms,
        cut_short_today=_reaching(measures, min(today_ms)),
        cut_short=0 if proposed_ms is None else _reaching(measures, proposed_ms),
    )


def rounded_up(milliseconds: float) -> int:
    """Round up to a plain duration in ms, at least `THRESHOLD_MIN_MS`."""
    at_least = max(milliseconds, THRESHOLD_MIN_MS)
    step = next((step for up_to, step in _STEPS_MS if at_least <= up_to), _LONG_STEP_MS)
    return int(-(-at_least // step) * step)


def _reaching(measures: Measures, threshold_ms: int) -> int:
    return sum(value >= threshold_ms for value in measures.values_ms)


def _propose(rule: Rule, found: dict[Watch, OperationStatistics], recorded: Recorded) -> Proposal:
    today_ms = rule.threshold_ms or 0
    watches = watches_of(rule)
    known = [found[watch].proposed_ms or 0 for watch in watches if found[watch].bound_ms is not None]
    unknown = [watch.operation.value for watch in watches if found[watch].bound_ms is None]
    proposed_ms = max(known, default=today_ms)
    if rule.silent_ms_min is not None:
        proposed_ms = max(proposed_ms, rounded_up(rule.silent_ms_min + _AFTER_SILENT_MS))
    if unknown:
        proposed_ms = max(proposed_ms, today_ms) if known else today_ms
    return Proposal(
        rule=rule.id,
        today_ms=today_ms,
        proposed_ms=proposed_ms,
        measured_from=rule.measured_from,
        operations=tuple(watch.operation.value for watch in watches),
        unknown=tuple(unknown),
        healthy=sum(found[watch].healthy for watch in watches),
        cut_short_today=sum(_reaching(recorded[watch], today_ms) for watch in watches),
        cut_short=sum(_reaching(recorded[watch], proposed_ms) for watch in watches),
        source=rule.source,
    )
