"""Wire types of the policy in force, of loading another, and of the history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from interlock.api.schemas.responses import Problem
from interlock.api.schemas.wire import Seconds, Timestamp, Wire
from interlock.core.condition_kinds import Takes
from interlock.core.conditions import CONDITIONS
from interlock.core.policy_switches import Outstanding, SwitchSource

_CONDITION_TYPES: Final[Mapping[Takes, Any]] = {
    Takes.FLAG: bool,
    Takes.TIME: Seconds,
    Takes.COUNT: int,
    Takes.KINDS: tuple[str, ...],
    Takes.WORDS: tuple[str, ...],
    Takes.TEXTS: tuple[str, ...],
}

if TYPE_CHECKING:
    PolicyConditions = Wire
else:
    PolicyConditions = msgspec.defstruct(
        "PolicyConditions",
        [
            (
                condition.wire,
                Annotated[_CONDITION_TYPES[condition.kind.takes] | None, Meta(description=condition.meaning)],
                None,
            )
            for condition in CONDITIONS
        ],
        bases=(Wire,),
        module=__name__,
        frozen=True,
        kw_only=True,
        omit_defaults=True,
    )


class PolicyRule(PolicyConditions, frozen=True, kw_only=True, omit_defaults=True):
    """One rule; an absent condition always matches."""

    id: str
    verdict: str
    operations: tuple[str, ...]
    vm_state: tuple[str, ...] | None = None
    task_state: tuple[str, ...] | None = None
    threshold_s: Seconds | None = None
    measured_from: str | None = None
    before: str | None = None
    """Verdict of an `after` rule before its threshold: `deny` or `redundant`."""
    grace_s: Seconds | None = None
    """Time for a preempted operation to confirm the interrupt."""
    served_at_most_s: Seconds | None = None
    """How long an admitted request may be served in total; 0: any time; absent: the policy's default."""
    in_turn: bool = True
    reason: str | None = None
    because: str | None = None
    fixed: bool = False
    source: str = ""
    """File and line."""


class RefusedConfiguration(Wire, frozen=True, kw_only=True):
    """The configured policy, if it is rejected and another is in force."""

    name: str
    """As in the configuration: the name of a built-in, or the path of a file."""
    at: Timestamp
    """When it was last tried: at the start, or on SIGHUP."""
    why: str
    remedy: str | None


class Policy(Wire, frozen=True, kw_only=True):
    """The policy in force; the first matching rule decides."""

    name: str
    digest: str = ""
    """Of its meaning, independent of formatting; the first part of the ETag."""
    outstanding_max: int
    protected_tags: tuple[str, ...] = ()
    """Tags that only an admin may set or remove; one that ends with `*` stands for all that begin so."""
    served_at_most_s: dict[str, Seconds] = msgspec.field(default_factory=dict)
    """How long the requests for an operation may be served in total; 0, or absent: any time."""
    number: int = 0
    """Number of the switch that put it in force."""
    source: str = ""
    """How it came into force: `configured`, `reloaded`, `loaded` or `rolled_back`."""
    loaded_at: Timestamp | None = None
    loaded_by: str = ""
    """Name of the token; `server` if the server loaded it."""
    main: str = ""
    """The name of its main file in `files`."""
    files: tuple[str, ...] = ()
    """Its files; see `/v1/policy/text`."""
    exploration: PolicyWalk | None = None
    """What was explored before it came into force; null if nothing was, or if it is not known."""
    configured_refused: RefusedConfiguration | None = None
    """Why the configured policy is rejected; null if it is not."""
    rules: tuple[PolicyRule, ...]


class PolicyName(Wire, frozen=True, kw_only=True):
    """A policy that was in force."""

    name: str
    digest: str
    number: int
    """Number of the switch that put it in force."""


class PolicyFinding(Wire, frozen=True, kw_only=True):
    """A finding of the policy check."""

    severity: Literal["error", "warning", "note"]
    code: str
    """Stable code of the finding."""
    rule: str | None
    place: str
    """File and line."""
    message: str
    remedy: str | None


class PolicyWalk(Wire, frozen=True, kw_only=True):
    """Coverage of the exploration of reachable states."""

    states: int
    transitions: int
    complete: bool
    """False if it timed out."""
    seconds: Seconds
    assumptions: tuple[str, ...]
    """What the exploration held fixed, one sentence each."""
    role_limits: str | None = None
    """What callers with the role `member` alone can do, as a sentence; null if that was not determined."""
    certified_by: str | None = None
    """Public key of the certificate that stands for the exploration; null if the server explored it."""
    version: str | None = None
    """Version of Interlock that explored it; null if that was not recorded."""


class PolicyViolation(Wire, frozen=True, kw_only=True):
    """A law that the policy violates."""

    law: int
    what: str
    story: tuple[str, ...]
    """Counterexample: the lines of a script for `interlock rehearse`."""


class PolicyLoaded(Wire, frozen=True, kw_only=True):
    """Result of loading a policy."""

    name: str
    digest: str
    changed: bool
    """False for a dry run, or if it was in force already."""
    number: int
    """Number of the switch that put the present policy in force."""
    previous: PolicyName
    """The policy in force before."""
    outstanding: Outstanding
    """How requests admitted before were handled."""
    cancelled: int | None
    """Number of requests cancelled by the new evaluation; null if they were not evaluated again."""
    findings: tuple[PolicyFinding, ...]
    exploration: PolicyWalk | None
    """Null if its states were not explored."""


class PolicyBlockedVm(Wire, frozen=True, kw_only=True):
    """A VM that blocks the activation: with its outstanding requests, nobody could delete it under the policy."""

    instance_id: str
    name: str
    project: str
    operation: str
    """Of its request in flight, or else of the first that is queued or held."""
    status: str
    because: str
    alike: int
    """How many more VMs are in the same situation."""
    rejudge_helps: bool
    """Whether the policy can be activated with `outstanding` `rejudge`, as far as this VM is concerned."""


class PolicyProblem(Problem, frozen=True, kw_only=True, omit_defaults=False):
    """Why a policy is rejected."""

    findings: tuple[PolicyFinding, ...]
    violations: tuple[PolicyViolation, ...]
    blocked: tuple[PolicyBlockedVm, ...] = ()
    """The VMs that block its activation, one of each kind."""
    exploration: PolicyWalk | None


class PolicySwitch(Wire, frozen=True, kw_only=True):
    """A switch of the policy."""

    number: int
    name: str
    digest: str
    at: Timestamp
    by: str
    """Name of the token; `server` if the server loaded it."""
    source: SwitchSource
    """`configured`, `reloaded` (SIGHUP), `loaded` or `rolled_back`."""
    outstanding: Outstanding
    cancelled: int | None


class PolicyHistory(Wire, frozen=True, kw_only=True):
    """Switches of the policy, newest first; the first is the policy in force."""

    items: tuple[PolicySwitch, ...]
    next_cursor: str | None


class PolicyText(Wire, frozen=True, kw_only=True):
    """The text of a policy, unchanged."""

    number: int
    main: str
    """The name of its main file in `files`."""
    files: dict[str, str]
