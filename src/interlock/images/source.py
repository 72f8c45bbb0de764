"""The disk in an added file: the file itself, its decompressed content, or the disk of an OVA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from interlock.images import decompression, file_signatures, ova
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
        self._region = ova.Region(name=path.name, at=0, size=size)
        self._in_ova = file_signatures.is_tar(self._head())
        if self._in_ova:
            self._region = ova.disk_of(file, size, path.name)
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
