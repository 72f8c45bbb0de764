"""What goes over the wire of images, volumes, tokens, the policy and the server's health, as `schemas` has the rest.

Clients import all of it from there.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from interlock.ports import Role, SmallForm
from interlock.service.wishes import SHA256_PATTERN, Name

Timestamp = Annotated[str, Meta(extra_json_schema={"format": "date-time", "examples": ["2026-03-01T12:00:00.000Z"]})]
ImageKind = Literal["disk", "kernel", "iso"]
Seconds = Annotated[float, Meta(ge=0)]


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all answers."""


# ------------------------------------------------------------------------------------- images, volumes and tokens


class Image(Wire, frozen=True, kw_only=True):
    """What an instance boots."""

    id: str
    name: str
    kind: ImageKind
    format: str
    """Of a disk: `raw` or `qcow2`."""
    cmdline: str | None
    size_bytes: int
    """The size that the guest sees, for a disk."""
    stored_bytes: int = 0
    """How much room it took on the server's disk when it was brought in; 0: not noted."""
    sha256: str
    """Of what was given, before it was converted."""
    converted_from: str | None = None
    """The format in which it was given, if that is not the one in which it is kept."""
    created_at: Timestamp
    project: str | None = None
    """Whose it is; null: every project may use it."""
    source_instance: str | None = None
    """The id of the instance of which it is a snapshot."""
    backup_type: str | None = None
    """Of a backup: with which others of the instance it rotates."""


class ImageList(Wire, frozen=True, kw_only=True):
    """All images."""

    items: tuple[Image, ...]


class NewSmallImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A small guest image to build on the server from its distribution's packages."""

    name: Name
    form: SmallForm = "kernel"
    """`kernel`, which boots sooner, with an empty root disk; or `disk`, of which a snapshot boots, too."""


class ImageUpload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text fields of an upload; the files are the parts `disk`, or `kernel` and `initrd`."""

    name: Name
    kind: Literal["disk", "kernel"]
    sha256: Annotated[str, Meta(pattern=SHA256_PATTERN)] | None = None
    """Of a disk: what its SHA-256 must be."""
    cmdline: Annotated[str, Meta(max_length=2048)] = ""
    """Of a kernel: its command line."""


class Volume(Wire, frozen=True, kw_only=True):
    """A disk that lives on its own and can be attached to one instance at a time."""

    id: str
    name: str
    project: str
    size_bytes: int
    attached_to: str | None
    """The id of the instance that has it."""
    created_at: Timestamp


class VolumeList(Wire, frozen=True, kw_only=True):
    """The project's volumes."""

    items: tuple[Volume, ...]


class NewToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bearer token to make."""

    name: Name
    role: Role
    project: Name


class Token(Wire, frozen=True, kw_only=True):
    """A bearer token, without its secret."""

    id: str
    name: str
    role: Role
    project: str
    created_at: Timestamp


class MadeToken(Wire, frozen=True, kw_only=True):
    """A new token with its secret, which is shown this once."""

    token: Token
    secret: str


class TokenList(Wire, frozen=True, kw_only=True):
    """All tokens."""

    items: tuple[Token, ...]


# ---------------------------------------------------------------------------------------------- policy and health


class PolicyRule(Wire, frozen=True, kw_only=True, omit_defaults=True):
    """One rule; a condition that is absent holds always."""

    id: str
    verdict: str
    operations: tuple[str, ...]
    vm_state: tuple[str, ...] | None = None
    task_state: tuple[str, ...] | None = None
    outstanding: tuple[str, ...] | None = None
    """Any of these kinds is queued or in flight; empty: nothing is."""
    held: tuple[str, ...] | None = None
    """Any of these kinds is held; empty: nothing is."""
    launched: bool | None = None
    """Whether the instance has ever run."""
    roles: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    locked: bool | None = None
    blocked: bool | None = None
    host_reachable: bool | None = None
    hard: bool | None = None
    silent_s_min: Seconds | None = None
    threshold_s: Seconds | None = None
    measured_from: str | None = None
    before: str | None = None
    """What an `after` rule answers until its threshold has passed: `deny` or `redundant`."""
    grace_s: Seconds | None = None
    """How long what a `preempt` rule asks to stop has to confirm."""
    in_turn: bool = True
    reason: str | None = None
    because: str | None = None
    fixed: bool = False
    source: str = ""
    """Where it stands: file and line."""


class RefusedConfiguration(Wire, frozen=True, kw_only=True):
    """The policy that the configuration names is not the one in force, because something is wrong with it."""

    name: str
    """As the configuration has it: a built-in's, or the path of a file."""
    at: Timestamp
    """When it was last tried: at the start, or on SIGHUP."""
    why: str
    remedy: str | None


class Policy(Wire, frozen=True, kw_only=True):
    """The policy that this server decides by; of its rules the first that matches decides."""

    name: str
    digest: str = ""
    """Of what it decides, whatever it looks like; also the ETag."""
    outstanding_max: int
    number: int = 0
    """Of the switch that put it in force."""
    source: str = ""
    """How it came into force: `configured`, `reloaded`, `loaded` or `rolled_back`."""
    loaded_at: Timestamp | None = None
    loaded_by: str = ""
    """The name of the token; `server` where nobody asked for it."""
    main: str = ""
    """The name of its own file among `files`."""
    files: tuple[str, ...] = ()
    """The files that it was read from; see `/v1/policy/text`."""
    configured_refused: RefusedConfiguration | None = None
    """Why what the configuration names is not taken; null where nothing is known to be wrong with it."""
    rules: tuple[PolicyRule, ...]


class Health(Wire, frozen=True, kw_only=True):
    """The process answers."""

    status: Literal["alive"]
    version: str


class Readiness(Wire, frozen=True, kw_only=True):
    """Whether the server can do its work."""

    ready: bool
    reasons: tuple[str, ...] = ()
    """What is missing, one sentence each; of a server that is ready, what somebody should look into."""
