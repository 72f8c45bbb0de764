"""What the first bytes of a qcow2 file say. Only for files that were made or inspected here; nothing is written.

The layout is that of the QEMU project's docs/interop/qcow2.txt, section "Header".
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.core.errors import Refused
from interlock.core.records import Spec

_MAGIC: Final = b"QFI\xfb"
_BEGINNING: Final = struct.Struct(">4sIQIIQ")
_FEATURES_AT: Final = 72
_VERSION_WITH_FEATURES: Final = 3
_EXTERNAL_DATA: Final = 1 << 2
_BACKING_BYTES_MAX: Final = 1023


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a qcow2 file is."""

    size_bytes: int
    """The size that a guest sees."""
    backing: str | None = None
    """The file over which it is a layer, as it is written there."""
    external_data: bool = False
    """Whether its content is in another file."""

    @property
    def stands_alone(self) -> bool:
        """Whether it needs no other file."""
        return self.backing is None and not self.external_data


def opened(disk: Path, spec: Spec) -> str:
    """How the image tool is to open an instance's root disk: as a layer over the image where this host has that.

    What the file says itself is where the host that made it had the image.
    """
    words: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(disk)}, "backing": None}
    if spec.image.kind == "disk" and not spec.root_is_whole:
        base = {"driver": "file", "filename": spec.image.path}
        words["backing"] = {"driver": spec.image.format, "file": base}
    return "json:" + msgspec.json.encode(words).decode()


def read_header(path: Path) -> Header:
    """Raises `Refused` if the file is no qcow2, OSError if it cannot be read."""
    with path.open("rb") as file:
        beginning = file.read(_FEATURES_AT + 8)
        if len(beginning) < _BEGINNING.size or not beginning.startswith(_MAGIC):
            raise Refused(f"{path} is not a qcow2 disk.", remedy="Put the disk back as it was.")
        _magic, version, name_at, name_bytes, _cluster_bits, size_bytes = _BEGINNING.unpack_from(beginning)
        features = 0
        if version >= _VERSION_WITH_FEATURES:
            (features,) = struct.unpack_from(">Q", beginning.ljust(_FEATURES_AT + 8, b"\0"), _FEATURES_AT)
        backing = None
        if name_at:
            file.seek(name_at)
            backing = file.read(min(name_bytes, _BACKING_BYTES_MAX)).decode(errors="replace")
    return Header(size_bytes=size_bytes, backing=backing, external_data=bool(features & _EXTERNAL_DATA))
