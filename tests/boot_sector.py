"""A disk that boots: 512 bytes of real-mode code that say on the serial console which disk they came from.

For tests of what a guest boots; it then halts. Nothing here knows a hypervisor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from interlock.core.records import Image

SECTOR_BYTES: Final = 512

_LOADED_AT: Final = 0x7C00
_SAY = bytes.fromhex(
    "31c08ed8"  # xor ax, ax; mov ds, ax
    "be157c"  # mov si, text
    "ac84c07406"  # next: lodsb; test al, al; jz end
    "baf803ee"  # mov dx, 0x3f8; out dx, al
    "ebf5"  # jmp next
    "f4ebfd"  # end: hlt; jmp end
)
_TABLE_AT: Final = 446
_PARTITION = bytes.fromhex("80000200 83000200 01000000 01000000")
"""One sector of Linux behind the first: without a valid table of partitions the server refuses the disk."""
_SIGNATURE: Final = b"\x55\xaa"


def boot_sector(text: str) -> bytes:
    """The first sector of a disk that says `text`, at most 400 characters of ASCII, and halts."""
    code = _SAY + text.encode("ascii") + b"\r\n\0"
    assert len(code) <= _TABLE_AT
    return _sector(code)


def _sector(code: bytes) -> bytes:
    return (code.ljust(_TABLE_AT, b"\0") + _PARTITION).ljust(SECTOR_BYTES - len(_SIGNATURE), b"\0") + _SIGNATURE


_WRITE = bytes.fromhex(
    "31c08ed8"  # xor ax, ax; mov ds, ax
    "be317cb80043b280cd13"  # next: mov si, packet; mov ax, 0x4300; mov dl, 0x80; int 0x13 (extended write)
    "721a"  # jc end
    "b077baf803ee"  # mov al, 'w'; mov dx, 0x3f8; out dx, al
    "668106397c7f000000"  # add dword [packet + 8], 127
    "66813e397c00002000"  # cmp dword [packet + 8], 1 GiB in sectors
    "72da"  # jb next
    "f4ebfd"  # end: hlt; jmp end
    "90909090"
    "10007f0000000010"  # packet: 127 sectors from 0x1000:0
    "8000000000000000"  # to sector 128
)


def writing_image(folder: Path, name: str) -> Image:
    """A disk that boots, and goes on writing to itself: a `w` on the console for each 63.5 KiB, up to 1 GiB."""
    path = folder / f"{name}.raw"
    with path.open("wb") as disk:
        disk.write(_sector(_WRITE))
        disk.truncate(1 << 30)
    path.chmod(0o644)
    return Image(id=name, name=name, kind="disk", format="raw", path=str(path), size_bytes=1 << 30, sha256="")


def bootable_image(folder: Path, name: str, size_bytes: int = 1 << 20) -> Image:
    """Write a raw disk that boots and says `booted NAME`, and return it as an image of kind `disk`."""
    path = folder / f"{name}.raw"
    with path.open("wb") as disk:
        disk.write(boot_sector(f"booted {name}"))
        disk.truncate(size_bytes)
    path.chmod(0o644)
    return Image(id=name, name=name, kind="disk", format="raw", path=str(path), size_bytes=size_bytes, sha256="")
