"""What is kept of the policies that came into force: their texts, and each switch from one to the next."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class PolicyBundle(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a policy: its main file, and those of the files that it extends."""

    main: str
    """The main file's name among `files`."""
    files: dict[str, str]
    """Texts by name. A built-in policy that is extended is not among them."""


class SwitchSource(StrEnum):
    """How a policy came into force."""

    CONFIGURED = "configured"
    """The server started with it."""
    RELOADED = "reloaded"
    """The configured one was read again, because the server was told to (SIGHUP)."""
    LOADED = "loaded"
    """An admin loaded it while the server ran."""
    ROLLED_BACK = "rolled_back"
    """An admin brought an earlier one back."""


class Outstanding(StrEnum):
    """What a switch of the policy means to the requests that were admitted before it."""

    KEEP = "keep"
    """They keep their promise: none is cancelled that the policy by which it was admitted permits."""
    REJUDGE = "rejudge"
    """What waits is judged by the new policy at once, and cancelled where that refuses it."""


class PolicySwitch(msgspec.Struct, frozen=True, kw_only=True):
    """One policy coming into force. The last switch says which policy is."""

    number: int = 0
    """Counts the switches of a store, from 1; given by the store."""
    digest: str
    name: str
    at_ms: int
    by: str
    """Who did it: the name of a token, or of what in the server did."""
    source: SwitchSource
    configured_digest: str
    """The digest of the policy that the configuration named then."""
    outstanding: Outstanding
    cancelled: int | None = None
    """How many requests judging again has cancelled; None until that is done, and where nothing was judged."""
