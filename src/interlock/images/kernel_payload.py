"""Extracts the ELF kernel from a Linux bzImage, and the dependencies and the unsigned part from a kernel module.

An x86 bzImage is a loader with a compressed ELF kernel as payload (kernel documentation, arch/x86/boot). Booting the
ELF kernel saves a quarter of a second under emulation. QEMU starts it at the entry point in its Xen PVH note; a kernel
without that note is not usable.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator

import lz4.block  # type: ignore[import-untyped]
import zstandard

_SETUP_SECTORS_AT = 0x1F1
_BOOT_FLAG_AT = 0x1FE
_HEADER_MAGIC_AT = 0x202
_HEADER_VERSION_AT = 0x206
_PAYLOAD_AT = 0x248
_FIRST_VERSION_WITH_PAYLOAD = 0x0208
_SECTOR = 512

_ELF_MAGIC = b"\x7fELF"
_ELF64_LITTLE_ENDIAN = b"\x02\x01"
_PT_NOTE = 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18

_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_LEGACY_BLOCK = 8 << 20
_ZSTD_WINDOW_MAX = 1 << 28
_KERNEL_BYTES_MAX = 512 << 20

_SIGNATURE_MARK = b"~Module signature appended~\n"
_SIGNATURE_INFO = struct.Struct(">8xI")
"""`struct module_signature` of include/linux/module_signature.h; it ends with the length of the signature before it."""


class UnreadableKernel(Exception):
    """The bytes are not a readable kernel or module."""


def is_kernel(head: bytes) -> bool:
    """Whether a file that begins with `head` (1 KiB) is a kernel that QEMU can boot."""
    return head.startswith(_ELF_MAGIC) or (
        head[_BOOT_FLAG_AT : _BOOT_FLAG_AT + 2] == b"\x55\xaa"
        and head[_HEADER_MAGIC_AT : _HEADER_MAGIC_AT + 4] == b"HdrS"
    )


def vmlinux(bzimage: bytes) -> bytes | None:
    """Return the ELF kernel in `bzimage`, or None if QEMU could not start it directly.

    Raises:
        UnreadableKernel: it is not a bzImage, or its payload is damaged.
    """
    if bzimage.startswith(_ELF_MAGIC) or not is_kernel(bzimage[:1024]):
        raise UnreadableKernel("it is not a bzImage")
    (version,) = struct.unpack_from("<H", bzimage, _HEADER_VERSION_AT)
    if version < _FIRST_VERSION_WITH_PAYLOAD:
        return None
    # 0 means 4, for old loaders.
    setup_sectors = bzimage[_SETUP_SECTORS_AT] or 4
    offset, length = struct.unpack_from("<II", bzimage, _PAYLOAD_AT)
    start = (setup_sectors + 1) * _SECTOR + offset
    payload = bzimage[start : start + length]
    if len(payload) < length:
        raise UnreadableKernel("its payload is truncated")
    kernel = decompress(payload)
    return kernel if _starts_as_pvh(kernel) else None


def decompress(data: bytes) -> bytes:
    """Decompress `data` by its signature; return it unchanged if unknown. Trailing data are ignored.

    Raises:
        UnreadableKernel: it is damaged or too large.
    """
    for magic, unpack in _UNPACKERS:
        if data.startswith(magic):
            try:
                return unpack(data)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, struct.error) as error:
                raise UnreadableKernel(f"its compressed part is damaged ({error})") from error
            except (zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
                raise UnreadableKernel(f"its compressed part is damaged ({error})") from error
    return data


def module_dependencies(module: bytes) -> tuple[str, ...]:
    """Return the names of the modules that a decompressed module depends on, with underscores.

    Raises:
        UnreadableKernel: it is not a 64-bit ELF object, or has no module information.
    """
    for field in _section(module, b".modinfo").split(b"\0"):
        if field.startswith(b"depends="):
            names = field.removeprefix(b"depends=").decode("ascii", "replace")
            return tuple(name.replace("-", "_") for name in names.split(",") if name)
    raise UnreadableKernel("the module has no dependency information")


def without_signature(module: bytes) -> bytes:
    """Return a decompressed module without the signature at its end, if it has one.

    Raises:
        UnreadableKernel: the signature is longer than the module.
    """
    if not module.endswith(_SIGNATURE_MARK):
        return module
    info = len(module) - len(_SIGNATURE_MARK) - _SIGNATURE_INFO.size
    length = _SIGNATURE_INFO.unpack_from(module, info)[0] if info >= 0 else 0
    if info < length:
        raise UnreadableKernel("the signature of the module is truncated")
    return module[: info - length]


def _unpack_lz4_legacy(data: bytes) -> bytes:
    # Blocks, followed by the total length, which the kernel's build appends.
    out = bytearray()
    position, end = len(_LZ4_LEGACY_MAGIC), len(data) - 4
    while position < end:
        (length,) = struct.unpack_from("<I", data, position)
        position += 4
        block = data[position : position + length]
        out += lz4.block.decompress(block, uncompressed_size=_LZ4_LEGACY_BLOCK)
        position += length
        if len(out) > _KERNEL_BYTES_MAX:
            raise ValueError("too large")
    return bytes(out)


def _unpack_zstd(data: bytes) -> bytes:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX).decompressobj()
    return unpacker.decompress(data)


def _unpack_gzip(data: bytes) -> bytes:
    return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data, _KERNEL_BYTES_MAX)


def _unpack_xz(data: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(data, _KERNEL_BYTES_MAX)


def _unpack_bzip2(data: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, _KERNEL_BYTES_MAX)


_UNPACKERS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (_LZ4_LEGACY_MAGIC, _unpack_lz4_legacy),
    (b"\x28\xb5\x2f\xfd", _unpack_zstd),
    (b"\x1f\x8b", _unpack_gzip),
    (b"\xfd7zXZ\0", _unpack_xz),
    (b"\x5d\x00\x00", _unpack_xz),
    (b"BZh", _unpack_bzip2),
)


def _require_elf64(data: bytes) -> None:
    if not data.startswith(_ELF_MAGIC) or data[4:6] != _ELF64_LITTLE_ENDIAN:
        raise UnreadableKernel("it is not a 64-bit ELF file")


def _starts_as_pvh(kernel: bytes) -> bool:
    try:
        return any(name == b"Xen\0" and kind == _XEN_ELFNOTE_PHYS32_ENTRY for name, kind in _notes(kernel))
    except (struct.error, OverflowError) as error:
        raise UnreadableKernel("its ELF headers point outside of it") from error


def _notes(elf: bytes) -> Iterator[tuple[bytes, int]]:
    _require_elf64(elf)
    (table,) = struct.unpack_from("<Q", elf, 0x20)
    entry_size, count = struct.unpack_from("<HH", elf, 0x36)
    for index in range(count):
        kind, _flags, offset, _, _, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry_size)
        if kind != _PT_NOTE:
            continue
        position, end = offset, offset + size
        while position + 12 <= end:
            name_size, value_size, note_kind = struct.unpack_from("<III", elf, position)
            yield elf[position + 12 : position + 12 + name_size], note_kind
            position += 12 + _aligned(name_size) + _aligned(value_size)


def _section(elf: bytes, wanted: bytes) -> bytes:
    _require_elf64(elf)
    try:
        (table,) = struct.unpack_from("<Q", elf, 0x28)
        entry_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
        entries = [struct.unpack_from("<IIQQQQ", elf, table + index * entry_size) for index in range(count)]
        names_at = entries[names_index][4]
    except (struct.error, IndexError, OverflowError) as error:
        raise UnreadableKernel("its ELF headers point outside of it") from error
    for name, _kind, _flags, _address, offset, size in entries:
        if elf.startswith(wanted + b"\0", names_at + name):
            return elf[offset : offset + size]
    raise UnreadableKernel(f"it has no section {wanted.decode()}")


def _aligned(size: int) -> int:
    return (size + 3) & ~3
