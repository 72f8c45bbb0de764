"""Writes an initramfs: a reproducible "newc" cpio archive (driver-api/early-userspace/buffer-format)."""

from __future__ import annotations

import stat
from collections.abc import Iterable

import msgspec

_ALIGNMENT = 4
_BLOCK = 512
_TRAILER = "TRAILER!!!"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A file, folder, symbolic link or device, owned by root, with the time 0."""

    path: str
    """Without a leading slash. Parent folders come before it in the list."""
    mode: int
    """As `stat.st_mode`."""
    data: bytes = b""
    """The content, or a symbolic link's target."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number."""


def folder(path: str) -> Entry:
    return Entry(path=path, mode=stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, *, permissions: int = 0o644) -> Entry:
    return Entry(path=path, mode=stat.S_IFREG | permissions, data=data)


def link(path: str, target: str) -> Entry:
    return Entry(path=path, mode=stat.S_IFLNK | 0o777, data=target.encode())


def character_device(path: str, major: int, minor: int) -> Entry:
    return Entry(path=path, mode=stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the entries as an uncompressed cpio archive, in order."""
    out = bytearray()
    for number, entry in enumerate(entries, start=1):
        _append(out, entry, number)
    _append(out, Entry(path=_TRAILER, mode=0), 0)
    _pad(out, _BLOCK)
    return bytes(out)


def _append(out: bytearray, entry: Entry, number: int) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    owner = group = modified = device_major = device_minor = checksum = 0
    fields = (
        number,
        entry.mode,
        owner,
        group,
        links,
        modified,
        len(entry.data),
        device_major,
        device_minor,
        *entry.device,
        len(name),
        checksum,
    )
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    _pad(out, _ALIGNMENT)
    out += entry.data
    _pad(out, _ALIGNMENT)


def _pad(out: bytearray, alignment: int) -> None:
    out += bytes(-len(out) % alignment)
