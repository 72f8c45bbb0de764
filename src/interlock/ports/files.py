"""The folders of files beside the store: images, volumes, dumps, and the one that hosts share."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import msgspec

from interlock.core.records import Image, SharedFolder

SmallForm = Literal["kernel", "disk"]
"""How the small guest is to be booted: its kernel directly, beside an empty root disk, or from a disk of its own."""


class ImageFiles(Protocol):
    """The server's image folder. Nothing enters it that was not inspected."""

    async def bring_disk(self, image_id: str, name: str, source: Path, sha256: str | None = None) -> Image:
        """Inspect the disk image at `source` and take a copy into the folder (durable when this returns).

        Raises:
            Invalid: it is not what it claims, names a backing or data file, or its SHA-256 is not the one given.
            StoreFull: there is no room.
        """
        ...

    async def bring_kernel(self, image_id: str, name: str, kernel: Path, initrd: Path | None, cmdline: str) -> Image:
        """Take a copy of a kernel and its initial file system. Raises as `bring_disk`."""
        ...

    async def build_small(self, image_id: str, name: str, form: SmallForm = "kernel") -> Image:
        """Build the small guest from the distribution's own packages, as an image of the kind that `form` names.

        Raises:
            Unavailable: something that it is built from is not installed; the remedy names it.
        """
        ...

    def draft_path(self, image_id: str) -> Path:
        """Where an export of a disk is to be written that `adopt_export` takes; the folder is there."""
        ...

    async def adopt_export(self, image_id: str, name: str) -> Image:
        """Inspect what was written to the image's `draft_path`, and make it an image, durable when this returns.

        Called again it gives the same image, whether or not the draft is still there.

        Raises:
            Invalid: it is no disk image that may be used, or nothing was written.
            StoreFull, StoreError: it could not be kept.
        """
        ...

    async def discard(self, image_id: str) -> None:
        """Remove a draft, and what was adopted of it; does nothing where there is neither."""
        ...

    async def holds(self, image: Image) -> bool:
        """Whether the files of the image are there."""
        ...

    async def ids(self) -> frozenset[str]:
        """The ids of all images and drafts of which a file is there."""
        ...

    async def remove(self, image: Image) -> None:
        """Remove the files of an image that no instance uses; does nothing where they are gone already."""
        ...


class VolumeFiles(Protocol):
    """The server's volume folder."""

    async def make(self, volume_id: str, size_bytes: int) -> Path:
        """Make an empty disk, durable when this returns. Raises `StoreFull`, `Unavailable`."""
        ...

    async def remove(self, volume_id: str) -> None:
        """Remove a volume's file; does nothing where it is gone already."""
        ...


class SharedRoots(Protocol):
    """The folder in which this server's hosts keep root disks together, if there is one."""

    @property
    def path(self) -> Path | None:
        """Where it is, or is to be; None where each host keeps root disks on a disk of its own."""
        ...

    async def folder(self) -> SharedFolder | None:
        """It, for a new instance; None where there is none.

        Raises:
            Unavailable: it is not there, or another one is in its place.
            NoRoom: its file system is as good as full.
        """
        ...


class Dump(msgspec.Struct, frozen=True, kw_only=True):
    """A dump of a guest's memory."""

    id: str
    """That of the request that made it."""
    path: Path
    size_bytes: int
    made_at_ms: int


class DumpFiles(Protocol):
    """The server's folder of dumps. Nobody but the server may read them: they hold what the guests know."""

    def dump_path(self, instance_id: str, request_id: str) -> Path:
        """Where that request's dump is to be written; the folder is there. Raises `StoreFull`, `StoreError`."""
        ...

    async def dumps(self, instance_id: str) -> tuple[Dump, ...]:
        """The instance's dumps that are whole, oldest first."""
        ...

    async def remove(self, instance_id: str) -> None:
        """Remove all dumps of the instance; does nothing where there are none. Raises `StoreError`."""
        ...

    async def discard(self, dump: Dump) -> None:
        """Remove one dump; does nothing where it is gone already. Raises `StoreError`."""
        ...
