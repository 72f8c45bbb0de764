"""The server's image folder: what instances boot. Nothing enters it that was not inspected while it was copied.

An image's files are named after its id and never change: disks of instances are built on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from interlock.core.errors import Invalid
from interlock.core.records import Image
from interlock.hypervisors import disk_inspection, image_conversion, kernel_payload, small_guest
from interlock.hypervisors.durable_files import (
    FETCHED,
    HalfMade,
    checked_id,
    chunks,
    make_folder,
    opened_source,
    remove_half_made,
    remove_unknown,
    sync_file,
    sync_folder,
    telling_of_full_disk,
)
from interlock.hypervisors.image_tool import Abandoned, ImageTool
from interlock.ports import SmallForm

NAME_LENGTH_MAX = 63
CMDLINE_LENGTH_MAX = 2000
"""What fits beside what a hypervisor adds; Linux reads 2,047 characters on x86."""
KERNEL_BYTES_MAX = 256 << 20
INITRD_BYTES_MAX = 1 << 30

_MODE = 0o644
_BLOCK_BYTES = 512
"""In which the operating system counts the room that a file takes."""
_DRAFT = ".export"
_SUFFIXES = frozenset({".raw", ".qcow2", ".iso", ".kernel", ".initrd", _DRAFT, FETCHED})
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_LENGTH_MAX - 1}}}")
_CMDLINE = re.compile(rf"[\x20-\x7e]{{0,{CMDLINE_LENGTH_MAX}}}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_INITRD_MAGICS = (
    *(b"070701", b"070702", b"\x1f\x8b", b"\xfd7zXZ\0", b"\x5d\x00\x00", b"BZh"),
    *(b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18", b"\x04\x22\x4d\x18", b"\x89LZO"),
)
"""How a cpio archive begins, and the compressions of one that Linux unpacks."""


class ImageFolder:
    """Implements `ports.ImageFiles` on one folder, which belongs to one server.

    `cache` is where packages for the small guest, and what was built of them, are kept between builds; `tool` is with
    what images are converted.
    """

    def __init__(self, folder: Path, *, cache: Path, tool: ImageTool | None = None) -> None:
        self._folder = folder
        self._cache = cache
        self._tool = tool or ImageTool()
        self._prepared = False
        self._building = asyncio.Lock()

    def prepare(self) -> None:
        """Make the folder, and remove what a crash left half-made. The first use does it where nobody has."""
        if not self._prepared:
            make_folder(self._folder)
            remove_half_made(self._folder)
            self._prepared = True

    def sweep(self, known: Collection[str]) -> tuple[str, ...]:
        """Remove the files of every image whose id is not in `known`; the names of those files.

        They are what a crash leaves between keeping an image's files and keeping its record. To be called at the
        start, with every id that the store has, before anything is brought.
        """
        self.prepare()
        return remove_unknown(self._folder, known, _SUFFIXES)

    async def bring_disk(self, image_id: str, name: str, source: Path, sha256: str | None = None) -> Image:
        _check_names(image_id, name)
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise Invalid("A SHA-256 is written as 64 hexadecimal digits.")
        self.prepare()
        abandoned = threading.Event()
        bringing = asyncio.create_task(
            asyncio.to_thread(self._bring_disk, image_id, name, source, sha256, abandoned.is_set)
        )
        try:
            return await asyncio.shield(bringing)
        except asyncio.CancelledError:
            abandoned.set()
            # The thread ends soon, and until it has there are files of it.
            with contextlib.suppress(Exception):
                await self.remove(await bringing)
            raise

    async def bring_kernel(self, image_id: str, name: str, kernel: Path, initrd: Path | None, cmdline: str) -> Image:
        _check_names(image_id, name)
        if not _CMDLINE.fullmatch(cmdline):
            raise Invalid(
                f"A kernel's command line is at most {CMDLINE_LENGTH_MAX} printable ASCII characters in one line."
            )
        self.prepare()
        return await asyncio.to_thread(self._bring_kernel, image_id, name, kernel, initrd, cmdline)

    async def build_small(self, image_id: str, name: str, form: SmallForm = "kernel") -> Image:
        _check_names(image_id, name)
        async with self._building:
            guest = await asyncio.to_thread(small_guest.build, self._cache)
        if form == "disk":
            return await self.bring_disk(image_id, name, guest.disk)
        return await self.bring_kernel(image_id, name, guest.kernel, guest.initrd, guest.cmdline)

    def draft_path(self, image_id: str) -> Path:
        self.prepare()
        return self._folder / f"{checked_id(image_id)}{_DRAFT}"

    async def adopt_export(self, image_id: str, name: str) -> Image:
        _check_names(image_id, name)
        self.prepare()
        return await asyncio.to_thread(self._adopt_export, image_id, name)

    async def discard(self, image_id: str) -> None:
        await asyncio.to_thread(self._remove, checked_id(image_id))

    async def ids(self) -> frozenset[str]:
        self.prepare()
        found = await asyncio.to_thread(lambda: list(self._folder.iterdir()))
        return frozenset(path.stem for path in found if path.suffix in _SUFFIXES)

    async def holds(self, image: Image) -> bool:
        paths = [Path(path) for path in (image.path, image.initrd) if path is not None]
        return await asyncio.to_thread(lambda: all(path.is_file() for path in paths))

    async def remove(self, image: Image) -> None:
        await self.discard(image.id)

    def _bring_disk(
        self, image_id: str, name: str, source: Path, sha256: str | None, abandoned: Callable[[], bool]
    ) -> Image:
        inspection = disk_inspection.Inspection(source)
        digest = hashlib.sha256()
        with opened_source(source) as (content, size), HalfMade(self._folder, mode=_MODE) as copy:
            for chunk in chunks(content, size, source):
                if abandoned():
                    raise Abandoned
                inspection.feed(chunk)
                digest.update(chunk)
                copy.append(chunk)
            verdict = inspection.verdict()
            if sha256 is not None and digest.hexdigest() != sha256.lower():
                raise Invalid(
                    f"{source.name}: its SHA-256 is {digest.hexdigest()}, not {sha256.lower()}.",
                    remedy="Fetch the image again, and the sum from where its makers publish it.",
                )
            if verdict.footer_bytes:
                copy.shorten(verdict.footer_bytes)
                kept, found = copy.keep(f"{image_id}.raw"), msgspec.structs.replace(verdict, format="raw")
            else:
                disk_inspection.check_headers(copy.path, source, verdict)
                kept, found = self._keep_usable(image_id, copy, source, verdict, abandoned)
        is_iso = found.format == "iso"
        return Image(
            id=image_id,
            name=name,
            kind="iso" if is_iso else "disk",
            format="raw" if is_iso else found.format,
            path=str(kept),
            size_bytes=found.size_bytes,
            stored_bytes=_room(kept),
            sha256=digest.hexdigest(),
            converted_from=None if found.format == verdict.format else verdict.format,
        )

    def _keep_usable(
        self,
        image_id: str,
        copy: HalfMade,
        source: Path,
        verdict: disk_inspection.Verdict,
        abandoned: Callable[[], bool],
    ) -> tuple[Path, disk_inspection.Verdict]:
        """Keep an image that has passed as it is, or what it was converted to; where, and what is kept."""
        if not image_conversion.needs_conversion(verdict.format):
            disk_inspection.second_opinion(copy.path, source, verdict, self._tool)
            disk_inspection.refuse_damaged(copy.path, source, verdict, self._tool, abandoned)
            return copy.keep(f"{image_id}.{verdict.format}"), verdict
        with HalfMade(self._folder, mode=_MODE) as made:
            image_conversion.convert(self._tool, copy.path, made.path, source, verdict.format, abandoned)
            disk_inspection.refuse_damaged(copy.path, source, verdict, self._tool, abandoned)
            # It is made by a program that read what a stranger wrote: it is judged like a stranger's.
            inspection = disk_inspection.Inspection(made.path)
            with opened_source(made.path) as (content, size):
                for chunk in chunks(content, size, made.path):
                    inspection.feed(chunk)
            found = inspection.verdict()
            if found.format != "qcow2":
                raise Invalid(f"{source.name}: what it was converted to is no qcow2 image.")
            disk_inspection.check_headers(made.path, source, found)
            made.take_back()
            return made.keep(f"{image_id}.qcow2"), found

    def _adopt_export(self, image_id: str, name: str) -> Image:
        """Judge the export as if it were a stranger's: what wrote it had a guest inside."""
        draft, kept = self.draft_path(image_id), self._folder / f"{image_id}.qcow2"
        source = draft if draft.exists() else kept
        inspection = disk_inspection.Inspection(source)
        digest = hashlib.sha256()
        with opened_source(source) as (content, size):
            for chunk in chunks(content, size, source):
                inspection.feed(chunk)
                digest.update(chunk)
        verdict = inspection.verdict()
        if verdict.format != "qcow2":
            raise Invalid(f"{source.name}: the export is no qcow2 image.")
        disk_inspection.check_headers(source, source, verdict)
        disk_inspection.second_opinion(source, source, verdict, self._tool)
        if source is draft:
            with telling_of_full_disk(self._folder):
                draft.chmod(_MODE)
                sync_file(draft)
                draft.rename(kept)
                sync_folder(self._folder)
        return Image(
            id=image_id,
            name=name,
            kind="disk",
            format="qcow2",
            path=str(kept),
            size_bytes=verdict.size_bytes,
            stored_bytes=_room(kept),
            sha256=digest.hexdigest(),
        )

    def _bring_kernel(self, image_id: str, name: str, kernel: Path, initrd: Path | None, cmdline: str) -> Image:
        kept_initrd, initrd_size = None, 0
        if initrd is not None:
            kept_initrd, initrd_size, _ = self._copy(
                initrd, f"{image_id}.initrd", INITRD_BYTES_MAX, _is_initrd, "an initial file system for Linux"
            )
        try:
            kept, size, digest = self._copy(
                kernel, f"{image_id}.kernel", KERNEL_BYTES_MAX, kernel_payload.is_kernel, "a kernel that QEMU can boot"
            )
        except BaseException:
            if kept_initrd is not None:
                kept_initrd.unlink(missing_ok=True)
            raise
        return Image(
            id=image_id,
            name=name,
            kind="kernel",
            path=str(kept),
            initrd=str(kept_initrd) if kept_initrd else None,
            cmdline=cmdline,
            size_bytes=size + initrd_size,
            stored_bytes=size + initrd_size,
            sha256=digest,
        )

    def _copy(
        self, source: Path, name: str, bytes_max: int, accepts: Callable[[bytes], bool], what: str
    ) -> tuple[Path, int, str]:
        """Copy a file whose first bytes are accepted: where it is kept, its size, its SHA-256."""
        digest = hashlib.sha256()
        with opened_source(source) as (content, size), HalfMade(self._folder, mode=_MODE) as copy:
            if size > bytes_max:
                raise Invalid(f"{source.name}: {size} bytes are too many for {what}; the limit is {bytes_max}.")
            for index, chunk in enumerate(chunks(content, size, source)):
                if index == 0 and not accepts(chunk):
                    raise Invalid(f"{source.name}: this is not {what}.")
                digest.update(chunk)
                copy.append(chunk)
            return copy.keep(name), size, digest.hexdigest()

    def _remove(self, image_id: str) -> None:
        with telling_of_full_disk(self._folder):
            for suffix in sorted(_SUFFIXES):
                (self._folder / f"{image_id}{suffix}").unlink(missing_ok=True)
            if self._folder.is_dir():
                sync_folder(self._folder)


def _room(path: Path) -> int:
    return path.stat().st_blocks * _BLOCK_BYTES


def _check_names(image_id: str, name: str) -> None:
    checked_id(image_id)
    if not _NAME.fullmatch(name):
        raise Invalid(
            f"The image's name {name[:80]!r} is not 1 to {NAME_LENGTH_MAX} letters, digits, `.`, `_` and `-`, "
            "beginning with a letter or digit."
        )


def _is_initrd(head: bytes) -> bool:
    return head.startswith(_INITRD_MAGICS)
