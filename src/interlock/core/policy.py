"""Policies: an ordered list of rules, of which the first match decides; without a match the request is denied.

`interlock.policies` reads policies from files, and `admission` applies verdicts.

A compiled policy is a table over (operation, vm_state, task_state). A cell holds the rules that match these three, in
order, up to the first without further conditions; a decision is one look-up and, in most cells, no test at all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from enum import StrEnum
from functools import cached_property
from typing import Final

import msgspec

from interlock.core.conditions import Conditions, Tests, compiled_tests
from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.records import Instance, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.core.time_windows import Calendar
from interlock.core.view_classes import distinguished_by, names_age, until_turns_ms
from interlock.core.views import View, build_view


class Verdict(StrEnum):
    """What a rule decides for the operations that it matches."""

    ADMIT = "admit"
    """Enqueue it."""
    REDUNDANT = "redundant"
    """Already done, or already requested."""
    DENY = "deny"
    PREEMPT = "preempt"
    """Enqueue it first; requests in flight are asked to stop."""
    AFTER = "after"
    """Deny it until the request in flight has made no progress for `threshold_ms`; then it takes over."""


class MeasuredFrom(StrEnum):
    """The start of an `after` rule's threshold."""

    LAST_PROGRESS = "last_progress"
    TASK_STARTED = "task_started"


class Before(StrEnum):
    """The result of an `after` rule until its threshold has passed."""

    DENY = "deny"
    REDUNDANT = "redundant"


SET_MARK: Final = "#"
"""Between the id of a rule and the number of one of its sets of conditions; no id as written contains it."""
DEFAULT_GRACE_MS: Final = 10_000
DEFAULT_APPROVE_WITHIN_MS: Final = 86_400_000
DEFAULT_OUTSTANDING_MAX: Final = 16


class Rule(Conditions, frozen=True, kw_only=True):
    """One rule: the operations and states that it is looked up by, further conditions, and a verdict.

    A condition that is None always holds, except that `vm_states` None excludes deleted instances.
    """

    id: str
    operations: frozenset[Operation]
    verdict: Verdict
    vm_states: frozenset[VmState] | None = None
    task_states: frozenset[str] | None = None
    """Task states, including `none`."""
    threshold_ms: int | None = None
    measured_from: MeasuredFrom = MeasuredFrom.LAST_PROGRESS
    before: Before = Before.DENY
    grace_ms: int = DEFAULT_GRACE_MS
    """How long a preempted request has to stop before it is fenced."""
    served_at_most_ms: int | None = None
    """How long a request that this rule admits may be served in total; 0: any time; None: the policy's default."""
    approve_within_ms: int = DEFAULT_APPROVE_WITHIN_MS
    """How long a request waits for the approval that this rule demands."""
    in_turn: bool = True
    """Whether a request that this rule admits must be permitted in the foreseen state too."""
    reason: str | None = None
    """Stable reason code for clients."""
    because: str | None = None
    """The reason as a sentence for people."""
    fixed: bool = False
    """Whether policies that extend this one must not change its decisions."""
    exceptions: frozenset[Operation] = frozenset()
    """For a fixed rule: the operations that a policy that extends this one may take out of it."""
    source: str = ""
    """Its location: `file:line`."""

    @property
    def family(self) -> str:
        """Return the id as it is written in the file: rules expanded from one are `id.operation` and `id#number`."""
        start = self.id.partition(SET_MARK)[0]
        if len(self.operations) != 1:
            return start
        (operation,) = self.operations
        return start.removesuffix(f".{operation.value}")

    @property
    def code(self) -> str:
        """Return the reason code: the rule's own, or its verdict's."""
        return self.reason or _CODES[self.verdict]

    def remedy(self, requested_by: str) -> str | None:
        """Say whose approval a request that it denies needs, for people; None if it demands none."""
        if self.unless_approved_by is None:
            return None
        kinds = {"role": "with the role {}", "group": "in the group {}"}
        named = (text.partition(":") for text in sorted(self.unless_approved_by))
        who = " or ".join(kinds[kind].format(name) for kind, _, name in named)
        return f"It needs the approval of another caller than {requested_by}, {who}."

    def age_ms(self, view: View) -> int:
        """Return the age that the threshold is compared with."""
        return view.silent_ms if self.measured_from is MeasuredFrom.LAST_PROGRESS else view.running_ms

    def until_threshold_ms(self, view: View) -> int:
        """Return the time until its threshold is reached, in milliseconds; 0 or less once it is."""
        return (self.threshold_ms or 0) - self.age_ms(view)


_CODES: Final = {
    Verdict.ADMIT: "admitted",
    Verdict.REDUNDANT: "already",
    Verdict.DENY: "not_allowed",
    Verdict.PREEMPT: "admitted",
    Verdict.AFTER: "in_progress",
}

