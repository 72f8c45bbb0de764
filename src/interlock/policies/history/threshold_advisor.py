"""Threshold advisor: proposes thresholds of `after` rules from recorded history.

A threshold should be longer than any progress gap of a healthy operation, as the rule measures it. Only requests that
succeeded are measured. The proposal is a distribution-free upper confidence bound on a percentile of the recorded gaps,
times a factor, rounded up. Where too little was recorded for a bound, the current threshold is never lowered.

The k-th smallest of n independent values lies at or above their p-th percentile with the probability that at most
k - 1 of them lie below it, which is binomial. (H. A. David, H. N. Nagaraja, Order Statistics, section 7.1.)
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import Final

import msgspec

from interlock.core.errors import Invalid
from interlock.core.operations import CATALOGUE, TASK_OPERATION, TASK_STATES, Lane, Operation
from interlock.core.policy import MeasuredFrom, Policy, Rule, Verdict
from interlock.core.states import NO_TASK

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


_SPREAD: Final = 9
"""Standard deviations beyond which the weight of a binomial is below rounding."""


def rank_of_bound(count: int, share: float, confidence: float) -> int | None:
    """Return the smallest k such that the k-th smallest of `count` values bounds a percentile from above.

    `share` is the percentile and `confidence` the required probability, both between 0 and 1. None if not even the
    greatest value is such a bound: `values_needed` returns how many values that takes.
    """
    if count < 1:
        return None
    mean, deviation = count * share, math.sqrt(count * share * (1 - share))
    rank = min(count, math.ceil(mean + _SPREAD * deviation) + 20)
    weight = _binomial(count, share, rank)
    # The probability that `rank` or more lie below the percentile, so that the bound fails.
    above = weight
    if above > 1 - confidence:
        return None
    while rank > 1:
        weight *= rank * (1 - share) / ((count - rank + 1) * share)
        if above + weight > 1 - confidence:
            break
        above += weight
        rank -= 1
    return rank


def values_needed(share: float, confidence: float) -> int:
    """Return how many values it takes until the greatest bounds the percentile with the confidence."""
    return max(1, math.ceil(round(math.log(1 - confidence) / math.log(share), 9)))


def rank_of_percentile(count: int, share: float) -> int:
    """Return the nearest rank of the percentile among `count` ordered values, from 1."""
    return max(1, math.ceil(round(count * share, 9)))


def _binomial(count: int, share: float, successes: int) -> float:
    logarithm = (
        math.lgamma(count + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(count - successes + 1)
        + successes * math.log(share)
        + (count - successes) * math.log1p(-share)
    )
    return math.exp(logarithm)


ServiceRow = tuple[str | None, str, int, str]
"""An event of a request in service: request id, event kind, time in ms, and data as JSON."""

_COMPONENTS: Final = frozenset(entry.operation for entry in CATALOGUE.values() if entry.lane is Lane.COMPONENT)
_ENDS: Final = {
    "request.failed": "failed",
    "request.cancelled": "cancelled",
    "request.superseded": "superseded",
}


class Watch(msgspec.Struct, frozen=True, order=True):
    """One operation in flight, in the phases in which a rule may take over from it."""

    operation: Operation
    phases: tuple[str, ...]
    """In the order of the catalogue."""
    measured_from: MeasuredFrom

    @property
    def whole(self) -> bool:
        """Whether it covers every phase of the operation."""
        entry = CATALOGUE[self.operation]
        return set(self.phases) == {*entry.phases, *entry.hard_phases}


def watches_of(rule: Rule) -> tuple[Watch, ...]:
    """Return the operations that an `after` rule takes over from, in the order of the catalogue."""
    if rule.verdict is not Verdict.AFTER:
        return ()
    found = dict[Operation, list[str]]()
    for phase in TASK_STATES:
        if rule.task_states is None or phase in rule.task_states:
            found.setdefault(TASK_OPERATION[phase], []).append(phase)
    if rule.task_states is None or NO_TASK in rule.task_states:
        # Without a state change in flight, the component change in flight is measured.
        named = _COMPONENTS & rule.outstanding if rule.outstanding else _COMPONENTS
        for operation in named or _COMPONENTS:
            found[operation] = list(CATALOGUE[operation].phases)
    return tuple(
        Watch(operation, tuple(found[operation]), rule.measured_from) for operation in Operation if operation in found
    )


class Measures:
    """Measurements of one watch: milliseconds of every request that succeeded, and counts of the others."""

    def __init__(self) -> None:
        self.values_ms = array("q")
        self.failed = 0
        self.cancelled = 0
        self.superseded = 0
        """Taken over or preempted, so that their outcome is unknown."""
        self.adopted = 0
        """Succeeded across a restart of the server, so that their duration is meaningless."""


Recorded = dict[Watch, Measures]


class _EventData(msgspec.Struct, gc=False):
    operation: str = ""
    phase: str | None = None
    requests: tuple[str, ...] = ()


_decode: Final = msgspec.json.Decoder(_EventData).decode


class _Served:
    """A request in service, with its phase times."""

    __slots__ = ("adopted", "left_ms", "operation", "phase", "seen_ms", "silences_ms", "taken_ms")

    def __init__(self, operation: str, phase: str, at_ms: int) -> None:
        self.operation = operation
        self.phase = phase
        self.taken_ms = self.seen_ms = at_ms
        self.silences_ms: dict[str, int] = {}
        """The longest silence in each phase."""
        self.left_ms: dict[str, int] = {}
        """Time from take to the last progress in each phase."""
        self.adopted = False

    def alive(self, at_ms: int, phase: str | None) -> None:
        """Record a sign of life, which may start a phase."""
        silence_ms = at_ms - self.seen_ms
        if silence_ms >= self.silences_ms.get(self.phase, 0):
            self.silences_ms[self.phase] = silence_ms
        self.left_ms[self.phase] = at_ms - self.taken_ms
        self.seen_ms = at_ms
        if phase is not None:
            self.phase = phase


def measure(rows: Iterable[ServiceRow], watches: Iterable[Watch]) -> dict[Watch, Measures]:
    """Measure each watch from recorded events in order.

    Unchanged progress leaves no event, so that a measured silence is an upper bound of the true one.
    """
    measures = {watch: Measures() for watch in watches}
    by_operation: dict[str, list[tuple[Watch, Measures]]] = {}
    for watch, found in measures.items():
        by_operation.setdefault(watch.operation.value, []).append((watch, found))
    served: dict[str, _Served] = {}
    for request_id, kind, at_ms, data in rows:
        if kind == "instance.adopted":
            _adopt(served, at_ms, data)
        elif request_id is None:
            continue
        elif kind == "request.taken":
            taken = _decoded(data)
            if taken.operation in by_operation:
                served[request_id] = _Served(taken.operation, taken.phase or "", at_ms)
        elif (request := served.get(request_id)) is not None:
            if kind == "request.progress":
                request.alive(at_ms, _decoded(data).phase)
            else:
                del served[request_id]
                _end(request, kind, at_ms, by_operation[request.operation])
    return measures


def _adopt(served: dict[str, _Served], at_ms: int, data: str) -> None:
    """Restart the ages of adopted requests, as the gate does after a restart of the server."""
    for request_id in _decoded(data).requests:
        request = served.get(request_id)
        if request is not None:
            request.adopted = True
            request.seen_ms = at_ms


def _end(request: _Served, kind: str, at_ms: int, watches: list[tuple[Watch, Measures]]) -> None:
    request.alive(at_ms, None)
    for watch, found in watches:
        phases = [phase for phase in watch.phases if phase in request.silences_ms]
        if not phases:
            continue
        if kind in _ENDS:
            counter = _ENDS[kind]
            setattr(found, counter, getattr(found, counter) + 1)
        elif watch.measured_from is MeasuredFrom.LAST_PROGRESS:
            found.values_ms.append(max(request.silences_ms[phase] for phase in phases))
        elif request.adopted:
            found.adopted += 1
        else:
            found.values_ms.append(max(request.left_ms[phase] for phase in phases))


def _decoded(data: str) -> _EventData:
    try:
        return _decode(data)
    except msgspec.DecodeError:
        return _EventData()
