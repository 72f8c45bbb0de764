"""Wire types of images, volumes, tokens, memory dumps and the server's health."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from interlock.api.schemas.wire import Timestamp, Wire
from interlock.core.parameters import Name
from interlock.core.roles import Role
from interlock.core.specs import repr_hiding
from interlock.ports import SmallForm
from interlock.service.request_models import SHA256_PATTERN

ImageKind = Literal["disk", "kernel", "iso"]
Span = Annotated[str, Meta(min_length=1, max_length=64, description="A duration such as 30m, 12h or 90d.")]
MinMemory = Annotated[int, Meta(ge=0, le=1_048_576)]
"""In MiB."""


# ------------------------------------------------------------------------------------- images, volumes and tokens


class Image(Wire, frozen=True, kw_only=True):
    """A boot image: a disk, a kernel or an ISO."""

    id: str
    name: str
    kind: ImageKind
    format: str
    """Of a disk: `raw` or `qcow2`."""
    cmdline: str | None
    size_bytes: int
    """The size that the guest sees, for a disk."""
    stored_bytes: int = 0
    """Space on the server's disk when it was imported; 0: unknown."""
    sha256: str
    """Of the original file, before conversion."""
    converted_from: str | None = None
    """The original format if it was converted, with its compression and archive."""
    min_memory_mib: int = 0
    """Minimum memory of an instance, in MiB; less is rejected. 0: unknown."""
    created_at: Timestamp
    project: str | None = None
    """The owning project; null: every project may use it."""
    source_instance: str | None = None
    """Of a snapshot: the id of its instance."""
    backup_type: str | None = None
    """Of a backup: the type within which it rotates."""


class ImageList(Wire, frozen=True, kw_only=True):
    """All images."""

    items: tuple[Image, ...]


class ImageFetch(Wire, frozen=True, kw_only=True):
    """A download of an image from the web, and its progress."""

    id: str
    name: str
    url: str
    status: Literal["running", "succeeded", "failed", "cancelled"]
    phase: Literal["downloading", "inspecting"]
    received_bytes: int
    total_bytes: int | None
    """Null while unknown."""
    begun_at: Timestamp
    image: Image | None
    """The image, once it has succeeded."""
    error: str | None
    """Why it failed."""
    remedy: str | None


class ImageFetchList(Wire, frozen=True, kw_only=True):
    """The fetches of this server process."""

    items: tuple[ImageFetch, ...]


class NewSmallImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A small guest image to build on the server from its distribution's packages."""

    name: Name
    form: SmallForm = "kernel"
    """`kernel` boots faster, with an empty root disk; snapshots of `disk` are bootable."""


class ImageUpload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text fields of an upload; the files are the parts `disk`, or `kernel` and `initrd`."""

    name: Name
    kind: Literal["disk", "kernel"]
    sha256: Annotated[str, Meta(pattern=SHA256_PATTERN)] | None = None
    """Of a disk: the expected SHA-256."""
    format: Literal["raw"] | None = None
    """Of a disk: `raw` accepts one without a boot sector; by default the format is detected."""
    min_memory_mib: MinMemory | None = None
    """Minimum memory; default: none for a disk, for a kernel estimated from its size."""
    cmdline: Annotated[str, Meta(max_length=2048)] = ""
    """Of a kernel: the command line."""


class Volume(Wire, frozen=True, kw_only=True):
    """A disk that exists independently of instances and can be attached to one at a time."""

    id: str
    name: str
    project: str
    size_bytes: int
    attached_to: str | None
    """The id of its instance."""
    created_at: Timestamp


class VolumeList(Wire, frozen=True, kw_only=True):
    """The project's volumes."""

    items: tuple[Volume, ...]


class NewToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bearer token to create."""

    name: Name
    role: Role
    project: Name | None = None
    """By default the caller's own."""
    server_admin: bool = False
    """Confirms that an admin in another project than the caller's is to administer the whole server."""
    host: Name | None = None
    """The host of an agent: required for the role agent, not allowed for others."""
    groups: tuple[Name, ...] = ()
    """Groups of its holder, which policies may name."""
    expires_in: Span | None = None
    """When it expires, such as `90d`; by default after the longest time that the server allows, if it has one."""


class TokenRotation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new secret for a token."""

    overlap: Span | None = None
    """How long the former secret stays valid, such as `1h`; by default it ends at once."""
    expires_in: Span | None = None
    """When the new secret expires; by default after as long as the former one was valid for."""


class Token(Wire, frozen=True, kw_only=True):
    """A bearer token, without its secret."""

    id: str
    name: str
    role: Role
    project: str
    groups: tuple[str, ...] = ()
    """Groups of its holder, which policies may name."""
    host: str | None
    """The only host whose agent may use it; null for other roles."""
    created_at: Timestamp
    created_by: str | None = None
    """Who created it; null: the server, or unknown."""
    expires_at: Timestamp | None = None
    """When its secret expires; null: never."""
    expired: bool = False
    """Whether its secret has expired."""
    rotated_at: Timestamp | None = None
    """When it got its present secret; null: when it was created."""
    former_until_at: Timestamp | None = None
    """Until when the secret before the last rotation is valid."""
    last_used_at: Timestamp | None = None
    """When it was last used; after a crash of the server, possibly a minute earlier. Null: never, or unknown."""


class MadeToken(Wire, frozen=True, kw_only=True):
    """A new or rotated token with its secret, which is shown only once."""

    __repr__ = repr_hiding("secret")

    token: Token
    secret: str
    project_created: bool = False
    """Whether its project is new: it did not exist, and was created without a quota."""


class TokenList(Wire, frozen=True, kw_only=True):
    """All tokens; for a project_admin, those of its project."""

    items: tuple[Token, ...]


# --------------------------------------------------------------------------------------------------------- health


class Health(Wire, frozen=True, kw_only=True):
    """The process responds."""

    status: Literal["alive"]
    version: str


class Readiness(Wire, frozen=True, kw_only=True):
    """Whether the server is ready."""

    ready: bool
    reasons: tuple[str, ...] = ()
    """Why it is not ready, one sentence each; if it is ready, warnings."""


class MemoryDump(Wire, frozen=True, kw_only=True):
    """A dump of a guest's memory, as a compressed kdump."""

    id: str
    """The id of the request that made it."""
    size_bytes: int
    made_at: Timestamp


class DumpList(Wire, frozen=True, kw_only=True):
    """An instance's dumps, oldest first."""

    items: tuple[MemoryDump, ...]