NO_RULE: Final = Rule(
    id="no-rule",
    operations=frozenset(Operation),
    verdict=Verdict.DENY,
    reason="no_rule",
    because="No rule of the policy allows this operation in this state.",
)
NOT_PERFORMED: Final = "not-performed"
"""The id of the rule for operations that the driver does not implement."""
GONE: Final = Rule(
    id="gone",
    operations=frozenset(Operation),
    verdict=Verdict.DENY,
    reason="deleted",
    because="The VM has been deleted.",
)
TO_BE_DELETED: Final = Rule(
    id="to-be-deleted",
    operations=frozenset(Operation),
    verdict=Verdict.DENY,
    reason="deleting",
    because="A deletion of the VM is outstanding: the VM will be deleted before this request is served.",
    fixed=True,
)
"""Decides in the foreseen state if that is `deleted`."""
HOST_NOT_FENCED: Final = Rule(
    id="host-not-fenced",
    operations=frozenset({Operation.EVACUATE}),
    verdict=Verdict.DENY,
    host_reachable=True,
    reason="host_reachable",
    because="The VM's host is not fenced, so its guest may still run there; migrate the VM instead.",
    fixed=True,
)
"""Comes before every policy where hosts are known: two guests that write to one disk corrupt it."""
QUEUE_FULL: Final = Rule(
    id="queue-full",
    operations=frozenset(Operation),
    verdict=Verdict.DENY,
    reason="queue_full",
    because="The VM has as many outstanding requests as the policy allows (outstanding_max).",
)


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """A policy, with the rules of the policies that it extends after its own."""

    name: str
    rules: tuple[Rule, ...]
    outstanding_max: int = DEFAULT_OUTSTANDING_MAX
    """The maximum number of outstanding requests per instance, and of held ones."""
    protected_tags: tuple[str, ...] = ()
    """The tags that only an admin may set or remove; one that ends with `*` stands for all that begin so."""
    served_at_most: dict[Operation, int] = {}
    """How long the requests for an operation may be served in total, in milliseconds, where their rule has no limit of
    its own; 0, or left out: any time."""
    digest: str = ""
    """SHA-256 of everything in it that affects decisions, in hexadecimal. Empty if it was not read from a file."""
    names: dict[str, tuple[str, ...]] = {}
    """Custom names of operations, hard variants (`reboot_hard`) and task states, for tables."""


_Cell = tuple[tuple[Rule, Tests], ...]
_ALIVE: Final = frozenset(VmState) - {VmState.DELETED}
_LONG_CELL: Final = 4
_RECALLED_MAX: Final = 10_000
STAMP_LENGTH: Final = 16
"""The length of the digest in every decision, in hexadecimal digits."""


