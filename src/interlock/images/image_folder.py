"""The server's folder of images. Every image is inspected while it is copied into the folder.

An image's files are named after its id and never change, because root disks use them as backing files.
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

from interlock.core.errors import Invalid, Unavailable
from interlock.core.records import Image
from interlock.images import inspection as disk_inspection
from interlock.images import kernel_payload, qemu_img
from interlock.images import source as image_source
from interlock.images.atomic_files import (
    FETCHED,
    DraftFile,
    checked_id,
    chunks,
    disk_errors_raised,
    make_folder,
    opened_source,
    remove_drafts,
    remove_unknown,
    sync_file,
    sync_folder,
)
from interlock.images.decompression import Limits
from interlock.images.qemu_img import Abandoned, ImageTool
from interlock.ports import SmallForm

NAME_LENGTH_MAX = 63
CMDLINE_LENGTH_MAX = 2000
"""Leaves space for what a hypervisor adds; Linux reads 2,047 characters on x86."""
KERNEL_BYTES_MAX = 256 << 20
INITRD_BYTES_MAX = 1 << 30

_KERNEL_NEEDS_MIB = 24
_KERNEL_UNPACKS_TO = 6
_INITRD_TAKES = 4
"""Estimates: Linux is six times as large as its bzImage; an initrd is in memory compressed and decompressed (3:1)."""
_PACKED_KERNEL = b"HdrS"
_PACKED_KERNEL_AT = 514

_MODE = 0o640
_BLOCK_BYTES = 512
"""Unit of `st_blocks`."""
_DRAFT = ".export"
_SUFFIXES = frozenset({".raw", ".qcow2", ".iso", ".kernel", ".initrd", _DRAFT, FETCHED})
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_LENGTH_MAX - 1}}}")
_CMDLINE = re.compile(rf"[\x20-\x7e]{{0,{CMDLINE_LENGTH_MAX}}}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_INITRD_MAGICS = (
    *(b"070701", b"070702", b"\x1f\x8b", b"\xfd7zXZ\0", b"\x5d\x00\x00", b"BZh"),
    *(b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18", b"\x04\x22\x4d\x18", b"\x89LZO"),
)
"""Signatures of cpio archives, plain or compressed in a format that Linux supports."""


class GuestFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The files of the small guest, in the build cache."""

    kernel: Path
    initrd: Path
    disk: Path
    """A raw disk that boots the same guest."""
    cmdline: str
    memory_mib_min: int


