"""Judging a disk image before anything opens it: what it is, what it claims to be, and whether it is safe to use.

The judge is the hardened inspector of OpenStack (oslo.utils), fed with the very bytes that are being copied. Only an
image that it has passed is shown to QEMU's own tool, under limits, for a second opinion.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from oslo_utils.imageutils import format_inspector

from interlock.core.errors import Invalid, NotResponding
from interlock.hypervisors import disk_headers
from interlock.hypervisors.disk_headers import DISK_BYTES_MAX, SECTOR_BYTES
from interlock.hypervisors.image_tool import ImageTool

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
"""What a file's name says of it. `.img` says nothing: there are images of either format under that name."""
_RAW = frozenset({"raw", "gpt"})
"""The inspector's names for bytes as they are: without, and with, a partition table."""
_USABLE = _RAW | {"qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso"}
_READABLE = 0o644
_CHECKED = {"qcow2": "qcow2", "vmdk": "vmdk", "vhdx": "vhdx", "vdi": "vdi"}
"""What QEMU's tool calls the formats that it can check."""
_SOUND = frozenset({0, 3})
"""What it ends with where nothing is wrong, or only room is lost."""
_DANGERS = {
    "backing_file": "it names a backing file, whose content a guest could read",
    "descriptor": "its content is, at least in part, in other files, or its kind is none that can be used",
    "footer": "its beginning and its end contradict each other",
    "data_file": "it names a data file outside of it, which a guest could read and write",
    "unknown_features": "it uses features that are not known to be safe",
    "mbr": "its partition table is not a valid one",
}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is, once it has passed."""

    format: str
    """`raw`, `qcow2`, `vmdk`, `vhd`, `vhdx`, `vdi` or `iso`."""
    size_bytes: int
    """The size of the disk that a guest sees; of an image that is still to be converted, what it says of that."""
    footer_bytes: int = 0
    """How much of the end is not the disk's."""


class Inspection:
    """The judgement of one image, fed with its bytes in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = path.name  # the folder that it came through is nobody's affair
        self._head = b""
        self._tail = b""
        self._length = 0
        # Everything goes through `read`: the wrapper takes a source, and this object is it.
        self._pending = b""
        self._wrapper = format_inspector.InspectWrapper(self)  # type: ignore[arg-type]

    def read(self, _size: int) -> bytes:
        """The bytes just fed, for the inspector."""
        return self._pending

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `Invalid` as soon as it is certain that the image will not pass."""
        if not self._length:
            self._head = chunk[: len(_QCOW2_MAGIC)]
        self._length += len(chunk)
        self._tail = (self._tail + chunk[-SECTOR_BYTES:])[-SECTOR_BYTES:]
        self._pending = chunk
        self._wrapper.read(len(chunk))
        if self._length == len(chunk):
            # Most formats show in the first chunk: a large image of a wrong one is not read to its end.
            self._refuse_unless_usable(self._formats())

    def verdict(self) -> Verdict:
        """What the image is, after its last byte. Raises `Invalid` with what is wrong with it."""
        try:
            self._wrapper.close()
        except Exception as error:
            raise self._unreadable(error) from error
        formats = self._formats()
        self._refuse_unless_usable(formats)
        name, found = self._one(formats)
        if name == "raw" and disk_headers.is_fixed_vhd(self._tail, self._length):
            return Verdict(format="vhd", size_bytes=self._length - SECTOR_BYTES, footer_bytes=SECTOR_BYTES)
        self._refuse_mismatch(name)
        if name == "iso" and found.virtual_size > self._length:
            raise Invalid(f"{self._name}: the image is cut short.")
        if name != "iso":
            self._refuse_dangers(found)
        size = self._length if name in {"raw", "iso"} else found.virtual_size
        if not SECTOR_BYTES <= size <= DISK_BYTES_MAX or size % SECTOR_BYTES:
            raise Invalid(
                f"{self._name}: a disk of {size} bytes is not possible; it must be whole sectors of {SECTOR_BYTES} "
                f"bytes, and no more than {DISK_BYTES_MAX >> 40} TiB."
            )
        return Verdict(format=name, size_bytes=size)

    def _one(self, formats: list[format_inspector.FileInspector]) -> tuple[str, format_inspector.FileInspector]:
        """The format by our name. An ISO may have a partition table, so that it can be put on a stick as well."""
        by_name = {found.NAME: found for found in formats}
        found = by_name["iso"] if "iso" in by_name else formats[0]
        return ("raw" if found.NAME in _RAW else found.NAME), found

    def _formats(self) -> list[format_inspector.FileInspector]:
        try:
            return self._wrapper.formats or []
        except Exception as error:
            # The inspector reads what an attacker wrote: whatever trips it up is a reason to refuse.
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> Invalid:
        return Invalid(f"{self._name}: the image cannot be made sense of ({str(error) or type(error).__name__}).")

    def _refuse_unless_usable(self, formats: list[format_inspector.FileInspector]) -> None:
        names = {found.NAME for found in formats}
        if len(names) > 1 and not names <= _RAW | {"iso"}:
            raise Invalid(
                f"{self._name}: the image can be read as {' and as '.join(sorted(names))}, which is refused as a trick."
            )
        for name in sorted(names - _USABLE):
            raise Invalid(
                f"{self._name}: this is a {name} image; raw, qcow2, vmdk, vhd, vhdx, vdi and iso are what can be used.",
                remedy=f"Convert it: `qemu-img convert -f {name} -O qcow2 FILE NEW.qcow2`.",
            )

    def _refuse_mismatch(self, name: str) -> None:
        if name == "raw" and self._head == _QCOW2_MAGIC:
            raise Invalid(f"{self._name}: the image begins as qcow2 and is cut short.")
        claimed = _CLAIMS.get(self._path.suffix.lower(), name)
        if claimed != name:
            raise Invalid(
                f"{self._name}: the file is named {self._path.suffix} and holds a {name} image.",
                remedy="See that it is the right file and complete, then give it the name that fits.",
            )

    def _refuse_dangers(self, found: format_inspector.FileInspector) -> None:
        try:
            found.safety_check()
        except format_inspector.SafetyCheckFailed as error:
            reasons = [_DANGERS.get(name, str(failure)) for name, failure in sorted(error.failures.items())]
            raise Invalid(f"{self._name}: the image is refused: {'; '.join(reasons)}.") from error
        except Exception as error:
            raise self._unreadable(error) from error


