"""The gate evaluated for a fleet: which of many instances would admit which operation now.

A million instances are in a few thousand situations at most: sets of instances that neither a rule nor the queue
distinguishes. The gate of the core judges one instance of each. `compare` has where two policies answer differently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final, NamedTuple, assert_never

import msgspec

from interlock.core.admission import judge
from interlock.core.operations import Lane, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.record_operations import changes_nothing
from interlock.core.records import Admitted, Denied, Held, Instance, Redundant, Status, Submission
from interlock.core.request_queue import foresee
from interlock.core.views import build_view

NOBODY: Final[Mapping[str, Any]] = MappingProxyType({})
"""A caller of whom rules can ask nothing unusual."""
_replace = msgspec.structs.replace


class Answered(IntEnum):
    """The answer to an operation."""

    ADMITTED = 0
    REDUNDANT = 1
    DENIED = 2


class FleetAnswer(NamedTuple):
    """The answer of one instance to one operation."""

    disposition: Answered
    rule: str
    reason: str | None
    """The reason code; None if admitted."""
    foreseen: bool
    """Whether the rule decided on the foreseen state."""
    allowed_in_ms: int | None
    """The time after which it would take over."""


class Group(NamedTuple):
    """Instances of one situation with the same list of blocked operations."""

    situation: int
    blocked: tuple[Operation, ...]


class FleetAnswers:
    """The answers of a policy to some operations, for each instance of a fleet at one time."""

    def __init__(
        self,
        instances: Sequence[Instance],
        policy: CompiledPolicy,
        now_ms: int,
        asked: Submission,
        operations: Iterable[Operation],
        unreachable_hosts: Iterable[str],
    ) -> None:
        """`asked` is what is submitted to each, but for its operation."""
        self.instances = instances
        self.operations = tuple(operations)
        self._policy = policy
        self._now_ms = now_ms
        self._asked = asked
        self._unreachable = frozenset(unreachable_hosts)
        self._samples: list[Instance] = []
        self._answers: dict[tuple[Operation, int, bool], FleetAnswer] = {}
        situation_of = _situations(policy)
        numbers: dict[Hashable, int] = {}
        self.groups: list[Group] = []
        """The group of each instance."""
        for instance in instances:
            # Blocked operations are distinguished for each operation, or few fleets would have few situations.
            free = _replace(instance, blocked_operations=()) if instance.blocked_operations else instance
            key = situation_of(free, self._submission(free, Operation.STOP), now_ms)
            number = numbers.setdefault(key, len(numbers))
            if number == len(self._samples):
                # Preconditions depend on parameters, which are not known.
                self._samples.append(_replace(free, spec=None))
            self.groups.append(Group(number, instance.blocked_operations))
        self._sizes = Counter(self.groups)

    @property
    def situations(self) -> int:
        """The number of situations."""
        return len(self._samples)

    def answer(self, operation: Operation, row: int) -> FleetAnswer:
        """Return the answer of one instance."""
        return self._judge(operation, _replace(self.instances[row], spec=None))

    def of(self, operation: Operation, group: Group) -> FleetAnswer:
        """Return the answer of the instances of a group; its time is that of one of them."""
        blocked = operation in group.blocked
        key = (operation, group.situation, blocked)
        found = self._answers.get(key)
        if found is None:
            sample = self._samples[group.situation]
            if blocked:
                sample = _replace(sample, blocked_operations=(operation,))
            found = self._answers[key] = self._judge(operation, sample)
        return found

    def counts(self) -> dict[Operation, dict[Answered, int]]:
        """Return the number of instances by disposition, for each operation."""
        found = {}
        for operation in self.operations:
            numbers = dict.fromkeys(Answered, 0)
            for group, size in self._sizes.items():
                numbers[self.of(operation, group).disposition] += size
            found[operation] = numbers
        return found

    def reasons(self, operation: Operation) -> dict[tuple[Answered, str], int]:
        """Return how many instances do not admit an operation, by disposition and reason, the most frequent first."""
        found: Counter[tuple[Answered, str]] = Counter()
        for group, size in self._sizes.items():
            answer = self.of(operation, group)
            if answer.reason is not None:
                found[answer.disposition, answer.reason] += size
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def _submission(self, instance: Instance, operation: Operation) -> Submission:
        reachable = instance.host not in self._unreachable
        return _replace(self._asked, operation=operation, host_reachable=reachable)

    def _judge(self, operation: Operation, instance: Instance) -> FleetAnswer:
        answer = judge(instance, self._submission(instance, operation), self._policy, self._now_ms)
        match answer:
            case Admitted():
                return FleetAnswer(Answered.ADMITTED, answer.rule, None, foreseen=False, allowed_in_ms=None)
            case Redundant():
                disposition, foreseen = Answered.REDUNDANT, False
            case Denied():
                disposition, foreseen = Answered.DENIED, answer.foreseen
            case Held():
                raise AssertionError("Nothing is submitted to be held.")
            case _:
                assert_never(answer)
        allowed_in_ms = None if answer.allowed_at_ms is None else answer.allowed_at_ms - self._now_ms
        return FleetAnswer(disposition, answer.rule, answer.reason, foreseen, allowed_in_ms)


def judge_fleet(
    instances: Sequence[Instance],
    policy: CompiledPolicy,
    now_ms: int,
    *,
    caller: Mapping[str, Any] = NOBODY,
    hard: bool = False,
    operations: Iterable[Operation] = tuple(Operation),
    unreachable_hosts: Iterable[str] = (),
) -> FleetAnswers:
    """Judge operations for each instance at `now_ms`. Changes nothing.

    `caller` has the fields of `Submission` that describe who asks, such as `role`; by default they are the usual ones.
    """
    asked = Submission(
        request_id="not-submitted",
        operation=Operation.STOP,
        parameters={"hard": True} if hard else {},
        **{"requested_by": "", **caller},
    )
    return FleetAnswers(instances, policy, now_ms, asked, operations, unreachable_hosts)


def _situations(policy: CompiledPolicy) -> Callable[[Instance, Submission, int], Hashable]:
    """Return a function that gives instances the same key if the gate answers every operation alike for them."""
    counts_failures = any(rule.failures_min is not None for rule in policy.rules)

    def situation_of(instance: Instance, submission: Submission, now_ms: int) -> Hashable:
        submission = policy.timed(submission, now_ms)
        key = (
            policy.class_of(build_view(instance, submission, now_ms)),
            changes_nothing(instance, submission),
            frozenset(instance.failures.items()) if counts_failures else None,
        )
        if not instance.outstanding:
            return key
        foreseen = None
        if any(request.lane is Lane.STATE for request in instance.outstanding):
            there = foresee(instance, host_reachable=submission.host_reachable)
            foreseen = (
                policy.class_of(there.view(submission, now_ms)),
                frozenset(there.done) if counts_failures else None,
            )
        preempting = frozenset(
            (request.operation, request.hard)
            for request in instance.outstanding
            if request.preempts and request.status is Status.QUEUED
        )
        return (key, foreseen, preempting, len(instance.outstanding) >= policy.outstanding_max)

    return situation_of


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
