"""The content of a simulated disk: what it was created from, and what was written to it since.

An exported disk is a valid qcow2 file without backing file that the image folder and qemu-img accept, and from which
the content can be read again.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from interlock.core.errors import OperationRejected
from interlock.images.atomic_files import DRAFT_PREFIX

GIB: Final = 1 << 30

_CLUSTER: Final = 1 << 16
_MAGIC: Final = b"QFI\xfb"
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_USED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_OFFSET: Final = (1 << 56) - (1 << 9)
_MARK: Final = b"interlock-simulated-disk\n"
_SMALLEST: Final = 1 << 20


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a disk."""

    made_from: str
    """Such as `image:ID`, or `nothing` for an empty disk."""
    written: tuple[str, ...] = ()
    """What guests wrote to it, in order."""
    size_bytes: int = 0

    def plus(self, word: str) -> Content:
        return msgspec.structs.replace(self, written=(*self.written, word))


def write_qcow2(target: Path, content: Content) -> None:
    """Write the disk to `target` atomically. Raises `OperationRejected` if that fails."""
    size = max(content.size_bytes, _SMALLEST)
    data = _MARK + msgspec.json.encode(content)
    tables = -(-size // (_CLUSTER * (_CLUSTER // 8)))
    l1_clusters = -(-tables * 8 // _CLUSTER)
    l1, l2 = 3, 3 + l1_clusters
    header = _HEADER.pack(
        *(_MAGIC, 3, 0, 0, 16, size, 0, tables, l1 * _CLUSTER, _CLUSTER, 1, 0, 0),
        *(0, 0, 0, 4, 104),
    )
    with whole_file(target) as draft, draft.open("r+b") as file:
        file.write(header)
        _put(file.fileno(), 1, struct.pack(">Q", 2 * _CLUSTER))
        _put(file.fileno(), 2, struct.pack(">H", 1) * (l2 + 2))
        _put(file.fileno(), l1, struct.pack(">Q", _USED | l2 * _CLUSTER))
        _put(file.fileno(), l2, struct.pack(">Q", _USED | (l2 + 1) * _CLUSTER))
        _put(file.fileno(), l2 + 1, data)
        file.truncate((l2 + 2) * _CLUSTER)


def _put(descriptor: int, cluster: int, data: bytes) -> None:
    os.pwrite(descriptor, data, cluster * _CLUSTER)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a draft that is renamed to `target` at the end of the block. Raises `OperationRejected` for OSErrors."""
    draft = target.with_name(DRAFT_PREFIX + target.name)
    try:
        draft.touch(mode=0o600)
        yield draft
        draft.replace(target)
    except OSError as error:
        raise OperationRejected(f"{target} cannot be written: {error.strerror}.") from error
    finally:
        draft.unlink(missing_ok=True)


def read_file(path: Path) -> Content | None:
    """Return the content of the disk in a file, of any other file its name and size; None if it does not exist.

    Raises:
        OperationRejected: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or not head.startswith(_MAGIC):
                return Content(made_from=f"file:{path.name}", size_bytes=file.seek(0, os.SEEK_END))
            size, l1 = _HEADER.unpack(head)[5], _HEADER.unpack(head)[8]
            data = _first_cluster(file.fileno(), l1, _HEADER.unpack(head)[4])
    except FileNotFoundError:
        return None
    except (OSError, struct.error) as error:
        raise OperationRejected(f"{path} cannot be read: {error}.") from error
    if data.startswith(_MARK):
        with contextlib.suppress(msgspec.DecodeError):
            text = data[len(_MARK) :].split(b"\0", 1)[0]
            return msgspec.structs.replace(msgspec.json.decode(text, type=Content), size_bytes=size)
    return Content(made_from=f"file:{path.name}", size_bytes=size)


def _first_cluster(descriptor: int, l1_offset: int, cluster_bits: int) -> bytes:
    """Return the first cluster; empty if nothing was written there."""
    table = _entry(descriptor, l1_offset) & _OFFSET
    entry = _entry(descriptor, table) if table else 0
    if entry & _COMPRESSED:
        shift = 62 - (cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = ((entry & (_COMPRESSED - 1)) >> shift) + 1
        packed = os.pread(descriptor, sectors * 512, offset)
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(-15).decompress(packed, 1 << cluster_bits)
        return b""
    return os.pread(descriptor, 1 << cluster_bits, entry & _OFFSET) if entry & _OFFSET else b""


def _entry(descriptor: int, offset: int) -> int:
    (entry,) = struct.unpack(">Q", os.pread(descriptor, 8, offset))
    return int(entry)
