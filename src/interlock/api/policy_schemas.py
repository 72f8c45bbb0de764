"""What goes over the wire when a policy is loaded, and of its history. What the policy says is in `schemas`."""

from __future__ import annotations

from typing import Literal

from interlock.api.inventory_schemas import Seconds, Timestamp, Wire
from interlock.api.schemas import Problem
from interlock.core.policy_switches import Outstanding, SwitchSource


class PolicyName(Wire, frozen=True, kw_only=True):
    """A policy that was in force."""

    name: str
    digest: str
    number: int
    """Of the switch that put it in force."""


class PolicyFinding(Wire, frozen=True, kw_only=True):
    """One thing that the check has found."""

    severity: Literal["error", "warning", "note"]
    code: str
    """Names the kind of finding; stable."""
    rule: str | None
    place: str
    """File and line."""
    message: str
    remedy: str | None


class PolicyWalk(Wire, frozen=True, kw_only=True):
    """How far the walk through the reachable states came."""

    states: int
    transitions: int
    complete: bool
    """False if its time was up before all had been seen."""
    seconds: Seconds


class PolicyViolation(Wire, frozen=True, kw_only=True):
    """A law that the policy lets be broken."""

    law: int
    what: str
    story: tuple[str, ...]
    """How it comes about: the lines of a script for `interlock rehearse`."""


class PolicyLoaded(Wire, frozen=True, kw_only=True):
    """What became of a policy that was loaded."""

    name: str
    digest: str
    changed: bool
    """False if it was only tried, or was in force already."""
    number: int
    """Of the switch that put the policy in force that is in force now."""
    previous: PolicyName
    """What was in force before."""
    outstanding: Outstanding
    """What became of the requests admitted before."""
    cancelled: int | None
    """How many of them judging again has cancelled; null if they were not judged again."""
    findings: tuple[PolicyFinding, ...]
    exploration: PolicyWalk | None
    """Null if its states were not walked."""


class PolicyProblem(Problem, frozen=True, kw_only=True, omit_defaults=False):
    """Why a policy is not put in force."""

    findings: tuple[PolicyFinding, ...]
    violations: tuple[PolicyViolation, ...]
    exploration: PolicyWalk | None


class PolicySwitch(Wire, frozen=True, kw_only=True):
    """One policy coming into force."""

    number: int
    name: str
    digest: str
    at: Timestamp
    by: str
    """The name of the token; `server` where nobody asked for it."""
    source: SwitchSource
    """Whether it is the configured one, was reloaded (SIGHUP), loaded, or brought back."""
    outstanding: Outstanding
    cancelled: int | None


class PolicyHistory(Wire, frozen=True, kw_only=True):
    """Switches of the policy, newest first; the very first of them is the policy in force."""

    items: tuple[PolicySwitch, ...]
    next_cursor: str | None


class PolicyText(Wire, frozen=True, kw_only=True):
    """The text of a policy, exactly as it was loaded."""

    number: int
    main: str
    """The name of its own file among `files`."""
    files: dict[str, str]
