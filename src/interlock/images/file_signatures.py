"""Detects files that are not disk images by their signatures: archives, compressed files, file systems, kernels, text.

Reads the first `HEAD_BYTES` and last `TAIL_BYTES` bytes of a file. Signatures are from the formats' specifications and
the database of `file`.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

HEAD_BYTES: Final = 68 << 10
"""Includes the superblock of Btrfs at 64 KiB."""
TAIL_BYTES: Final = 512
_BOOT_SIGNATURE_AT: Final = 510
_BOOT_SIGNATURE: Final = b"\x55\xaa"
_GPT_SIGNATURE: Final = b"EFI PART"
_GPT_HEADERS_AT: Final = (512, 4096)
"""The second sector of disks with 512- and 4,096-byte sectors."""
_TAR_MAGIC_AT: Final = 257
_TEXT_BYTES: Final = 4096
_PROGRAM_BYTES_MIN: Final = 64


class Foreign(msgspec.Struct, frozen=True):
    """The detected type of a file that is not a disk image."""

    name: str
    """With its article: `a tar archive`."""
    remedy: str


class _Signature(msgspec.Struct, frozen=True):
    at: int
    magic: bytes
    name: str
    remedy: str


_UNPACK: Final = "Unpack it, and give the disk image that is in it."
_RAW: Final = "To use it as a raw disk all the same, add `--format raw`."
_QEMU: Final = "Convert it: `qemu-img convert -f {} -O qcow2 FILE NEW.qcow2`."
_KERNEL: Final = "Boot it directly instead: `interlock image add NAME --kernel FILE`, with `--initrd` if it has one."

COMPRESSIONS: Final = {
    "gzip": (b"\x1f\x8b\x08",),
    "xz": (b"\xfd7zXZ\0",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([low]) + b"\x2a\x4d\x18" for low in range(0x50, 0x60))),
    "bzip2": tuple(b"BZh%d" % level + block for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
}
"""The signatures of the compressions that are supported."""

_CERTAIN: Final = (
    _Signature(_TAR_MAGIC_AT, b"ustar", "a tar archive", "Unpack it (`tar -xf FILE`), and give the disk image in it."),
    _Signature(0, b"PK\x03\x04", "a zip archive", "Unpack it (`unzip FILE`), and give the disk image that is in it."),
    _Signature(0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    _Signature(0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it (`7z x FILE`), and give the disk image in it."),
    _Signature(0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    _Signature(0, b"MSCF\0\0\0\0", "a cabinet archive", _UNPACK),
    _Signature(0, b"MSWIM\0\0\0", "a Windows imaging (WIM) archive", "Give a disk onto which Windows was installed."),
    _Signature(0, b"!<arch>\n", "an ar archive, such as a Debian package", _UNPACK),
    _Signature(0, b"\xed\xab\xee\xdb", "an RPM package", _UNPACK),
    _Signature(0, b"070701", "a cpio archive, such as an initrd", _KERNEL),
    _Signature(0, b"070702", "a cpio archive, such as an initrd", _KERNEL),
    _Signature(0, b"070707", "a cpio archive, such as an initrd", _KERNEL),
    _Signature(0, b"\x04\x22\x4d\x18", "compressed with lz4", "Decompress it (`lz4 -d FILE`), and give what is in it."),
    _Signature(0, b"\x02\x21\x4c\x18", "compressed with lz4", "Decompress it (`lz4 -d FILE`), and give what is in it."),
    _Signature(0, b"\x89LZO\0\r\n\x1a\n", "compressed with lzop", "Decompress it (`lzop -d FILE`)."),
    _Signature(0, b"LZIP", "compressed with lzip", "Decompress it (`lzip -d FILE`), and give what is in it."),
    _Signature(0, b"LRZI", "compressed with lrzip", "Decompress it (`lrunzip FILE`), and give what is in it."),
    _Signature(0, b"\x5d\x00\x00", "compressed with lzma", "Decompress it (`unlzma FILE`), and give what is in it."),
    _Signature(0, b"\x1f\x9d", "compressed with compress", "Decompress it (`gzip -d FILE`), and give what is in it."),
    _Signature(0, b"\x3a\xff\x26\xed", "an Android sparse image", "Convert it: `simg2img FILE NEW.raw`."),
    _Signature(0, b"COWD", "a VMDK image of ESX's old sparse kind", _QEMU.format("vmdk")),
    _Signature(0, b"WithoutFreeSpace", "a Parallels image", _QEMU.format("parallels")),
    _Signature(0, b"WithouFreSpacExt", "a Parallels image", _QEMU.format("parallels")),
    _Signature(0, b"QED\0", "a qed image", _QEMU.format("qed")),
    _Signature(0, b"Bochs Virtual HD Image", "a Bochs image", _QEMU.format("bochs")),
    _Signature(0, b"#!/bin/sh\n#V2.0 Format\n", "a cloop image", _QEMU.format("cloop")),
    _Signature(0, b"VMA\0", "a Proxmox backup (VMA)", "Extract it with `vma extract FILE FOLDER`, and give its disk."),
    _Signature(0, b"EVF\x09\x0d\x0a\xff\0", "an EnCase image", "Convert it to raw with `ewfexport`."),
    _Signature(0, b"QEVM", "the saved memory of a QEMU guest", "Give the disk of that guest."),
    _Signature(0, b"SQLite format 3\0", "an SQLite database", "Give a disk image."),
    _Signature(0, b"%PDF-", "a PDF document", "Give a disk image."),
    _Signature(0, b"\x89PNG\r\n\x1a\n", "a picture", "Give a disk image."),
    _Signature(0, b"\xff\xd8\xff", "a picture", "Give a disk image."),
    _Signature(514, b"HdrS", "a Linux kernel", _KERNEL),
    _Signature(0, b"\x7fELF", "an ELF program or kernel", _KERNEL),
)
"""Signatures that no disk begins with, whatever its boot sector is."""

_WITHOUT_BOOT_SECTOR: Final = (
    _Signature(0, b"hsqs", "a SquashFS file system", _RAW),
    _Signature(0, b"XFSB", "an XFS file system without a boot sector", _RAW),
    _Signature(1080, b"\x53\xef", "an ext4 (or ext2, ext3) file system without a boot sector", _RAW),
    _Signature(1024, b"\x10\x20\xf5\xf2", "an F2FS file system without a boot sector", _RAW),
    _Signature(1024, b"\xe2\xe1\xf5\xe0", "an EROFS file system without a boot sector", _RAW),
    _Signature(65_600, b"_BHRfS_M", "a Btrfs file system without a boot sector", _RAW),
    _Signature(512, b"LABELONE", "an LVM physical volume without a boot sector", _RAW),
    _Signature(4086, b"SWAPSPACE2", "swap space", _RAW),
    _Signature(4086, b"SWAP-SPACE", "swap space", _RAW),
    _Signature(32_769, b"BEA01", "a UDF disc", "Make an ISO 9660 image of it; `interlock image add` takes those."),
    _Signature(0, b"-----BEGIN PGP", "a signature", "Give the file that was signed."),
)
"""Signatures that do not boot, and can be the beginning of a disk."""


def compression_of(head: bytes) -> str | None:
    """Return the compression of a stream by its first bytes, if it is supported."""
    return next((name for name, magics in COMPRESSIONS.items() if head.startswith(magics)), None)


def is_tar(head: bytes) -> bool:
    return head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar"


def has_boot_sector(head: bytes) -> bool:
    """Whether firmware would try to boot a disk that begins so."""
    signed = head[_BOOT_SIGNATURE_AT : _BOOT_SIGNATURE_AT + 2] == _BOOT_SIGNATURE
    return signed or any(head[at : at + 8] == _GPT_SIGNATURE for at in _GPT_HEADERS_AT)


def certainly_foreign(head: bytes, tail: bytes) -> Foreign | None:
    """What the file is, if it is something that can be no disk. `tail` is empty while it is not known."""
    for one in _CERTAIN:
        if _matches(head, one):
            return Foreign(one.name, one.remedy)
    if compression := compression_of(head):
        return Foreign(f"compressed with {compression}", "Decompress it, and give what is in it.")
    if _is_program(head):
        return Foreign("a Windows or EFI program", "Give a disk image; a kernel is given with `--kernel`.")
    if tail.startswith(b"koly") and len(tail) == TAIL_BYTES:
        return Foreign("an Apple disk image (DMG)", _QEMU.format("dmg"))
    if b"conectix" in tail[:9]:
        return Foreign(
            "a VHD image whose footer does not fit it",
            "See that the file is complete; if it is, convert it: `qemu-img convert -f vpc -O qcow2 FILE NEW.qcow2`.",
        )
    return _text(head)


def probably_foreign(head: bytes) -> Foreign | None:
    """What a file without a boot sector is, if it is something that has a name."""
    for one in _WITHOUT_BOOT_SECTOR:
        if _matches(head, one):
            return Foreign(one.name, one.remedy)
    return Foreign("blank at its beginning", _RAW) if not any(head) else None


def _matches(head: bytes, one: _Signature) -> bool:
    return head[one.at : one.at + len(one.magic)] == one.magic


def _is_program(head: bytes) -> bool:
    if not head.startswith(b"MZ") or len(head) < _PROGRAM_BYTES_MIN:
        return False
    at = int.from_bytes(head[60:64], "little")
    return head[at : at + 4] == b"PE\0\0"


def _text(head: bytes) -> Foreign | None:
    bare = head.rstrip(b"\0")
    # A character that takes several bytes may be cut in two at the end of what is looked at.
    text = bare[:_TEXT_BYTES].decode("utf-8", "ignore")
    if len(text.encode()) < min(len(bare), _TEXT_BYTES) - 3 or re.search(r"[^\t\n\f\r\x1b -\x7e\x80-\U0010ffff]", text):
        return None
    said = text.removeprefix("\ufeff").lstrip().lower()
    if "disk descriptorfile" in said or any(re.match(r"createtype\s*=", line.strip()) for line in said.splitlines()):
        return Foreign(
            "a VMDK descriptor, whose content is in other files",
            "Convert it where those are: `qemu-img convert -f vmdk -O qcow2 FILE NEW.qcow2`.",
        )
    if len(bare) < len(head):  # qemu-img fills the last sector of a descriptor; other texts are not filled
        return None
    if said.startswith(("<!doctype html", "<html", "<head")):
        return Foreign(
            "an HTML page", "See what it says: it may be an error, or a page to log in, instead of the image."
        )
    if "<envelope" in said or ":envelope" in said:
        return Foreign("an OVF description", "Give the OVA, or the disk that it names.")
    if said.startswith(("<?xml", "<")):
        return Foreign("an XML document", "See what it says: it may be an error instead of the image.")
    if said.startswith(("{", "[")):
        return Foreign("a JSON document", "See what it says: it may be an error instead of the image.")
    return Foreign("a text", "See what it says: it may be an error, or a list of sums, instead of the image.")
