"""A policy: an ordered list of rules, of which the first that matches decides, and nothing matching denies.

What is here is the policy as values, and how one decision is looked up in it. Reading a policy from a file is not here
(see `interlock.policies`), nor is what a verdict leads to (see `admission`).

Compiled, a policy is a table over (operation, vm_state, task_state). A cell holds the rules that these three do not
rule out, in order, up to the first that has no further condition; a decision is one look-up and, in most cells, no
test at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec

from interlock.core.operations import BIT, Operation
from interlock.core.states import VmState


class Verdict(StrEnum):
    """What a rule says of the operations that it matches."""

    ADMIT = "admit"
    """Keep it, in turn."""
    REDUNDANT = "redundant"
    """It holds already, or is on its way."""
    DENY = "deny"
    PREEMPT = "preempt"
    """Keep it before everything else; what is in flight is asked to stop."""
    AFTER = "after"
    """Refuse it until what is in flight has shown no life for `threshold_ms`; from then on it takes over."""


class MeasuredFrom(StrEnum):
    """From when an `after` rule counts."""

    LAST_PROGRESS = "last_progress"
    TASK_STARTED = "task_started"


class Before(StrEnum):
    """What an `after` rule answers until its threshold has passed."""

    DENY = "deny"
    REDUNDANT = "redundant"


DEFAULT_GRACE_MS: Final = 10_000
DEFAULT_OUTSTANDING_MAX: Final = 16


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule. A condition that is None holds always; only `vm_states` None leaves out an instance that is deleted."""

    id: str
    operations: frozenset[Operation]
    verdict: Verdict
    vm_states: frozenset[VmState] | None = None
    task_states: frozenset[str] | None = None
    """Task states, among them `none` for no task."""
    outstanding: frozenset[Operation] | None = None
    """Holds if any of these kinds is queued or in flight; empty: if nothing is."""
    roles: frozenset[str] | None = None
    locked: bool | None = None
    blocked: bool | None = None
    """Whether the instance's own list of blocked operations names the operation."""
    tags: frozenset[str] | None = None
    """Holds if the instance has any of these tags."""
    host_reachable: bool | None = None
    held: frozenset[Operation] | None = None
    """Holds if a request of any of these kinds is held until the policy admits it; empty: if none is."""
    launched: bool | None = None
    """Whether a hypervisor has ever held the instance's guest."""
    hard: bool | None = None
    """Whether the request asks for the hard variant of its operation."""
    silent_ms_min: int | None = None
    """Holds if what is in flight has shown no life for at least so long."""
    threshold_ms: int | None = None
    measured_from: MeasuredFrom = MeasuredFrom.LAST_PROGRESS
    before: Before = Before.DENY
    grace_ms: int = DEFAULT_GRACE_MS
    """How long what a `preempt` asks to stop has to confirm before it is fenced."""
    in_turn: bool = True
    """Whether what this rule admits must be permitted in the foreseen state too."""
    reason: str | None = None
    """The stable code that a client sees."""
    because: str | None = None
    """The same for people."""
    fixed: bool = False
    """Whether nothing that extends this policy may change what this rule decides."""
    source: str = ""
    """Where it stands: `file:line`."""

    @property
    def code(self) -> str:
        """The reason that a client sees: the rule's own, or its verdict's."""
        return self.reason or _CODES[self.verdict]


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
"""The id of the rule for what the driver does not perform."""
GONE: Final = Rule(
    id="gone",
    operations=frozenset(Operation),
    verdict=Verdict.DENY,
    reason="deleted",
    because="The instance has been deleted.",
)
QUEUE_FULL: Final = Rule(
    id="queue-full",
    operations=frozenset(Operation),
    verdict=Verdict.DENY,
    reason="queue_full",
    because="As many requests are outstanding for this instance as the policy allows.",
)


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """A policy as written, with what it extends already put behind its own rules."""

    name: str
    rules: tuple[Rule, ...]
    outstanding_max: int = DEFAULT_OUTSTANDING_MAX
    """How many requests may be outstanding per instance, and how many may be held."""
    digest: str = ""
    """Which policy it is: SHA-256, in hexadecimal, of all of it that decides. Empty for one that was not read."""
    names: dict[str, tuple[str, ...]] = {}
    """What its own world calls an operation, the hard variant of one (`reboot_hard`) or a task state, for tables."""


class View(msgspec.Struct, frozen=True, gc=False):
    """All that a rule can see of one submission: the instance, the caller, and what is in the way."""

    operation: Operation
    vm_state: VmState
    task_state: str
    outstanding: int = 0
    """The kinds queued or in flight, as the union of their bits (`operations.BIT`)."""
    role: str = "member"
    locked: bool = False
    blocked: bool = False
    tags: tuple[str, ...] = ()
    host_reachable: bool = True
    hard: bool = False
    silent_ms: int = 0
    """Time since the last sign of life of what is in flight."""
    running_ms: int = 0
    """Time since what is in flight was taken."""
    launched: bool = True
    held: int = 0
    """The kinds held, as the union of their bits."""

    def age_ms(self, measured_from: MeasuredFrom) -> int:
        return self.silent_ms if measured_from is MeasuredFrom.LAST_PROGRESS else self.running_ms


_Cell = tuple[tuple[Rule, bool], ...]
_ALIVE: Final = frozenset(VmState) - {VmState.DELETED}
_LONG_CELL: Final = 12
_RECALLED_MAX: Final = 10_000
STAMP_LENGTH: Final = 16
"""How much of a policy's digest is told with every decision, in hexadecimal digits."""


