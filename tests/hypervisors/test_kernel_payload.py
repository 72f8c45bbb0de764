"""What a guest is made of: a kernel and modules taken apart, and the archive that it starts from."""

from __future__ import annotations

import struct
import zlib

import pytest

from interlock.guests import initramfs, small_guest
from interlock.images import kernel_payload


def elf_module(name: str, *depends: str) -> bytes:
    """The least that a module must be: an ELF file with the section in which it tells of itself."""
    info = f"name={name}\0depends={','.join(depends)}\0".encode()
    names = b"\0.modinfo\0.names\0"
    sections = [(0, 0, 0), (1, 64, len(info)), (10, 64 + len(info), len(names))]
    table = b"".join(struct.pack("<IIQQQQIIQQ", at, 1, 0, 0, start, size, 0, 0, 1, 0) for at, start, size in sections)
    head = b"\x7fELF\x02\x01".ljust(0x28, b"\0") + struct.pack(
        "<QIHHHHHH", 64 + len(info) + len(names), 0, 64, 0, 0, 64, 3, 2
    )
    return head + info + names + table


def test_an_archive_is_what_the_kernels_documentation_describes() -> None:
    entries = [initramfs.folder("a"), initramfs.file("a/b", b"xyz", permissions=0o755), initramfs.link("c", "a/b")]
    archive = initramfs.archive(entries)
    assert len(archive) % 512 == 0
    found = []
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[position + 6 + 8 * n : position + 14 + 8 * n], 16) for n in range(13)]
        name = archive[position + 110 : position + 110 + fields[11] - 1].decode()
        position = (position + 110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            break
        found.append((name, oct(fields[1]), archive[position : position + fields[6]]))
        position = (position + fields[6] + 3) & ~3
    assert found == [("a", "0o40755", b""), ("a/b", "0o100755", b"xyz"), ("c", "0o120777", b"a/b")]


def test_a_module_says_what_it_needs_also_when_it_is_compressed() -> None:
    module = elf_module("virtio_net", "virtio", "net-failover")
    packed = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    for data in (module, packed.compress(module) + packed.flush()):
        assert kernel_payload.module_dependencies(kernel_payload.decompress(data)) == ("virtio", "net_failover")


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 100, b"\x7fELF\x02\x01" + bytes(100), b"MZ" + bytes(2000)]
)
def test_a_damaged_module_is_unreadable_and_nothing_else(data: bytes) -> None:
    with pytest.raises(kernel_payload.UnreadableKernel):
        kernel_payload.module_dependencies(data)


def test_a_module_is_read_without_the_signature_at_its_end() -> None:
    module = elf_module("virtio")
    mark = b"~Module signature appended~\n"
    signed = module + b"signature" + struct.pack(">8BI", 0, 0, 2, 0, 0, 0, 0, 0, len(b"signature")) + mark
    assert kernel_payload.without_signature(signed) == module
    assert kernel_payload.without_signature(module) == module
    for damaged in (mark, signed[len(module) + 1 :]):
        with pytest.raises(kernel_payload.UnreadableKernel):
            kernel_payload.without_signature(damaged)


@pytest.mark.parametrize(
    "payload", [b"\x1f\x8b" + b"x" * 50, b"\x02\x21\x4c\x18\xff\xff\xff\x7fxxxx", b"\xfd7zXZ\0xxxx", b"xx"]
)
def test_a_damaged_kernel_is_unreadable_and_nothing_else(payload: bytes) -> None:
    kernel = bytearray(1024 + 512)
    kernel[0x1F1], kernel[0x1FE:0x200], kernel[0x202:0x206] = 1, b"\x55\xaa", b"HdrS"
    struct.pack_into("<H", kernel, 0x206, 0x20F)
    struct.pack_into("<II", kernel, 0x248, 0, len(payload))
    kernel[1024 : 1024 + len(payload)] = payload
    with pytest.raises(kernel_payload.UnreadableKernel):
        kernel_payload.vmlinux(bytes(kernel))


def test_modules_are_loaded_after_what_they_need() -> None:
    modules = {
        "virtio_blk": elf_module("virtio_blk", "virtio"),
        "virtio": elf_module("virtio"),
        "virtio_pci": elf_module("virtio_pci", "virtio"),
    }
    assert list(small_guest._in_loading_order(modules)) == ["virtio", "virtio_pci", "virtio_blk"]
