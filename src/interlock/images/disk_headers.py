"""Safety checks of disk image headers before qemu-img opens the image: references to other files, and table sizes.

They cover what oslo.utils' inspector does not: parents of vmdk, vhd, vhdx and vdi images, and table sizes in headers
that would make a reader allocate gigabytes. Sources: QEMU's `docs/interop/qcow2.txt`, VMware's Virtual Disk Format 5.0,
Microsoft's VHD specification and MS-VHDX, and VirtualBox's `VDICore.h`. Of raw disks, the end by the GPT or MBR
partition table, which shows whether they are truncated.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from interlock.core.errors import Invalid

DISK_BYTES_MAX: Final = 16 << 40
"""Maximum virtual size of a disk, below QEMU's limits."""
SECTOR_BYTES: Final = 512

_QCOW2_CLUSTER_BITS: Final = range(9, 22)
_QCOW2_L1_BYTES_MAX: Final = 32 << 20
_QCOW2_SNAPSHOTS_MAX: Final = 256
_QCOW2_SNAPSHOT_BYTES_MIN: Final = 40
_QCOW2_REFCOUNT_TABLE_BYTES_MAX: Final = 8 << 20
_QCOW2_HEADER_BYTES: Final = 112
_QCOW2_VERSIONS: Final = (2, 3)
"""Version 2 has no feature bits."""
_QCOW2_CORRUPT: Final = 1 << 1
_QCOW2_DATA_FILE: Final = 1 << 2
_QCOW2_COMPRESSION: Final = 1 << 3
_QCOW2_SUPPORTED: Final = 0b11111
"""Feature bits: dirty, corrupt, external data file, compression type, extended L2 entries."""
_QCOW2_ZSTD: Final = 1
_QCOW2_FEATURE_NAMES: Final = 0x6803F857
_CONVERT: Final = "Convert it: `qemu-img convert -O qcow2 FILE NEW.qcow2`."
_TOGETHER: Final = "Put both into one, where the {} is: `qemu-img convert -O qcow2 FILE NEW.qcow2`."
_DECRYPT: Final = (
    "Decrypt it: `qemu-img convert --object secret,id=key,file=PASSPHRASE_FILE --image-opts "
    "driver=qcow2,encrypt.key-secret=key,file.filename=FILE -O qcow2 NEW.qcow2`."
)
_VMDK_GRAIN_SECTORS_MAX: Final = 2048
_VMDK_TABLE_ENTRIES: Final = 512
_VMDK_TABLE_AT_END: Final = (1 << 64) - 1
_VMDK_DESCRIPTOR_BYTES_MAX: Final = 64 << 10
_VMDK_EXTENT: Final = re.compile(r'rw \d+ sparse "[^"/\\:]+"')
_VHD_FIXED: Final = 2
_VHD_DYNAMIC: Final = 3
_VHD_DIFFERENCE: Final = 4
_VHD_BLOCK_BYTES: Final = frozenset(1 << bits for bits in range(12, 27))
_VHD_LOCATORS: Final = 8
_VHDX_FILE_PARAMETERS: Final = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
_VHDX_METADATA: Final = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
_VHDX_HAS_PARENT: Final = 2
_VHDX_ENTRIES_MAX: Final = 2047
_VDI_KINDS: Final = frozenset({1, 2})
"""Dynamic and fixed; the others are differencing images."""
_VDI_BLOCK_BYTES: Final = 1 << 20


class _Unsafe(Exception):
    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.remedy = remedy