def check_headers(path: Path, named: Path, verdict: Verdict) -> None:
    """Look again at an image that has passed, now that all of it is in `path`. Raises `Invalid`."""
    disk_headers.check(path, named, verdict.format)


def refuse_damaged(path: Path, named: Path, verdict: Verdict, tool: ImageTool, abandoned: Callable[[], bool]) -> None:
    """Have QEMU's tool follow every pointer of an image: one that was cut short has some that lead beyond its end.

    A raw disk, an ISO and a VHD have nothing that it could follow. `path` and `named` are as for `second_opinion`.

    Raises:
        Invalid: something in it is not where it is said to be, or looking took too long.
        Abandoned: `abandoned` said so.
    """
    driver = _CHECKED.get(verdict.format)
    if driver is None or not tool.usable:
        return
    path.chmod(_READABLE)
    try:
        ended = tool.run(["check", "-q", "-f", driver, f"./{path.name}"], path.parent, tool.timeout_ms, abandoned)
    except NotResponding as error:
        raise Invalid(f"{named.name}: QEMU's tool took too long to check the image.") from error
    if ended.status not in _SOUND:
        raise Invalid(
            f"{named.name}: the image is damaged, or was cut short.",
            remedy="Fetch it again, and name its SHA-256; `qemu-img check FILE` says what is wrong with it.",
        )


def second_opinion(path: Path, named: Path, verdict: Verdict, tool: ImageTool) -> None:
    """Have QEMU's tool open a qcow2 image that has passed; a machine without that tool goes without it.

    `path` is the copy, which becomes readable for all, `named` what the caller called it.

    Raises:
        Invalid: QEMU could not use it, it is encrypted, or the two judges disagree.
    """
    if verdict.format != "qcow2" or not tool.usable:
        return
    path.chmod(_READABLE)
    words = ["info", "--output=json", "-f", "qcow2", f"./{path.name}"]
    try:
        ended = tool.run(words, path.parent, tool.look_timeout_ms)
    except NotResponding as error:
        raise Invalid(f"{named.name}: QEMU's tool took too long to open the image.") from error
    if ended.status != 0:
        reason = ended.complaint.rpartition(f"{path.name}': ")[2] or "no reason given"
        raise Invalid(f"{named.name}: QEMU cannot use the image: {reason}.")
    said = msgspec.json.decode(ended.output)
    if said.get("encrypted"):
        raise Invalid(f"{named.name}: the image is encrypted, which is not supported.")
    if said.get("virtual-size") != verdict.size_bytes or "backing-filename" in said:
        raise Invalid(f"{named.name}: the image reads differently to two readers, which is refused as a trick.")