class CompiledPolicy:
    """A policy made ready for deciding. Cells are filled when first asked for and never change."""

    def __init__(self, policy: Policy, performs: Iterable[Operation] | None = None) -> None:
        """Compile `policy`; with `performs`, every other operation is denied before any rule is asked."""
        self.policy = policy
        self.outstanding_max = policy.outstanding_max
        missing = frozenset() if performs is None else frozenset(Operation) - frozenset(performs)
        self._rules = ((_not_performed(missing),) if missing else ()) + policy.rules
        self.stamp = {"name": policy.name, "digest": policy.digest[:STAMP_LENGTH]}
        """The policy as every decision tells it."""
        self._masks = {rule.id: (_mask(rule.outstanding), _mask(rule.held)) for rule in self._rules}
        self._cells: dict[tuple[Operation, VmState, str], _Cell] = {}
        self._bounds: dict[int, list[int]] = {}
        self._recalled: dict[tuple[object, ...], Rule] = {}

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._rules

    def decide(self, view: View) -> Rule:
        """The first rule that matches, or the one that stands for none."""
        key = (view.operation, view.vm_state, view.task_state)
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = self._fill(*key)
        if len(cell) > _LONG_CELL:
            return self._recall(cell, view)
        return self._first(cell, view)

    def _first(self, cell: _Cell, view: View) -> Rule:
        for rule, conditional in cell:
            if not conditional or self._holds(rule, view):
                return rule
        raise AssertionError("A cell ends with a rule that has no condition.")

    def _recall(self, cell: _Cell, view: View) -> Rule:
        """What a long cell answers, found once for views that none of its rules tells apart.

        Only conditions tell such rules apart, so that all of them would have to be asked. Ages are classed by the times
        that the rules name.
        """
        bounds = self._bounds.get(id(cell))
        if bounds is None:
            bounds = sorted({rule.silent_ms_min for rule, _ in cell if rule.silent_ms_min is not None})
            self._bounds[id(cell)] = bounds
        age = bisect_right(bounds, view.silent_ms)
        flags = (view.locked, view.blocked, view.host_reachable, view.hard, view.launched)
        key = (id(cell), view.outstanding, view.held, view.role, view.tags, flags, age)
        rule = self._recalled.get(key)
        if rule is None:
            if len(self._recalled) >= _RECALLED_MAX:
                self._recalled.clear()
            rule = self._recalled[key] = self._first(cell, view)
        return rule

    def changes_in_ms(self, view: View) -> int | None:
        """After how much more time a decision may come out otherwise; None if time alone changes nothing."""
        waits = [
            wait
            for rule in self.cell(view.operation, view.vm_state, view.task_state)
            for wait in (
                (rule.silent_ms_min or 0) - view.silent_ms,
                (rule.threshold_ms or 0) - view.age_ms(rule.measured_from),
            )
            if wait > 0
        ]
        return min(waits, default=None)

    def cell(self, operation: Operation, vm_state: VmState, task_state: str) -> tuple[Rule, ...]:
        """The rules that these three do not rule out, in the order asked, up to the first with no further condition."""
        return tuple(rule for rule, _conditional in self._fill(operation, vm_state, task_state))

    def _fill(self, operation: Operation, vm_state: VmState, task_state: str) -> _Cell:
        cell: list[tuple[Rule, bool]] = []
        for rule in self._rules:
            if operation not in rule.operations:
                continue
            if vm_state not in (_ALIVE if rule.vm_states is None else rule.vm_states):
                continue
            if rule.task_states is not None and task_state not in rule.task_states:
                continue
            conditional = _is_conditional(rule)
            cell.append((rule, conditional))
            if not conditional:
                return tuple(cell)
        cell.append((GONE if vm_state is VmState.DELETED else NO_RULE, False))
        return tuple(cell)

    def _holds(self, rule: Rule, view: View) -> bool:
        if rule.outstanding is not None or rule.held is not None:
            outstanding, held = self._masks[rule.id]
            if rule.outstanding is not None and not _any_of(view.outstanding, outstanding):
                return False
            if rule.held is not None and not _any_of(view.held, held):
                return False
        return (
            (rule.roles is None or view.role in rule.roles)
            and (rule.locked is None or view.locked is rule.locked)
            and (rule.blocked is None or view.blocked is rule.blocked)
            and (rule.tags is None or not rule.tags.isdisjoint(view.tags))
            and (rule.host_reachable is None or view.host_reachable is rule.host_reachable)
            and (rule.hard is None or view.hard is rule.hard)
            and (rule.launched is None or view.launched is rule.launched)
            and (rule.silent_ms_min is None or view.silent_ms >= rule.silent_ms_min)
        )


def _is_conditional(rule: Rule) -> bool:
    conditions = (
        rule.outstanding,
        rule.roles,
        rule.locked,
        rule.blocked,
        rule.tags,
        rule.host_reachable,
        rule.hard,
        rule.held,
        rule.launched,
        rule.silent_ms_min,
    )
    return any(condition is not None for condition in conditions)


def _mask(operations: frozenset[Operation] | None) -> int:
    return sum(BIT[operation] for operation in operations or ())


def _any_of(there: int, wanted: int) -> bool:
    """Whether any wanted kind is there; where none is wanted, whether nothing is."""
    return there & wanted != 0 if wanted else there == 0


def _not_performed(operations: frozenset[Operation]) -> Rule:
    return Rule(
        id=NOT_PERFORMED,
        operations=operations,
        verdict=Verdict.DENY,
        reason="not_performed",
        because="The hypervisor driver of this server does not perform this operation.",
        fixed=True,
    )