class _Header:
    """Random access to an image file."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file = file
        self.length = length

    def fields(self, layout: str, at: int) -> tuple[Any, ...]:
        return struct.unpack(layout, self.bytes(at, struct.calcsize(layout)))

    def bytes(self, at: int, size: int) -> bytes:
        if at < 0 or at + size > self.length:
            raise _Unsafe("it is truncated, or points beyond its end")
        self._file.seek(at)
        return self._file.read(size)

    def must_hold(self, what: str, at: int, size: int) -> None:
        if at + size > self.length:
            raise _Unsafe(f"its {what} is said to be {size} bytes at {at}, beyond the end of the file")


def check(path: Path, named: Path, image_format: str) -> None:
    """Check the headers of the image in `path`; `named` is the caller's path, for messages.

    Raises:
        Invalid: it refers to another file, is encrypted, or its headers are inconsistent with its size.
    """
    judge = _JUDGES.get(image_format)
    if judge is None:
        return
    with path.open("rb") as file:
        try:
            judge(_Header(file, path.stat().st_size))
        except _Unsafe as reason:
            raise Invalid(f"{named.name}: the image is refused: {reason}.", remedy=reason.remedy) from None


def check_qcow2_features(head: bytes, name: str) -> None:
    """Check the features of a qcow2 image that begins with `head`.

    Raises:
        Invalid: it requires another file, a key, or an unsupported feature; the remedy converts it.
    """
    try:
        _qcow2_features(head)
    except _Unsafe as reason:
        raise Invalid(f"{name}: the image is refused: {reason}.", remedy=reason.remedy) from None


def _qcow2_features(head: bytes) -> None:
    header = head.ljust(_QCOW2_HEADER_BYTES, b"\0")
    version, backing_at = struct.unpack_from(">IQ", header, 4)
    (crypt,) = struct.unpack_from(">I", header, 32)
    if version not in _QCOW2_VERSIONS:
        reader = "Convert it: `qemu-img convert -f qcow -O qcow2 FILE NEW.qcow2`." if version == 1 else None
        raise _Unsafe(f"it is of version {version} of the format; versions 2 and 3 are supported", reader)
    if backing_at:
        raise _Unsafe("it names a backing file, whose content a guest could read", _TOGETHER.format("backing file"))
    if crypt:
        raise _Unsafe("it is encrypted, which is not supported", _DECRYPT)
    if version == _QCOW2_VERSIONS[0]:
        return
    (features,) = struct.unpack_from(">Q", header, 72)
    if features & _QCOW2_DATA_FILE:
        reason = "it names a data file outside of it, which a guest could read and write"
        raise _Unsafe(reason, _TOGETHER.format("data file"))
    if features & _QCOW2_CORRUPT:
        raise _Unsafe("it is marked as corrupt", "Repair a copy of it: `qemu-img check -r all FILE`.")
    compression = header[104] if features & _QCOW2_COMPRESSION else 0
    unknown = [bit for bit in range(64) if features & ~_QCOW2_SUPPORTED & 1 << bit]
    what = [_qcow2_feature_name(head, bit) for bit in unknown]
    if compression > _QCOW2_ZSTD:
        what.append(f"the compression type {compression}")
    if what:
        raise _Unsafe(f"it uses features that are not supported: {', '.join(what)}", _CONVERT)


def _qcow2_feature_name(head: bytes, bit: int) -> str:
    """Return the name of an unknown feature from the image's feature name table."""
    at = int.from_bytes(head[100:104], "big")
    while at + 8 <= len(head):
        kind, size = struct.unpack_from(">II", head, at)
        if kind == _QCOW2_FEATURE_NAMES:
            for entry in range(at + 8, min(at + 8 + size, len(head) - 47), 48):
                if head[entry : entry + 2] == bytes([0, bit]):
                    name = head[entry + 2 : entry + 48].partition(b"\0")[0].decode("ascii", "replace")
                    return f"{name!r} (incompatible feature bit {bit})"
        if kind == 0:
            break
        at += 8 + (size + 7) // 8 * 8
    return f"incompatible feature bit {bit}"


