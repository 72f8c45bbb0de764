"""Records of policy activations: the policy texts, and each switch from one policy to the next."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class PolicyBundle(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a policy: its main file and the files that it extends."""

    main: str
    """The main file's name among `files`."""
    files: dict[str, str]
    """Texts by name, without the built-in policies that it extends."""


class SwitchSource(StrEnum):
    """How a policy was activated."""

    CONFIGURED = "configured"
    """The server started with it."""
    RELOADED = "reloaded"
    """The configured policy was reloaded (SIGHUP)."""
    LOADED = "loaded"
    """An admin loaded it at run time."""
    ROLLED_BACK = "rolled_back"
    """An admin rolled back to an earlier policy."""


class Outstanding(StrEnum):
    """What a policy switch does to requests that were admitted before it."""

    KEEP = "keep"
    """None is cancelled that the policy which admitted it permits."""
    REJUDGE = "rejudge"
    """Queued requests are evaluated by the new policy at once, and cancelled if it denies them."""


class Walk(msgspec.Struct, frozen=True, kw_only=True):
    """The extent of the model checker's search of a policy."""

    states: int
    transitions: int
    complete: bool
    """False if it reached its limit of time."""
    seconds: float
    assumptions: tuple[str, ...] = ()
    """What the search held fixed, one sentence each."""
    role_limits: str | None = None
    """What callers of an ordinary role alone can do, as a sentence; None if it was not determined."""
    certified_by: str | None = None
    """The public key of whoever certified that search; None if the server made it itself."""
    version: str | None = None
    """The version of Interlock that made the search; None if that was not recorded."""


class PolicySwitch(msgspec.Struct, frozen=True, kw_only=True):
    """One policy activation. The last switch names the active policy."""

    number: int = 0
    """Sequence number, from 1; assigned by the store."""
    digest: str
    name: str
    at_ms: int
    by: str
    """Who did it: the name of a token or of a component of the server."""
    source: SwitchSource
    configured_digest: str
    """The digest of the policy in the configuration at that time."""
    outstanding: Outstanding
    cancelled: int | None = None
    """How many requests were cancelled by re-evaluation; None until that is done, and if nothing was re-evaluated."""
    walk: Walk | None = None
    """The search of its states before; None if there was none."""
