"""A raw disk that boots a Linux kernel with a BIOS: boot sector, partition table, kernel and initrd. Pure: no I/O.

There is no file system on the disk: the boot sector has the position of each part and its address in memory. The kernel
is started by the 16-bit boot protocol of Linux on x86 (the kernel's documentation, arch/x86/boot), whose fields are set
here.

The second MiB of the disk is free: guests write there what a test reads (`small_guest_files`).
"""

from __future__ import annotations

import struct
from typing import Final

from interlock.images.kernel_payload import UnreadableKernel, is_kernel

PARTITION_AT: Final = 2 << 20
"""Offset of the only partition, in bytes; the MiB before it is free."""

_SECTOR: Final = 512
_CHUNK: Final = 32 << 10
"""Bytes that the boot sector reads at a time; every part is a multiple."""
_MIB: Final = 1 << 20

# ------------------------------------------------------------------------------------------------- the boot sector

_CODE: Final = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0"  # xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax
    "bc007c fc"  # mov sp, 0x7c00; cld
    "8816207d"  # mov [drive], dl
    "b801e8 cd15"  # mov ax, 0xe801; int 0x15: bx is the memory above 16 MiB, in blocks of 64 KiB
    "be607d 3b1e227d 726b"  # mov si, too_little; cmp bx, [blocks_needed]; jb say
    "bb307d"  # mov bx, parts
    "668b07 66a3187d"  # chunk: mov eax, [bx]; mov [packet.sector], eax
    "be107d 8a16207d b442 cd13"  # mov si, packet; mov dl, [drive]; mov ah, 0x42; int 0x13: read
    "be987d 7251"  # mov si, unreadable; jc say
    "668b4704 a3f27c"  # mov eax, [bx+4]; mov [to.base], ax
    "66c1e810 a2f47c 8826f77c"  # shr eax, 16; mov [to.base+2], al; mov [to.base+5], ah
    "bed87c b90040 b487 cd15"  # mov si, table; mov cx, 0x4000; mov ah, 0x87; int 0x15: move to extended memory
    "be987d 7230"  # mov si, unreadable; jc say
    "66830740 66814704 00800000"  # add dword [bx], 64; add dword [bx+4], 32768
    "ff4f08 75b7"  # dec word [bx+8]; jnz chunk
    "83c30c 81fb547d 72ae"  # add bx, 12; cmp bx, end of parts; jb chunk
    "b80090 fa 8ed0 bc0070"  # mov ax, 0x9000; cli; mov ss, ax; mov sp, 0x7000
    "8ed8 8ec0 8ee0 8ee8"  # mov ds, ax; mov es, ax; mov fs, ax; mov gs, ax
    "ea00002090"  # jmp 0x9020:0
    "ac 84c0 7406"  # say: lodsb; test al, al; jz halt
    "baf803 ee ebf5"  # mov dx, 0x3f8; out dx, al; jmp say
    "f4 ebfd"  # halt: hlt; jmp halt
)
_TABLE_AT: Final = 0xD8
"""Offset of the code's data in the sector, which is loaded at 0x7c00."""
_PACKET_AT: Final = 0x110
_BLOCKS_NEEDED_AT: Final = 0x122
_PARTS_AT: Final = 0x130
_TOO_LITTLE_AT: Final = 0x160
_UNREADABLE_AT: Final = 0x198
_PARTITIONS_AT: Final = 0x1BE
_SIGNATURE_AT: Final = 0x1FE

_BUFFER: Final = 0x10000
_DESCRIPTORS: Final = struct.Struct("<16x HHBBH HHBBH 16x")
_WRITABLE_DATA: Final = 0x93
_READ_PACKET: Final = struct.Struct("<BxHHHQ")
_PART: Final = struct.Struct("<IIHxx")
_PARTITION: Final = struct.Struct("<B3sB3sII")
_NO_FILE_SYSTEM: Final = 0xDA
_BEYOND_CYLINDERS: Final = b"\xfe\xff\xff"
_BLOCK: Final = 64 << 10
_BLOCKS_FROM: Final = 16 << 20

_TOO_LITTLE: Final = b"interlock: too little memory to boot this disk\r\n\0"
_UNREADABLE: Final = b"interlock: the disk is unreadable\r\n\0"

# -------------------------------------------------------------------------------------------------- the kernel's part

_SETUP_TO: Final = 0x90000
_SETUP_MAX: Final = 0x6000
_STACK_END: Final = 0x7000
"""End of the setup's heap and stack, and start of the command line, relative to the setup."""
_CMDLINE_MAX: Final = 0xFFF
_KERNEL_TO: Final = 0x100000
_VERSION_WITH_INIT_SIZE: Final = 0x020A
_UNKNOWN_LOADER: Final = 0xFF
_CAN_USE_HEAP: Final = 0x80
_NORMAL_SCREEN: Final = 0xFFFF