def is_fixed_vhd(footer: bytes, length: int) -> bool:
    """Whether a file of `length` bytes that ends in `footer` is a fixed VHD: a raw disk with a footer."""
    if len(footer) != SECTOR_BYTES or not footer.startswith(b"conectix"):
        return False
    current, _, kind, checksum = struct.unpack(">QIII", footer[48:68])
    sums_up = sum(footer) - sum(footer[64:68]) == ~checksum & 0xFFFFFFFF
    return sums_up and bool(kind == _VHD_FIXED and current == length - SECTOR_BYTES)


def _qcow2(header: _Header) -> None:
    bits, _, crypt, l1_entries, l1_at = header.fields(">IQIIQ", 20)
    refcounts_at, refcount_clusters, snapshots, snapshots_at = header.fields(">QIIQ", 48)
    if crypt:
        raise _Unsafe("it is encrypted, which is not supported", _DECRYPT)
    if bits not in _QCOW2_CLUSTER_BITS:
        raise _Unsafe(f"its clusters are said to be of 2 to the power of {bits} bytes")
    cluster = 1 << bits
    if l1_entries * 8 > _QCOW2_L1_BYTES_MAX:
        raise _Unsafe(f"its first table is said to have {l1_entries} entries")
    header.must_hold("first table", l1_at, l1_entries * 8)
    if refcount_clusters * cluster > _QCOW2_REFCOUNT_TABLE_BYTES_MAX:
        raise _Unsafe(f"its table of reference counts is said to have {refcount_clusters} clusters")
    header.must_hold("table of reference counts", refcounts_at, refcount_clusters * cluster)
    if snapshots > _QCOW2_SNAPSHOTS_MAX:
        raise _Unsafe(f"it is said to hold {snapshots} snapshots")
    header.must_hold("list of snapshots", snapshots_at, snapshots * _QCOW2_SNAPSHOT_BYTES_MIN)


