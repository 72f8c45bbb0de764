"""Streaming decompression of images (gzip, xz, zstd, bzip2) with limits of memory, size and time.

A file may have several concatenated streams and trailing zeros; any other trailing data is rejected.
"""

from __future__ import annotations

import bz2
import lzma
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import msgspec
import zstandard

from interlock.core.errors import Invalid
from interlock.images import file_signatures
from interlock.images.atomic_files import CHUNK_BYTES

_XZ_MEMORY_BYTES: Final = 256 << 20
"""More than any preset of `xz` needs; a header may request 4 GiB."""
_ZSTD_WINDOW_BYTES: Final = 128 << 20
"""The default limit of `zstd -d`."""
_ZSTD_PIECE_BYTES: Final = 512
"""Input per uninterruptible step, which yields at most 16 MiB."""
_GZIP_WINDOW_BITS: Final = 31
_MAGIC_BYTES_MAX: Final = 10
_ERRORS: Final = (zlib.error, lzma.LZMAError, OSError, zstandard.ZstdError, ValueError, EOFError, MemoryError)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a decompression."""

    bytes_max: int
    """Maximum decompressed size."""
    timeout_ms: int
    """Maximum duration, including reading and writing."""


class _Stream(Protocol):
    """One compressed stream."""

    @property
    def ended(self) -> bool: ...

    @property
    def rest(self) -> bytes:
        """Input after the end of the stream."""
        ...

    def feed(self, data: bytes) -> Iterator[bytes]: ...


class _Bounded:
    """A stream of `bz2` or `lzma`, which limit the output of each call."""

    def __init__(self, stream: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._stream = stream

    @property
    def ended(self) -> bool:
        return self._stream.eof

    @property
    def rest(self) -> bytes:
        return self._stream.unused_data

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield self._stream.decompress(data, CHUNK_BYTES)
        while not self._stream.eof and not self._stream.needs_input:
            yield self._stream.decompress(b"", CHUNK_BYTES)


class _Gzip:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(_GZIP_WINDOW_BITS)

    @property
    def ended(self) -> bool:
        return self._stream.eof

    @property
    def rest(self) -> bytes:
        return self._stream.unused_data

    def feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            out = self._stream.decompress(data, CHUNK_BYTES)
            yield out
            data = self._stream.unconsumed_tail
            if self._stream.eof or (not data and len(out) < CHUNK_BYTES):
                return


class _Zstd:
    def __init__(self) -> None:
        self._stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
        self._rest = b""

    @property
    def ended(self) -> bool:
        return self._stream.eof

    @property
    def rest(self) -> bytes:
        return self._rest

    def feed(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), _ZSTD_PIECE_BYTES):
            out = self._stream.decompress(data[at : at + _ZSTD_PIECE_BYTES])
            yield from (out[start : start + CHUNK_BYTES] for start in range(0, len(out), CHUNK_BYTES))
            if self._stream.eof:
                self._rest = self._stream.unused_data + data[at + _ZSTD_PIECE_BYTES :]
                return


_STREAMS: Final[dict[str, Callable[[], _Stream]]] = {
    "gzip": _Gzip,
    "xz": lambda: _Bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)),
    "zstd": _Zstd,
    "bzip2": lambda: _Bounded(bz2.BZ2Decompressor()),
}


def decompressed(chunks: Iterator[bytes], compression: str, name: str, limits: Limits) -> Iterator[bytes]:
    """Yield the decompressed content of `chunks`. `name` is the file's name, for messages.

    Raises:
        Invalid: the data are damaged, truncated, followed by other data, or exceed a limit.
    """
    until, length = time.monotonic() + limits.timeout_ms / 1000, 0
    for piece in _streams(chunks, compression, name):
        length += len(piece)
        if length > limits.bytes_max:
            raise Invalid(
                f"{name}: decompressed, the image would become larger than {limits.bytes_max} bytes.",
                remedy="Have image_bytes_max raised if you trust the image.",
            )
        if time.monotonic() > until:
            raise Invalid(
                f"{name}: decompressing the image timed out: it took longer than {limits.timeout_ms} ms.",
                remedy="Decompress it elsewhere, or have image_conversion_timeout_ms raised.",
            )
        if piece:
            yield piece
    if not length:
        raise Invalid(f"{name}: the file is compressed with {compression}, and there is nothing in it.")


def _streams(chunks: Iterator[bytes], compression: str, name: str) -> Iterator[bytes]:
    data = _next_stream(chunks, b"", compression, name)
    while data:
        stream = _STREAMS[compression]()
        while data:
            try:
                yield from stream.feed(data)
            except _ERRORS as error:
                raise Invalid(
                    f"{name}: the file begins as one that is compressed with {compression}, and cannot be "
                    f"decompressed ({str(error) or type(error).__name__}).",
                    remedy=f"Fetch it again; `{compression} -t FILE` checks it.",
                ) from error
            if stream.ended:
                break
            data = next(chunks, b"")
        if not stream.ended:
            raise Invalid(
                f"{name}: the file is compressed with {compression}, and is truncated.",
                remedy=f"Fetch it again; `{compression} -t FILE` checks it.",
            )
        data = _next_stream(chunks, stream.rest, compression, name)


def _next_stream(chunks: Iterator[bytes], rest: bytes, compression: str, name: str) -> bytes:
    """Return the beginning of the next stream, or nothing if only padding follows."""
    rest = rest.lstrip(b"\0")
    for chunk in chunks:
        rest = (rest + chunk) if rest else chunk.lstrip(b"\0")
        if len(rest) >= _MAGIC_BYTES_MAX:
            break
    if rest and file_signatures.compression_of(rest) != compression:
        raise Invalid(
            f"{name}: after its end as a file that is compressed with {compression} comes something else.",
            remedy="Decompress it yourself, and give what is in it.",
        )
    return rest
