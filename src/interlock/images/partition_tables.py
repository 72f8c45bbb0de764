"""The end of a disk by its GPT or MBR partition table, to detect truncated images."""

from __future__ import annotations

import itertools
import struct
import zlib
from typing import Final

import msgspec

_MBR_SIGNATURE: Final = b"\x55\xaa"
_MBR_ENTRIES_AT: Final = 446
_MBR_SECTOR_BYTES: Final = 512
_PROTECTIVE: Final = 0xEE
_GPT_SIGNATURE: Final = b"EFI PART"
_GPT_SECTOR_BYTES: Final = (512, 4096)
_GPT_HEADER: Final = struct.Struct("<8sIIIIQQQQ")
_GPT_HEADER_BYTES: Final = range(92, 513)


class End(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a disk."""

    table: str
    """Name of the partition table, for messages."""
    at: int
    """In bytes."""
    certain: bool
    """Whether it is the end of the table, under a checksum; otherwise the end of a partition."""


def end_of(head: bytes) -> End | None:
    """Return the end of a disk by its first bytes, or None if unknown."""
    for sector in _GPT_SECTOR_BYTES:
        if found := _gpt_end(head, sector):
            return found
    return _mbr_end(head)


def _gpt_end(head: bytes, sector: int) -> End | None:
    header = head[sector : sector + _GPT_HEADER_BYTES.stop - 1]
    if not header.startswith(_GPT_SIGNATURE) or len(header) < _GPT_HEADER.size:
        return None
    _, _, size, checksum, _, _, backup, _, last_usable = _GPT_HEADER.unpack_from(header)
    if size not in _GPT_HEADER_BYTES or zlib.crc32(header[:16] + bytes(4) + header[20:size]) != checksum:
        return None
    return End(table="GPT partition table", at=(max(backup, last_usable) + 1) * sector, certain=True)


def _mbr_end(head: bytes) -> End | None:
    """Return the end of the last partition of a consistent table: there may be boot code in its place."""
    if head[510:512] != _MBR_SIGNATURE:
        return None
    spans: list[tuple[int, int]] = []
    for number in range(4):
        entry = head[_MBR_ENTRIES_AT + 16 * number : _MBR_ENTRIES_AT + 16 * (number + 1)]
        flag, kind, start, sectors = entry[0], entry[4], *struct.unpack("<II", entry[8:])
        if not any(entry):
            continue
        if flag not in (0, 0x80) or not kind or not start or not sectors or kind == _PROTECTIVE:
            return None
        spans.append((start, start + sectors))
    spans.sort()
    if not spans or any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        return None
    return End(table="MBR partition table", at=max(end for _, end in spans) * _MBR_SECTOR_BYTES, certain=False)