def _vmdk(header: _Header) -> None:
    capacity, grain, descriptor_at, descriptor_sectors = header.fields("<QQQQ", 12)
    entries, _, directory_at = header.fields("<IQQ", 44)
    if directory_at == _VMDK_TABLE_AT_END:
        _, entries, _, directory_at = header.fields("<QIQQ", header.length - 2 * SECTOR_BYTES + 36)
    if not 1 <= grain <= _VMDK_GRAIN_SECTORS_MAX or grain & (grain - 1) or entries != _VMDK_TABLE_ENTRIES:
        raise _Unsafe(f"its grains are said to be {grain} sectors, {entries} to a table")
    if capacity * SECTOR_BYTES > DISK_BYTES_MAX:
        raise _Unsafe(f"its disk is said to have {capacity} sectors")
    header.must_hold("directory", directory_at * SECTOR_BYTES, -(-capacity // (grain * entries)) * 4)
    size = descriptor_sectors * SECTOR_BYTES
    if not 0 < size <= _VMDK_DESCRIPTOR_BYTES_MAX:
        raise _Unsafe(f"its descriptor is said to have {descriptor_sectors} sectors")
    _vmdk_descriptor(header.bytes(descriptor_at * SECTOR_BYTES, size))


def _vmdk_descriptor(content: bytes) -> None:
    # It is text up to the first zero byte, but some readers search the rest too.
    text = content.decode("latin-1").lower()
    if "parentfilenamehint" in text:
        raise _Unsafe("it names a parent, whose content a guest could read")
    parents = re.findall(r"parentcid\s*=\s*([0-9a-f]*)", text)
    if any(parent != "ffffffff" for parent in parents):
        raise _Unsafe("it is the difference to a parent")
    extents = [line.strip() for line in text.partition("\0")[0].splitlines()]
    extents = [line for line in extents if line.startswith(("rw ", "rdonly ", "noaccess "))]
    if len(extents) != 1 or _VMDK_EXTENT.fullmatch(extents[0]) is None:
        raise _Unsafe("its content is, at least in part, in other files")


def _vhd(header: _Header) -> None:
    cookie, _, _, dynamic_at, _, _, _, _, _, current, _, kind = header.fields(">8sIIQIIIIQQII", 0)
    if kind != _VHD_DYNAMIC:
        raise _Unsafe("it is the difference to a parent" if kind == _VHD_DIFFERENCE else "its kind is not known")
    if cookie != b"conectix" or header.bytes(dynamic_at, 8) != b"cxsparse":
        raise _Unsafe("its header is damaged")
    table_at, _, entries, block = header.fields(">QIII", dynamic_at + 16)
    if block not in _VHD_BLOCK_BYTES or entries * block > DISK_BYTES_MAX + block or entries * block < current:
        raise _Unsafe(f"its disk of {current} bytes is said to have {entries} blocks of {block} bytes")
    header.must_hold("table of blocks", table_at, entries * 4)
    locators = header.bytes(dynamic_at + 576, _VHD_LOCATORS * 24)
    if any(header.bytes(dynamic_at + 40, 16)) or any(locators):
        raise _Unsafe("it names a parent, whose content a guest could read")


def _vhdx(header: _Header) -> None:
    for copy_at in (64 << 10, 128 << 10):
        if header.bytes(copy_at, 4) == b"head" and any(header.bytes(copy_at + 48, 16)):
            raise _Unsafe("its log was not written back; open and close it once where it was made")
    metadata_at = _vhdx_region(header, _VHDX_METADATA)
    signature, _, count = header.fields("<8sHH", metadata_at)
    if signature != b"metadata" or count > _VHDX_ENTRIES_MAX:
        raise _Unsafe("its metadata is damaged")
    for number in range(count):
        item, at, size = header.fields("<16sII", metadata_at + 32 * (number + 1))
        if item == _VHDX_FILE_PARAMETERS:
            if size != struct.calcsize("<II"):
                raise _Unsafe("its metadata is damaged")
            block, flags = header.fields("<II", metadata_at + at)
            if flags & _VHDX_HAS_PARENT:
                raise _Unsafe("it is the difference to a parent")
            if not 1 << 20 <= block <= 256 << 20 or block & (block - 1):
                raise _Unsafe(f"its blocks are said to be of {block} bytes")
            return
    raise _Unsafe("its metadata is damaged")


def _vhdx_region(header: _Header, wanted: bytes) -> int:
    table_at = 192 << 10
    signature, _, count = header.fields("<4sII", table_at)
    if signature != b"regi" or count > _VHDX_ENTRIES_MAX:
        raise _Unsafe("its table of regions is damaged")
    found: list[int] = []
    for number in range(count):
        region, at, size = header.fields("<16sQI", table_at + 16 + 32 * number)
        header.must_hold("region", at, size)
        if region == wanted:
            found.append(at)
    if len(found) != 1:
        raise _Unsafe("its table of regions is damaged")
    return found[0]


def _vdi(header: _Header) -> None:
    (kind,) = header.fields("<I", 76)
    map_at, data_at = header.fields("<II", 340)
    size, block, _, blocks, kept = header.fields("<QIIII", 368)
    link, parent = header.fields("<16s16s", 424)
    if kind not in _VDI_KINDS or any(link) or any(parent):
        raise _Unsafe("it is the difference to a parent")
    if block != _VDI_BLOCK_BYTES or blocks * block > DISK_BYTES_MAX + block or blocks * block < size:
        raise _Unsafe(f"its disk of {size} bytes is said to have {blocks} blocks of {block} bytes")
    header.must_hold("table of blocks", map_at, blocks * 4)
    if kept > blocks:
        raise _Unsafe(f"it is said to keep {kept} of {blocks} blocks")
    # QEMU silently reads missing blocks at the end as zeros.
    header.must_hold("content", data_at, kept * block)


_JUDGES: Final[dict[str, Callable[[_Header], None]]] = {
    "qcow2": _qcow2,
    "vmdk": _vmdk,
    "vhd": _vhd,
    "vhdx": _vhdx,
    "vdi": _vdi,
}


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