def image(kernel: bytes, initrd: bytes, cmdline: str) -> bytes:
    """Return a disk, a multiple of 1 MiB, that boots a bzImage `kernel`.

    Raises:
        UnreadableKernel: it is not a bzImage, or one that this cannot boot.
    """
    if not is_kernel(kernel[:1024]) or kernel.startswith(b"\x7fELF"):
        raise UnreadableKernel("it is not a bzImage")
    (version,) = struct.unpack_from("<H", kernel, 0x206)
    if version < _VERSION_WITH_INIT_SIZE:
        raise UnreadableKernel("it does not say how much memory it needs")
    setup_size = ((kernel[0x1F1] or 4) + 1) * _SECTOR
    if setup_size > _SETUP_MAX or len(cmdline) > _CMDLINE_MAX:
        raise UnreadableKernel("its setup or its command line is too long")
    # Behind the memory that the kernel decompresses itself into.
    preferred, init_size = struct.unpack_from("<QI", kernel, 0x258)
    initrd_to = _aligned(max(preferred + init_size, _KERNEL_TO + len(kernel)), _MIB)
    setup = _setup(kernel[:setup_size], cmdline, initrd_to, len(initrd))
    parts = ((_padded(setup), _SETUP_TO), (_padded(kernel[setup_size:]), _KERNEL_TO), (_padded(initrd), initrd_to))
    content = b"".join(part for part, _ in parts)
    content = content.ljust(_aligned(len(content), _MIB), b"\0")
    return _boot_sector(parts, len(content)).ljust(PARTITION_AT, b"\0") + content


def _setup(setup: bytes, cmdline: str, initrd_to: int, initrd_size: int) -> bytes:
    """Return the real-mode part of the kernel with its header set, and the command line after its stack."""
    params = bytearray(setup.ljust(_STACK_END, b"\0"))
    struct.pack_into("<H", params, 0x1FA, _NORMAL_SCREEN)
    params[0x210] = _UNKNOWN_LOADER
    params[0x211] |= _CAN_USE_HEAP
    struct.pack_into("<II", params, 0x218, initrd_to, initrd_size)
    struct.pack_into("<H", params, 0x224, _STACK_END - 0x200 - 0x400)
    struct.pack_into("<I", params, 0x228, _SETUP_TO + _STACK_END)
    return bytes(params) + cmdline.encode("ascii") + b"\0"


def _boot_sector(parts: tuple[tuple[bytes, int], ...], partition_size: int) -> bytes:
    sector = bytearray(_SECTOR)
    sector[: len(_CODE)] = _CODE
    _DESCRIPTORS.pack_into(
        sector,
        _TABLE_AT,
        *(0xFFFF, _BUFFER & 0xFFFF, _BUFFER >> 16, _WRITABLE_DATA, 0),
        *(0xFFFF, 0, 0, _WRITABLE_DATA, 0),
    )
    _READ_PACKET.pack_into(sector, _PACKET_AT, _READ_PACKET.size, _CHUNK // _SECTOR, 0, _BUFFER >> 4, 0)
    position = PARTITION_AT
    for index, (part, to) in enumerate(parts):
        _PART.pack_into(sector, _PARTS_AT + index * _PART.size, position // _SECTOR, to, len(part) // _CHUNK)
        position += len(part)
    part, to = parts[-1]
    needed = _aligned(to + len(part) - _BLOCKS_FROM, _BLOCK) // _BLOCK
    struct.pack_into("<H", sector, _BLOCKS_NEEDED_AT, needed)
    sector[_TOO_LITTLE_AT : _TOO_LITTLE_AT + len(_TOO_LITTLE)] = _TOO_LITTLE
    sector[_UNREADABLE_AT : _UNREADABLE_AT + len(_UNREADABLE)] = _UNREADABLE
    where = (PARTITION_AT // _SECTOR, partition_size // _SECTOR)
    _PARTITION.pack_into(sector, _PARTITIONS_AT, 0x80, _BEYOND_CYLINDERS, _NO_FILE_SYSTEM, _BEYOND_CYLINDERS, *where)
    sector[_SIGNATURE_AT:] = b"\x55\xaa"
    return bytes(sector)


def _padded(part: bytes) -> bytes:
    """Pad to whole chunks, at least one: the boot sector counts down from their number."""
    return part.ljust(max(_aligned(len(part), _CHUNK), _CHUNK), b"\0")


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
