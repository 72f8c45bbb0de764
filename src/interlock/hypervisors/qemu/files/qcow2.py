"""Reads qcow2 headers. Only for files that were created or inspected on this host.

The layout is that of the QEMU project's docs/interop/qcow2.txt, section "Header".
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.records import Spec

_MAGIC: Final = b"QFI\xfb"
_BEGINNING: Final = struct.Struct(">4sIQIIQ")
_TABLES: Final = struct.Struct(">4sIQIIQIIQQI")
"""The header as far as the positions of the tables."""
_CLUSTER_BITS_MAX: Final = 21
_FEATURES_AT: Final = 72
_VERSION_WITH_FEATURES: Final = 3
_EXTERNAL_DATA: Final = 1 << 2
_BACKING_BYTES_MAX: Final = 1023


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a qcow2 file."""

    size_bytes: int
    """Virtual size."""
    backing: str | None = None
    """The backing file, as written in the header."""
    external_data: bool = False
    """Whether its data is in another file."""

    @property
    def stands_alone(self) -> bool:
        """Whether it has neither backing file nor data file."""
        return self.backing is None and not self.external_data


def open_options(disk: Path, spec: Spec) -> str:
    """Return the options with which qemu-img opens a root disk: with the backing file at its path on this host.

    The header has the path on the host that created the disk.
    """
    words: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(disk)}, "backing": None}
    if spec.image.kind == "disk" and not spec.root_is_whole:
        base = {"driver": "file", "filename": spec.image.path}
        words["backing"] = {"driver": spec.image.format, "file": base}
    return "json:" + msgspec.json.encode(words).decode()


def fault_of(path: Path) -> str | None:
    """Return what is wrong with a qcow2 disk, such as `is missing`; None if its header is valid.

    Raises OSError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(_TABLES.size)
            size = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except IsADirectoryError:
        return "is a folder"
    if not beginning:
        return "is empty"
    if len(beginning) < _TABLES.size or not beginning.startswith(_MAGIC):
        return "is not a qcow2 disk"
    _, _, _, _, cluster_bits, _, _, l1_entries, l1_at, refcounts_at, refcounts_clusters = _TABLES.unpack(beginning)
    if size < max(l1_at + l1_entries * 8, refcounts_at + (refcounts_clusters << min(cluster_bits, _CLUSTER_BITS_MAX))):
        return "is truncated"
    return None


def read_header(path: Path) -> Header:
    """Read the header. Raises `OperationRejected` if the file is not qcow2, OSError if it cannot be read."""
    with path.open("rb") as file:
        beginning = file.read(_FEATURES_AT + 8)
        if len(beginning) < _BEGINNING.size or not beginning.startswith(_MAGIC):
            raise OperationRejected(f"{path} is not a qcow2 disk.", remedy="Restore it from a backup.")
        _magic, version, name_at, name_bytes, _cluster_bits, size_bytes = _BEGINNING.unpack_from(beginning)
        features = 0
        if version >= _VERSION_WITH_FEATURES:
            (features,) = struct.unpack_from(">Q", beginning.ljust(_FEATURES_AT + 8, b"\0"), _FEATURES_AT)
        backing = None
        if name_at:
            file.seek(name_at)
            backing = file.read(min(name_bytes, _BACKING_BYTES_MAX)).decode(errors="replace")
    return Header(size_bytes=size_bytes, backing=backing, external_data=bool(features & _EXTERNAL_DATA))