class CompiledPolicy:
    """A policy compiled to a decision table. Cells are filled on first use and never change."""

    def __init__(self, policy: Policy, performs: Iterable[Operation] | None = None) -> None:
        """Compile `policy`; with `performs`, every other operation is denied before any rule.

        Raises:
            PolicyError: a rule names an unknown role.
        """
        for rule in policy.rules:
            if unknown := (rule.roles or frozenset()).difference(Role):
                raise PolicyError(f"Rule {rule.id!r}: unknown role {min(unknown)!r}. Known: {', '.join(Role)}.")
        self.policy = policy
        self.outstanding_max = policy.outstanding_max
        missing = frozenset() if performs is None else frozenset(Operation) - frozenset(performs)
        self._rules = ((_not_performed(missing),) if missing else ()) + policy.rules
        self.stamp = {"name": policy.name, "digest": policy.digest[:STAMP_LENGTH]}
        """Name and digest, as recorded with every decision."""
        self._tests = [compiled_tests(rule) for rule in self._rules]
        self._cells: dict[tuple[Operation, VmState, str], _Cell] = {}
        self._classes: dict[int, Callable[[View], Hashable]] = {}
        self._recalled: dict[tuple[object, ...], Rule] = {}
        self.for_queue: CompiledPolicy = self
        """The policy that re-evaluates queued requests: another one while earlier policies bind what they admitted."""

        self.windows = windows_in(self._rules)
        """The time windows that its rules name."""
        self.time_matters = bool(self.windows) or any(map(names_age, self._rules))
        """Whether rules name time windows, or an age that no progress ends."""
        self.counts = any(rule.project_outstanding_min or rule.host_outstanding_min for rule in self._rules)
        """Whether its rules look at how many requests are outstanding in a project or on a host."""
        self.calendar: Calendar | None = None
        """When they are open; None: submissions say it."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._rules

    def limit_ms(self, rule: Rule, operation: Operation) -> int | None:
        """Return how long a request that the rule admits may be served in total; None: any time."""
        own = rule.served_at_most_ms
        return (self.policy.served_at_most.get(operation) if own is None else own) or None

    def limits(self, operation: Operation) -> bool:
        """Return whether every request for an operation has a limit of its total time."""
        admitting = (Verdict.ADMIT, Verdict.AFTER, Verdict.PREEMPT)
        rules = (rule for rule in self.rules if operation in rule.operations and rule.verdict in admitting)
        return all(self.limit_ms(rule, operation) is not None for rule in rules)

    def protected(self, tags: Iterable[str]) -> frozenset[str]:
        """Return those of the tags that only an admin may set or remove."""
        names = self.policy.protected_tags
        beginnings = tuple(name[:-1] for name in names if name.endswith("*"))
        return frozenset(tag for tag in tags if tag in names or tag.startswith(beginnings))

    def with_calendar(self, calendar: Calendar) -> CompiledPolicy:
        """Return the policy with the intervals in which its time windows are open."""
        timed = CompiledPolicy.__new__(type(self))
        timed.__dict__.update(self.__dict__)  # cells never change, and are shared
        timed.calendar = calendar
        return timed

    def timed(self, submission: Submission, now_ms: int) -> Submission:
        """Return a submission with the time windows that are open now."""
        if self.calendar is None:
            return submission
        return msgspec.structs.replace(submission, windows=self.calendar.open_at(now_ms))

    def view(self, instance: Instance, submission: Submission, now_ms: int) -> View:
        """Return what its rules see of a submission now."""
        return build_view(instance, self.timed(submission, now_ms), now_ms)

    def decide(self, view: View) -> Rule:
        """Return the first rule that matches, or `NO_RULE` or `GONE`."""
        key = (view.operation, view.vm_state, view.task_state)
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = self._fill(*key)
        alike = self._class_in(cell, view) if len(cell) > _LONG_CELL else None
        if alike is not None and (known := self._recalled.get(alike)) is not None:
            return known
        for rule, tests in cell:
            for value, test in tests:
                if not test(value(view)):
                    break
            else:
                if alike is not None:
                    self._remember(alike, rule)
                return rule
        raise AssertionError("A cell ends with a rule that has no condition.")

    def _class_in(self, cell: _Cell, view: View) -> tuple[object, ...]:
        """Return the key under which the decision of a long cell, which tests many conditions, is memoised."""
        number = id(cell)
        class_of = self._classes.get(number)
        if class_of is None:
            class_of = self._classes[number] = distinguished_by([rule for rule, _ in cell])
        return (number, class_of(view))

    def _remember(self, alike: tuple[object, ...], rule: Rule) -> None:
        if len(self._recalled) >= _RECALLED_MAX:
            self._recalled.clear()
        self._recalled[alike] = rule

    @cached_property
    def class_of(self) -> Callable[[View], Hashable]:
        """A function that gives views the same key if the policy decides alike for them, now and at their ages.

        The same rules hold for them, and the same thresholds have passed.
        """
        after = [rule for rule in self._rules if rule.verdict is Verdict.AFTER]
        since_progress, since_start = (
            [rule.threshold_ms or 0 for rule in after if rule.measured_from is measured_from]
            for measured_from in MeasuredFrom
        )
        bounds_ms = {"silent_ms": since_progress, "running_ms": since_start}
        return distinguished_by(self._rules, ("operation", "vm_state", "task_state"), bounds_ms)

    def depends_on_time(self, view: View) -> bool:
        """Return whether a rule that may decide a view depends on a time window or on the instance's age."""
        cell = self.cell(view.operation, view.vm_state, view.task_state)
        return bool(windows_in(cell)) or any(map(names_age, cell))

    def changes_in_ms(self, view: View, now_ms: int) -> int | None:
        """Return the time until the decision may change, in milliseconds; None if time alone does not change it."""
        cell = self.cell(view.operation, view.vm_state, view.task_state)
        waits = [
            wait for rule in cell for wait in (*until_turns_ms(rule, view), rule.until_threshold_ms(view)) if wait > 0
        ]
        if self.calendar is not None:
            change_ms = self.calendar.next_change_ms(windows_in(cell), now_ms)
            waits += [] if change_ms is None else [change_ms - now_ms]
        return min(waits, default=None)

    def cell(self, operation: Operation, vm_state: VmState, task_state: str) -> tuple[Rule, ...]:
        """Return the rules that match these three, in order, up to the first without further conditions."""
        return tuple(rule for rule, _tests in self._fill(operation, vm_state, task_state))

    def _fill(self, operation: Operation, vm_state: VmState, task_state: str) -> _Cell:
        cell: list[tuple[Rule, Tests]] = []
        for rule, tests in zip(self._rules, self._tests, strict=True):
            if operation not in rule.operations:
                continue
            if vm_state not in (_ALIVE if rule.vm_states is None else rule.vm_states):
                continue
            if rule.task_states is not None and task_state not in rule.task_states:
                continue
            cell.append((rule, tests))
            if not tests:
                return tuple(cell)
        cell.append((GONE if vm_state is VmState.DELETED else NO_RULE, ()))
        return tuple(cell)


def windows_in(rules: Iterable[Rule]) -> frozenset[str]:
    """Return the time windows that rules name, with or without `!`."""
    return frozenset(text.removeprefix("!") for rule in rules for text in rule.within or ())


def _not_performed(operations: frozenset[Operation]) -> Rule:
    return Rule(
        id=NOT_PERFORMED,
        operations=operations,
        verdict=Verdict.DENY,
        reason="not_performed",
        because="The hypervisor driver of this server does not implement this operation.",
        fixed=True,
    )
