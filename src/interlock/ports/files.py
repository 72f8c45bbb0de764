"""The folders of files beside the store: images, volumes, dumps, and the one that hosts share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from interlock.core.records import Image, SharedFolder

SmallForm = Literal["kernel", "disk"]
"""How the small guest boots: its kernel directly, with an empty root disk, or from its own disk."""


class ImageFiles(Protocol):
    """The server's image folder. Every file is inspected before it is imported."""

    async def bring_disk(
        self, image_id: str, name: str, source: Path, sha256: str | None = None, *, claimed: str | None = None
    ) -> Image:
        """Inspect the disk image at `source` and copy it into the folder (durable when this returns).

        Compressed files are decompressed, and the disk of an OVA is extracted. `claimed` is `raw` to import a file as a
        disk although it has no boot sector; None: detect the format.

        Raises:
            Invalid: it is not a disk, not of the claimed format, refers to a backing or data file, or its SHA-256
                differs.
            StoreFull: no space left.
        """
        ...

    async def bring_kernel(self, image_id: str, name: str, kernel: Path, initrd: Path | None, cmdline: str) -> Image:
        """Copy a kernel and its initrd into the folder. Raises as `bring_disk`."""
        ...

    async def build_small(self, image_id: str, name: str, form: SmallForm = "kernel") -> Image:
        """Build the small guest from the distribution's packages, as an image of the kind `form`.

        Raises:
            Unavailable: a package that it is built from is not installed; the remedy names it.
        """
        ...

    def draft_path(self, image_id: str) -> Path:
        """Return the path for an export of a disk, to be imported with `adopt_export`; its folder exists."""
        ...

    async def adopt_export(self, image_id: str, name: str) -> Image:
        """Inspect the file at the image's `draft_path`, and make it an image, durable when this returns. Idempotent.

        Raises:
            Invalid: it is not a usable disk image, or the file does not exist.
            StoreFull, StoreError: it could not be written.
        """
        ...

    async def discard(self, image_id: str) -> None:
        """Remove a draft and its image; does nothing if there is neither."""
        ...

    async def holds(self, image: Image) -> bool:
        """Whether the files of the image exist."""
        ...

    async def ids(self) -> frozenset[str]:
        """Return the ids of all images and drafts with a file."""
        ...

    async def remove(self, image: Image) -> None:
        """Remove the files of an image that no instance uses. Idempotent."""
        ...


class ImageDownloads(Protocol):
    """Downloads of image files over HTTP."""

    def check(self, url: str, field: str) -> None:
        """Raise `Invalid` unless the server may download from `url`; `field` names the input in the error."""
        ...

    async def fetch(self, url: str, report: Callable[[int, int | None], None]) -> Path:
        """Download the file at `url`, resuming an earlier attempt, and return its path.

        `report` is called with the bytes received and the total, if known.

        Raises:
            Invalid: the URL is invalid, the file is not found, or it is too large.
            Unavailable: the server is unreachable or timed out.
            StoreFull, StoreError: it could not be written.
        """
        ...

    async def checksum(self, url: str, of: str) -> tuple[str, str]:
        """Return algorithm and digest that the checksum file at `url` has for the file at the URL `of`.

        Raises:
            Invalid: the checksum file is not found, has no entry for that file, or uses a weak algorithm.
            Unavailable: the server is unreachable.
        """
        ...

    def discard(self, url: str) -> None:
        """Remove a partial or complete download. Idempotent."""
        ...


class VolumeFiles(Protocol):
    """The server's volume folder."""

    async def make(self, volume_id: str, size_bytes: int) -> Path:
        """Create an empty disk, durable when this returns. Raises `StoreFull`, `Unavailable`."""
        ...

    async def remove(self, volume_id: str) -> None:
        """Remove a volume's file. Idempotent."""
        ...


class SharedRoots(Protocol):
    """The folder for root disks that this server's hosts share, if there is one."""

    @property
    def path(self) -> Path | None:
        """Its configured path; None if each host keeps root disks on its own disk."""
        ...

    async def folder(self) -> SharedFolder | None:
        """Return it for a new instance; None if none is configured.

        Raises:
            Unavailable: it does not exist, or another folder is mounted in its place.
            InsufficientCapacity: its file system is almost full.
        """
        ...


class Dump(msgspec.Struct, frozen=True, kw_only=True):
    """A dump of a guest's memory."""

    id: str
    """The id of the request that created it."""
    path: Path
    size_bytes: int
    made_at_ms: int


class DumpFiles(Protocol):
    """The server's folder of memory dumps. Only the server may read them: they contain the guests' secrets."""

    def dump_path(self, instance_id: str, request_id: str) -> Path:
        """Return the path for that request's dump; its folder exists. Raises `StoreFull`, `StoreError`."""
        ...

    async def dumps(self, instance_id: str) -> tuple[Dump, ...]:
        """Return the instance's complete dumps, oldest first."""
        ...

    async def remove(self, instance_id: str) -> None:
        """Remove all dumps of the instance. Idempotent. Raises `StoreError`."""
        ...

    async def discard(self, dump: Dump) -> None:
        """Remove one dump. Idempotent. Raises `StoreError`."""
        ...
