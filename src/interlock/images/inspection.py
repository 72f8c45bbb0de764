"""Inspection of a disk image before anything opens it: its format, what it claims to be, and whether it is safe.

The bytes that are being copied pass through OpenStack's format inspector (oslo.utils). Only an image that passes is
opened by qemu-img, in a sandbox, for a second check.

An unknown format is a raw disk only if that is plausible: firmware would try to boot it, or the caller declares it raw.
`file_signatures` detects other files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from interlock.core.errors import Invalid, NotResponding
from interlock.images import disk_headers, file_signatures
from interlock.images.disk_headers import DISK_BYTES_MAX, SECTOR_BYTES
from interlock.images.qemu_img import ImageTool

if TYPE_CHECKING:
    from oslo_utils.imageutils import format_inspector

_QCOW2_MAGIC = b"QFI\xfb"
_CLAIMS = {
    ".raw": "raw",
    ".qcow2": "qcow2",
    ".qed": "qed",
    ".vdi": "vdi",
    ".vhd": "vhd",
    ".vhdx": "vhdx",
    ".vmdk": "vmdk",
    ".iso": "iso",
    ".luks": "luks",
}
"""The format by a file's suffix. `.img` is used for several formats."""
_RAW = frozenset({"raw", "gpt"})
"""The inspector's names for raw disks: without and with a partition table."""
_USABLE = _RAW | {"qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso"}
_CHECKED = {"qcow2": "qcow2", "vmdk": "vmdk", "vhdx": "vhdx", "vdi": "vdi"}
"""The formats that `qemu-img check` supports, with its names for them."""
_SOUND = frozenset({0, 3})
"""Exit statuses of `qemu-img check`: no errors, or leaked clusters only."""
_DANGERS = {
    "descriptor": "its content is, at least in part, in other files, or its type is not supported",
    "footer": "its header and footer differ",
}
_CONVERSIONS = {
    "qed": "Convert it: `qemu-img convert -f qed -O qcow2 FILE NEW.qcow2`.",
    "luks": "Decrypt it: `qemu-img convert --object secret,id=key,file=PASSPHRASE_FILE --image-opts "
    "driver=luks,key-secret=key,file.filename=FILE -O qcow2 NEW.qcow2`.",
}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an inspection that passed."""

    format: str
    """`raw`, `qcow2`, `vmdk`, `vhd`, `vhdx`, `vdi` or `iso`."""
    size_bytes: int
    """Virtual size in bytes, as the header says."""
    footer_bytes: int = 0
    """Size of a footer after the disk."""
    padding_bytes: int = 0
    """Zero bytes that are missing at the end for a whole number of sectors."""


class Inspection:
    """The inspection of one image, which gets its bytes in order.

    `claimed` is the format that the caller declares: `raw`, or None. `packed`: the bytes come out of another file,
    whose suffix is not their format.
    """

    def __init__(self, path: Path, *, claimed: str | None = None, packed: bool = False) -> None:
        self._path = path
        self._name = path.name  # messages do not show the folder
        self._claimed = claimed
        self._packed = packed
        self._head = bytearray()
        self._tail = b""
        self._length = 0
        self._looked = False
        # The wrapper reads from a source: this object, by `read`.
        self._pending = b""
        # The import takes a tenth of a second, and is not needed at server start.
        from oslo_utils.imageutils.format_inspector import InspectWrapper

        self._wrapper = InspectWrapper(self)  # type: ignore[arg-type]

    def read(self, _size: int) -> bytes:
        """Return the bytes just fed, for the inspector."""
        return self._pending

    def feed(self, chunk: bytes) -> None:
        """Inspect the next bytes. Raises `Invalid` as soon as the image is certain to fail."""
        self._length += len(chunk)
        self._head += chunk[: file_signatures.HEAD_BYTES - len(self._head)]
        self._tail = (self._tail + chunk[-SECTOR_BYTES:])[-SECTOR_BYTES:]
        self._pending = chunk
        self._wrapper.read(len(chunk))
        if not self._looked and len(self._head) == file_signatures.HEAD_BYTES:
            # Most formats are known by the header: a large image of an unsupported one is not read to its end.
            self._looked = True
            formats = self._formats()
            self._require_supported(formats)
            if formats and {found.NAME for found in formats} <= _RAW:
                self._reject(file_signatures.certainly_foreign(bytes(self._head), b""))

    def verdict(self) -> Verdict:
        """Return the result after the last byte. Raises `Invalid` with what is wrong."""
        try:
            self._wrapper.close()
        except Exception as error:
            raise self._unreadable(error) from error
        formats = self._formats()
        self._require_supported(formats)
        name, found = self._one(formats)
        if name == "raw":
            return self._raw()
        if name == "vmdk":
            self._reject(file_signatures.certainly_foreign(bytes(self._head), b""))
        if self._claimed is not None:
            raise Invalid(
                f"{self._name}: this is a {name} image, and not {self._claimed}.",
                remedy="Leave the format out; it is detected.",
            )
        self._reject_mismatch(name)
        if name == "iso":
            if found.virtual_size > self._length:
                raise Invalid(f"{self._name}: the image is truncated.")
            return Verdict(format=name, size_bytes=self._possible(self._length))
        if name == "qcow2":
            disk_headers.check_qcow2_features(bytes(self._head), self._name)
        else:
            self._reject_dangers(found)
        return Verdict(format=name, size_bytes=self._possible(found.virtual_size))

    def _raw(self) -> Verdict:
        footer = SECTOR_BYTES if disk_headers.is_fixed_vhd(self._tail, self._length) else 0
        if not footer:
            self._reject(file_signatures.certainly_foreign(bytes(self._head), self._tail))
            self._reject_mismatch("raw")
            self._require_plausible()
        self._reject_truncated(self._length - footer)
        padding = -self._length % SECTOR_BYTES
        size = self._possible(self._length - footer + padding)
        return Verdict(format="vhd" if footer else "raw", size_bytes=size, footer_bytes=footer, padding_bytes=padding)

    def _possible(self, size: int) -> int:
        """Return a valid disk size. Raises `Invalid`."""
        if not SECTOR_BYTES <= size <= DISK_BYTES_MAX or size % SECTOR_BYTES:
            raise Invalid(
                f"{self._name}: invalid disk size {size} bytes: expected whole sectors of {SECTOR_BYTES} "
                f"bytes, and no more than {DISK_BYTES_MAX >> 40} TiB."
            )
        return size

    def _one(self, formats: list[format_inspector.FileInspector]) -> tuple[str, format_inspector.FileInspector]:
        """Return the format. An ISO may have a partition table too, so that it boots from a USB stick."""
        by_name = {found.NAME: found for found in formats}
        found = by_name["iso"] if "iso" in by_name else formats[0]
        return ("raw" if found.NAME in _RAW else found.NAME), found

    def _formats(self) -> list[format_inspector.FileInspector]:
        try:
            return self._wrapper.formats or []
        except Exception as error:
            # The inspector reads untrusted bytes: any error is a reason to reject them.
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> Invalid:
        return Invalid(f"{self._name}: the image is invalid ({str(error) or type(error).__name__}).")

    def _require_supported(self, formats: list[format_inspector.FileInspector]) -> None:
        names = {found.NAME for found in formats}
        if len(names) > 1 and not names <= _RAW | {"iso"}:
            raise Invalid(f"{self._name}: the image is ambiguous: it can be read as {' and as '.join(sorted(names))}.")
        for name in sorted(names - _USABLE):
            raise Invalid(
                f"{self._name}: this is a {name} image; supported are raw, qcow2, vmdk, vhd, vhdx, vdi and iso.",
                remedy=_CONVERSIONS.get(name),
            )

    def _reject_mismatch(self, name: str) -> None:
        if name == "raw" and self._head.startswith(_QCOW2_MAGIC):
            raise Invalid(f"{self._name}: the image begins as qcow2 and is truncated.")
        claimed = name if self._packed else _CLAIMS.get(self._path.suffix.lower(), name)
        if claimed != name:
            raise Invalid(
                f"{self._name}: the file is named {self._path.suffix} and contains a {name} image.",
                remedy="Check that it is the right file and complete, then rename it.",
            )

    def _require_plausible(self) -> None:
        """Reject what firmware would not try to boot, unless the caller declares it a raw disk."""
        head = bytes(self._head)
        if self._claimed == "raw" or file_signatures.has_boot_sector(head):
            return
        self._reject(file_signatures.probably_foreign(head))
        raise Invalid(
            f"{self._name}: this is no known disk image format, and no bootable raw disk: it has no boot sector.",
            remedy="Check that it is the right file and complete. To use it as a raw disk all the same, add "
            "`--format raw`.",
        )

    def _reject(self, foreign: file_signatures.Foreign | None) -> None:
        if foreign is not None:
            raise Invalid(f"{self._name}: this is {foreign.name}, and no disk image.", remedy=foreign.remedy)

    def _reject_truncated(self, length: int) -> None:
        end = disk_headers.end_of(bytes(self._head))
        if end is None or end.at <= length or (self._claimed == "raw" and not end.certain):
            return
        what = "the disk" if end.certain else "its last partition"
        raise Invalid(
            f"{self._name}: the disk is truncated: by its {end.table} {what} ends at byte {end.at}, and the file at "
            f"{length}; {end.at - length} bytes are missing.",
            remedy="Fetch it again, and give its SHA-256."
            + ("" if end.certain else " If this is intended, add `--format raw`."),
        )

    def _reject_dangers(self, found: format_inspector.FileInspector) -> None:
        from oslo_utils.imageutils.format_inspector import SafetyCheckFailed

        try:
            found.safety_check()
        except SafetyCheckFailed as error:
            reasons = [_DANGERS.get(name, str(failure)) for name, failure in sorted(error.failures.items())]
            raise Invalid(f"{self._name}: the image is rejected: {'; '.join(reasons)}.") from error
        except Exception as error:
            raise self._unreadable(error) from error


def check_headers(path: Path, named: Path, verdict: Verdict) -> None:
    """Check the headers of an image that has passed, from the complete file at `path`. Raises `Invalid`."""
    disk_headers.check(path, named, verdict.format)


def require_undamaged(
    path: Path, named: Path, verdict: Verdict, tool: ImageTool, abandoned: Callable[[], bool]
) -> None:
    """Check the metadata of an image with `qemu-img check`: in a truncated one, pointers lead beyond its end.

    Not for raw, ISO and VHD, which it cannot check. `path` and `named` are as for `check_with_qemu`.

    Raises:
        Invalid: the image is damaged, or the check timed out.
        Abandoned: `abandoned` returned true.
    """
    driver = _CHECKED.get(verdict.format)
    if driver is None or not tool.usable:
        return
    try:
        ended = tool.run(["check", "-q", "-f", driver, f"./{path.name}"], tool.timeout_ms, abandoned, reads=path)
    except NotResponding as error:
        raise Invalid(f"{named.name}: qemu-img timed out while checking the image.") from error
    if ended.status not in _SOUND:
        raise Invalid(
            f"{named.name}: the image is damaged or truncated.",
            remedy="Fetch it again, and give its SHA-256; `qemu-img check FILE` says what is wrong with it.",
        )


def check_with_qemu(path: Path, named: Path, verdict: Verdict, tool: ImageTool) -> None:
    """Open a qcow2 image that has passed with `qemu-img info`, if that is installed, and compare the results.

    `path` is the copy, and `named` the caller's path, for messages.

    Raises:
        Invalid: QEMU cannot open it, it is encrypted, or the results differ.
    """
    if verdict.format != "qcow2" or not tool.usable:
        return
    words = ["info", "--output=json", "-f", "qcow2", f"./{path.name}"]
    try:
        ended = tool.run(words, tool.look_timeout_ms, reads=path)
    except NotResponding as error:
        raise Invalid(f"{named.name}: qemu-img timed out while opening the image.") from error
    if ended.status != 0:
        reason = ended.complaint.rpartition(f"{path.name}': ")[2] or "no reason given"
        raise Invalid(f"{named.name}: QEMU cannot use the image: {reason}.")
    info = msgspec.json.decode(ended.output)
    if info.get("encrypted"):
        raise Invalid(f"{named.name}: the image is encrypted, which is not supported.")
    if info.get("virtual-size") != verdict.size_bytes or "backing-filename" in info:
        raise Invalid(f"{named.name}: the image is ambiguous: qemu-img reads another size or a backing file.")
