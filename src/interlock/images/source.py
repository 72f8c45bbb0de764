"""The disk in an added file: the file itself, its decompressed content, or the disk of an OVA.

An OVA is a tar archive (POSIX `ustar`, DSP0243) with an OVF descriptor and disks.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from interlock.core.errors import Invalid
from interlock.images import decompression, file_signatures
from interlock.images.atomic_files import chunks
from interlock.images.decompression import Limits


class Given:
    """An open file of `size` bytes. `digest` gets all of its bytes, in order, whatever is taken from it."""

    def __init__(self, file: IO[bytes], size: int, path: Path, digest: Callable[[bytes], None]) -> None:
        """Raises `Invalid` where it is an archive that does not give one disk."""
        self._file = file
        self._size = size
        self._path = path
        self._digest = digest
        self._region = Region(name=path.name, at=0, size=size)
        self._in_ova = file_signatures.is_tar(self._head())
        if self._in_ova:
            self._region = disk_of(file, size, path.name)
        self._compression = file_signatures.compression_of(self._head())
        file.seek(0)

    @property
    def packed(self) -> bool:
        """Whether the disk is compressed or in an OVA, so that the file's suffix is not its format."""
        return self._in_ova or self._compression is not None

    def described(self, given: str, kept: str) -> str | None:
        """Describe what the image was converted from, outermost last; None if it is kept unchanged."""
        changed = [given] if given != kept else []
        changed += [self._compression] if self._compression else []
        changed += ["ova"] if self._in_ova else []
        if changed and changed[0] != given:
            changed.insert(0, given)
        return ", ".join(changed) or None

    def chunks(self, limits: Limits) -> Iterator[bytes]:
        """Yield the bytes of the disk. Raises `Invalid` as `decompression.decompressed`."""
        if self._compression is None:
            return self._parts()
        return decompression.decompressed(self._parts(), self._compression, self._path.name, limits)

    def _head(self) -> bytes:
        self._file.seek(self._region.at)
        return self._file.read(min(file_signatures.HEAD_BYTES, self._region.size))

    def _parts(self) -> Iterator[bytes]:
        """Yield the bytes of the region; the rest is read for the digest."""
        start, end, at = self._region.at, self._region.at + self._region.size, 0
        for chunk in chunks(self._file, self._size, self._path):
            self._digest(chunk)
            part = chunk[max(0, start - at) : max(0, end - at)]
            at += len(chunk)
            if part:
                yield part


_BLOCK_BYTES: Final = 512
_MEMBERS_MAX: Final = 1000
_OVF_BYTES_MAX: Final = 4 << 20
_NAMES_SHOWN: Final = 10
_REGULAR: Final = (b"0", b"\0", b"7")
_ELEMENT: Final = re.compile(r"<(?:[\w-]+:)?(File|Disk)\s([^<>]*)>")
_ATTRIBUTE: Final = re.compile(r"""(?:[\w-]+:)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a file, in bytes."""

    name: str
    """Name of the archive member."""
    at: int
    size: int


def disk_of(file: IO[bytes], length: int, name: str) -> Region:
    """Return the disk in the archive `file` of `length` bytes; `name` is for messages.

    Raises:
        Invalid: it is not an OVA, is damaged or truncated, or does not have exactly one disk.
    """
    members = list(_members(file, length, name))
    description = next((one for one in members if one.name.lower().endswith(".ovf")), None)
    if description is None:
        inside = ", ".join(one.name[:80] for one in members[:_NAMES_SHOWN]) or "nothing"
        raise Invalid(
            f"{name}: this is a tar archive, and no OVA: it holds {inside}.",
            remedy="Unpack it (`tar -xf FILE`), and give the disk image that is in it.",
        )
    if description.size > _OVF_BYTES_MAX:
        raise Invalid(f"{name}: the description {description.name[:80]} in this OVA is {description.size} bytes long.")
    file.seek(description.at)
    text = file.read(description.size).decode("utf-8", "replace")
    wanted = _disks(text)
    if len(wanted) != 1:
        what = f"{len(wanted)} disks ({', '.join(one[:80] for one in wanted[:_NAMES_SHOWN])})" if wanted else "no disk"
        raise Invalid(
            f"{name}: this OVA has {what}; an image is one disk.",
            remedy="Unpack it (`tar -xf FILE`), and add each disk as an image of its own.",
        )
    for member in members:
        if member.name.removeprefix("./") == wanted[0]:
            return member
    raise Invalid(
        f"{name}: this OVA describes the disk {wanted[0][:80]}, which is not in it.",
        remedy="See that the file is complete; a disk in several parts must be put together first.",
    )


def _disks(text: str) -> list[str]:
    """Return the files of the disks in an OVF descriptor, without duplicates."""
    files: dict[str, str] = {}
    disks: list[str] = []
    for kind, attributes in _ELEMENT.findall(text):
        found = {key: first or second for key, first, second in _ATTRIBUTE.findall(attributes)}
        if kind == "File":
            files[found.get("id", "")] = found.get("href", "")
        elif "fileRef" in found:
            disks.append(found["fileRef"])
    return list(dict.fromkeys(files.get(one, one) for one in disks))


def _members(file: IO[bytes], length: int, name: str) -> Iterator[Region]:
    at = 0
    for _ in range(_MEMBERS_MAX):
        file.seek(at)
        header = file.read(_BLOCK_BYTES)
        if not any(header):
            return
        if len(header) < _BLOCK_BYTES or not _sums_up(header):
            raise Invalid(f"{name}: the tar archive is damaged at byte {at}, or truncated.")
        size = _number(header[124:136])
        if size < 0 or at + _BLOCK_BYTES + size > length:
            raise Invalid(
                f"{name}: the tar archive is truncated: what is in it ends at byte {at + _BLOCK_BYTES + size}, and the "
                f"file at {length}.",
                remedy="Fetch it again, and name its SHA-256.",
            )
        if header[156:157] in _REGULAR:
            prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
            member = _text(header[:100])
            yield Region(name=f"{prefix}/{member}" if prefix else member, at=at + _BLOCK_BYTES, size=size)
        at += _BLOCK_BYTES + -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
    raise Invalid(f"{name}: the tar archive holds more than {_MEMBERS_MAX} files.")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]*", digits) and digits else 0


def _sums_up(header: bytes) -> bool:
    claimed = _number(header[148:156])
    plain = header[:148] + b" " * 8 + header[156:]
    return claimed in {sum(plain), sum(struct.unpack("512b", plain))}