class ImageFolder:
    """Implements `ports.ImageFiles`.

    `small_guest` returns the files of the small guest, and may block for seconds. `tool` converts images.
    """

    def __init__(
        self, folder: Path, *, small_guest: Callable[[], GuestFiles] | None = None, tool: ImageTool | None = None
    ) -> None:
        self._folder = folder
        self._small_guest = small_guest
        self._tool = tool or ImageTool()
        self._limits = Limits(bytes_max=self._tool.bytes_max, timeout_ms=self._tool.timeout_ms)
        self._prepared = False
        self._building = asyncio.Lock()

    def prepare(self) -> None:
        """Create the folder and delete temporary files of a crash. Called on first use."""
        if not self._prepared:
            make_folder(self._folder)
            remove_drafts(self._folder)
            self._prepared = True

    def sweep(self, known: Collection[str]) -> tuple[str, ...]:
        """Delete the files of unknown images; return their names.

        A crash leaves such files between writing them and their record. Call it at the start with all ids of the store.
        """
        self.prepare()
        return remove_unknown(self._folder, known, _SUFFIXES)

    async def bring_disk(
        self, image_id: str, name: str, source: Path, sha256: str | None = None, *, claimed: str | None = None
    ) -> Image:
        _check_names(image_id, name)
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise Invalid("A SHA-256 is written as 64 hexadecimal digits.")
        self.prepare()
        abandoned = threading.Event()
        task = asyncio.create_task(
            asyncio.to_thread(self._bring_disk, image_id, name, source, sha256, claimed, abandoned.is_set)
        )
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            abandoned.set()
            # Wait for the thread, which ends soon, and delete its files.
            with contextlib.suppress(Exception):
                await self.remove(await task)
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
        if self._small_guest is None:
            raise Unavailable("The small guest cannot be built here.", remedy="Add an image: `interlock image add`.")
        async with self._building:
            guest = await asyncio.to_thread(self._small_guest)
        if form == "disk":
            image = await self.bring_disk(image_id, name, guest.disk)
        else:
            image = await self.bring_kernel(image_id, name, guest.kernel, guest.initrd, guest.cmdline)
        return msgspec.structs.replace(image, min_memory_mib=guest.memory_mib_min)

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
        self,
        image_id: str,
        name: str,
        source: Path,
        sha256: str | None,
        claimed: str | None,
        abandoned: Callable[[], bool],
    ) -> Image:
        digest = hashlib.sha256()
        with opened_source(source) as (content, size), DraftFile(self._folder, mode=_MODE) as copy:
            given = image_source.Given(content, size, source, digest.update)
            inspection = disk_inspection.Inspection(source, claimed=claimed, packed=given.packed)
            for chunk in given.chunks(self._limits):
                if abandoned():
                    raise Abandoned
                inspection.feed(chunk)
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
                copy.append(bytes(verdict.padding_bytes))
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
            converted_from=given.described(verdict.format, found.format),
        )

    def _keep_usable(
        self,
        image_id: str,
        copy: DraftFile,
        source: Path,
        verdict: disk_inspection.Verdict,
        abandoned: Callable[[], bool],
    ) -> tuple[Path, disk_inspection.Verdict]:
        """Keep an inspected image, converted if needed; return its path and the verdict on it."""
        if not qemu_img.needs_conversion(verdict.format):
            disk_inspection.check_with_qemu(copy.path, source, verdict, self._tool)
            disk_inspection.require_undamaged(copy.path, source, verdict, self._tool, abandoned)
            return copy.keep(f"{image_id}.{verdict.format}"), verdict
        with DraftFile(self._folder, mode=_MODE) as made:
            qemu_img.convert(self._tool, copy.path, made.path, source, verdict.format, abandoned)
            disk_inspection.require_undamaged(copy.path, source, verdict, self._tool, abandoned)
            # The converter read untrusted input, so its output is untrusted too.
            inspection = disk_inspection.Inspection(made.path)
            with opened_source(made.path) as (content, size):
                for chunk in chunks(content, size, made.path):
                    inspection.feed(chunk)
            found = inspection.verdict()
            if found.format != "qcow2":
                raise Invalid(f"{source.name}: the converted image is not a qcow2 image.")
            disk_inspection.check_headers(made.path, source, found)
            return made.keep(f"{image_id}.qcow2"), found

    def _adopt_export(self, image_id: str, name: str) -> Image:
        """Inspect and keep an export. It is untrusted: the process that wrote it ran a guest."""
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
            raise Invalid(f"{source.name}: the export is not a qcow2 image.")
        disk_inspection.check_headers(source, source, verdict)
        disk_inspection.check_with_qemu(source, source, verdict, self._tool)
        if source is draft:
            with disk_errors_raised(self._folder):
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
            min_memory_mib=_least_memory_mib(kept, size, initrd_size),
        )

    def _copy(
        self, source: Path, name: str, bytes_max: int, accepts: Callable[[bytes], bool], what: str
    ) -> tuple[Path, int, str]:
        """Copy a file if its first bytes are accepted; return path, size and SHA-256."""
        digest = hashlib.sha256()
        with opened_source(source) as (content, size), DraftFile(self._folder, mode=_MODE) as copy:
            if size > bytes_max:
                raise Invalid(f"{source.name}: {size} bytes are too many for {what}; the limit is {bytes_max}.")
            for index, chunk in enumerate(chunks(content, size, source)):
                if index == 0 and not accepts(chunk):
                    raise Invalid(f"{source.name}: this is not {what}.")
                digest.update(chunk)
                copy.append(chunk)
            return copy.keep(name), size, digest.hexdigest()

    def _remove(self, image_id: str) -> None:
        with disk_errors_raised(self._folder):
            for suffix in sorted(_SUFFIXES):
                (self._folder / f"{image_id}{suffix}").unlink(missing_ok=True)
            if self._folder.is_dir():
                sync_folder(self._folder)


def _least_memory_mib(kernel: Path, kernel_bytes: int, initrd_bytes: int) -> int:
    """Estimate the minimum memory to boot a kernel with its initrd, in MiB."""
    with kernel.open("rb") as file:
        packed = file.read(_PACKED_KERNEL_AT + 4).endswith(_PACKED_KERNEL)
    needed = kernel_bytes * (_KERNEL_UNPACKS_TO if packed else 1) + initrd_bytes * _INITRD_TAKES
    return _KERNEL_NEEDS_MIB + (needed >> 20)


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
