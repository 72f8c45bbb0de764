"""The image folder: what is let in, what is refused and why, and what a crash leaves."""
# ruff: noqa: ASYNC221, ASYNC222, ASYNC240 - a test has the loop to itself

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interlock.core.errors import Invalid, StoreFull
from interlock.images import atomic_files
from interlock.images.image_folder import ImageFolder
from tiers import tier

QCOW2_MAGIC = b"QFI\xfb"
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def qcow2_header(
    *, version: int = 3, backing_at: int = 0, size: int = 1 << 20, features: int = 0, encryption: int = 0
) -> bytes:
    """The beginning of a qcow2 file, sound only as far as an inspector reads."""
    head = struct.pack(">4sIQIIQIIQQIIQ", QCOW2_MAGIC, version, backing_at, 0, 16, size, encryption, 1, 0x30000,
                       0x10000, 1, 0, 0)  # fmt: skip
    head += struct.pack(">QQQII", features, 0, 0, 4, 104)
    return head.ljust(0x40000, b"\0")


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    return ImageFolder(tmp_path / "images")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x01" * 510 + b"\x55\xaa" + bytes(4 << 20) + b"\x02" * 512)
    return path


def kept(images: ImageFolder) -> list[str]:
    return sorted(path.name for path in images._folder.iterdir())


def make_qcow2(path: Path, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "8M"], check=True)
    return path


async def test_a_raw_disk_is_copied_whole_readable_by_a_guests_process_and_sparse(
    images: ImageFolder, raw: Path
) -> None:
    image = await images.bring_disk("i1", "disk", raw)
    path = Path(image.path)
    assert path.read_bytes() == raw.read_bytes()
    assert (image.kind, image.format, image.size_bytes) == ("disk", "raw", raw.stat().st_size)
    assert image.sha256 == hashlib.sha256(raw.read_bytes()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.parent.stat().st_mode & 0o777 == 0o711
    assert path.stat().st_blocks * 512 < path.stat().st_size / 2
    assert kept(images) == ["i1.raw"]


async def test_a_disk_that_ends_in_zeros_keeps_its_length(images: ImageFolder, tmp_path: Path) -> None:
    source = tmp_path / "zeros.img"
    source.write_bytes(bytes((3 << 20) + 512))
    image = await images.bring_disk("i1", "disk", source, claimed="raw")
    assert Path(image.path).stat().st_size == source.stat().st_size


@needs_qemu_img
async def test_a_qcow2_disk_has_the_size_that_the_guest_sees(images: ImageFolder, tmp_path: Path) -> None:
    image = await images.bring_disk("i1", "disk", make_qcow2(tmp_path / "a.img"))
    assert (image.format, image.size_bytes) == ("qcow2", 8 << 20)


@needs_qemu_img
async def test_a_backing_file_is_refused_by_name(images: ImageFolder, tmp_path: Path) -> None:
    make_qcow2(tmp_path / "base.qcow2")
    bad = make_qcow2(tmp_path / "bad.qcow2", "-b", str(tmp_path / "base.qcow2"), "-F", "qcow2")
    with pytest.raises(Invalid, match="backing file"):
        await images.bring_disk("i1", "disk", bad)
    assert kept(images) == []


@needs_qemu_img
async def test_an_external_data_file_is_refused_by_name(images: ImageFolder, tmp_path: Path) -> None:
    bad = make_qcow2(tmp_path / "bad.qcow2", "-o", f"data_file={tmp_path / 'data.raw'}")
    with pytest.raises(Invalid, match="data file"):
        await images.bring_disk("i1", "disk", bad)
    assert kept(images) == []


@needs_qemu_img
@pytest.mark.parametrize("form", ["qed"])
async def test_another_format_is_refused_by_its_name_whatever_the_file_is_called(
    images: ImageFolder, tmp_path: Path, form: str
) -> None:
    source = tmp_path / "disk.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(source), "8M"], check=True)
    with pytest.raises(Invalid, match=f"this is a {form} image"):
        await images.bring_disk("i1", "disk", source)
    assert kept(images) == []


@needs_qemu_img
async def test_what_the_inspector_passes_and_qemu_cannot_open_is_refused(images: ImageFolder, tmp_path: Path) -> None:
    source = tmp_path / "disk.qcow2"
    source.write_bytes(qcow2_header(size=1 << 40))
    with pytest.raises(Invalid, match="QEMU cannot use the image"):
        await images.bring_disk("i1", "disk", source)
    assert kept(images) == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("disk.qcow2", qcow2_header(features=1 << 9), "features"),
        ("disk.qcow2", qcow2_header(version=7), "version 7"),
        ("disk.qcow2", qcow2_header(size=1 << 60), "invalid disk size"),
        ("disk.qcow2", qcow2_header(size=0), "invalid disk size"),
        ("disk.raw", qcow2_header(), "contains a qcow2 image"),
        ("disk.qcow2", bytes(1024), "contains a raw image"),
        ("disk.vmdk", bytes(1024), "contains a raw image"),
        ("disk.img", qcow2_header()[:200], "truncated"),
        ("disk.img", bytes(1000), "blank at its beginning"),
        ("disk.img", b"", "empty"),
    ],
)
async def test_what_is_not_what_it_claims_is_refused_and_leaves_nothing(
    images: ImageFolder, tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    source = tmp_path / name
    source.write_bytes(content)
    with pytest.raises(Invalid, match=why):
        await images.bring_disk("i1", "disk", source)
    assert kept(images) == []


async def test_only_a_file_is_opened_and_links_are_not_followed(images: ImageFolder, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(raw)
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, why in {
            "link": "symbolic link",
            "pipe": "pipe",
            "socket": "not a file",
            "images": "folder",
            "nothing": "no such file",
        }.items():
            with pytest.raises(Invalid, match=why):
                await images.bring_disk("i1", "disk", tmp_path / name)
    with pytest.raises(Invalid, match="device"):
        await images.bring_disk("i1", "disk", Path("/dev/zero"))
    with pytest.raises(Invalid):
        await images.bring_disk("i1", "disk", Path("a\0b"))


async def test_a_wrong_sum_is_refused_with_the_right_one(images: ImageFolder, raw: Path) -> None:
    right = hashlib.sha256(raw.read_bytes()).hexdigest()
    with pytest.raises(Invalid, match=right):
        await images.bring_disk("i1", "disk", raw, "0" * 64)
    with pytest.raises(Invalid, match="64 hexadecimal"):
        await images.bring_disk("i1", "disk", raw, "0" * 63)
    assert kept(images) == []
    assert (await images.bring_disk("i1", "disk", raw, right.upper())).sha256 == right


@pytest.mark.parametrize("bad", ["", "../x", "a/b", ".hidden", "x" * 65, "a\n"])
async def test_an_id_never_leads_out_of_the_folder(images: ImageFolder, raw: Path, bad: str) -> None:
    with pytest.raises(Invalid):
        await images.bring_disk(bad, "disk", raw)


@pytest.mark.parametrize("bad", ["", "../x", "a b", ".hidden", "x" * 64, "a\n"])
async def test_a_bad_name_is_refused(images: ImageFolder, raw: Path, bad: str) -> None:
    with pytest.raises(Invalid, match="name"):
        await images.bring_disk("i1", bad, raw)


async def test_an_image_is_never_written_over(images: ImageFolder, raw: Path, tmp_path: Path) -> None:
    first = await images.bring_disk("i1", "disk", raw)
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(510) + b"\x55\xaa")
    with pytest.raises(Invalid, match="already"):
        await images.bring_disk("i1", "disk", other)
    assert Path(first.path).read_bytes() == raw.read_bytes()
    assert kept(images) == ["i1.raw"]


async def test_a_full_disk_keeps_nothing(images: ImageFolder, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(StoreFull):
        await images.bring_disk("i1", "disk", raw)
    assert kept(images) == []


async def test_what_a_crash_left_is_gone_after_the_next_start(images: ImageFolder, raw: Path, tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            atomic_files.make_folder(images._folder)
            atomic_files.DraftFile(images._folder, mode=0o640).__enter__().append(b"half")
        finally:
            os._exit(9)
    os.waitpid(pid, 0)
    assert len(kept(images)) == 1
    await images.bring_disk("i1", "disk", raw)
    assert kept(images) == ["i1.raw"]
    again = ImageFolder(images._folder)
    await again.bring_disk("i2", "disk", raw)
    assert again.sweep({"i1"}) == ("i2.raw",)
    assert kept(again) == ["i1.raw"]


async def test_a_kernel_needs_to_be_one(images: ImageFolder, tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(b"\x7fELF" + bytes(2000))
    initrd.write_bytes(b"070701" + bytes(200))
    image = await images.bring_kernel("k1", "kernel", kernel, initrd, "console=ttyS0")
    assert image.initrd is not None
    assert Path(image.initrd).read_bytes() == initrd.read_bytes()
    assert (image.kind, image.cmdline) == ("kernel", "console=ttyS0")
    with pytest.raises(Invalid, match="not a kernel"):
        await images.bring_kernel("k2", "kernel", initrd, initrd, "")
    with pytest.raises(Invalid, match="not an initial file system"):
        await images.bring_kernel("k2", "kernel", kernel, kernel, "")
    with pytest.raises(Invalid, match="printable"):
        await images.bring_kernel("k2", "kernel", kernel, None, "a\nb")
    assert kept(images) == ["k1.initrd", "k1.kernel"]
    await images.remove(image)
    await images.remove(image)
    assert kept(images) == []


fuzzing = settings(max_examples=tier(20, 400), suppress_health_check=[HealthCheck.function_scoped_fixture])


async def only_invalid(images: ImageFolder, source: Path, content: bytes) -> None:
    source.write_bytes(content)
    try:
        image = await images.bring_disk("fuzzed", "fuzzed", source)
    except Invalid as error:
        if not error.message.startswith(f"{source.name}: "):
            raise
    else:
        await images.remove(image)
    assert kept(images) == []


@fuzzing
@given(content=st.binary(max_size=2048), magic=st.sampled_from([b"", b"KDMV", b"vhdxfile", b"LUKS\xba\xbe", b"QED\0"]))
async def test_any_bytes_pass_or_are_invalid(images: ImageFolder, tmp_path: Path, content: bytes, magic: bytes) -> None:
    await only_invalid(images, tmp_path / "fuzz.img", (magic + content).ljust(1024, b"\0"))


@fuzzing
@given(
    changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=12), length=st.integers(4, 0x40000)
)
async def test_any_changed_qcow2_header_passes_or_is_invalid(
    images: ImageFolder, tmp_path: Path, changes: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(qcow2_header())
    for position, value in changes:
        content[position] = value
    await only_invalid(images, tmp_path / "fuzz.img", bytes(content[:length]))


async def test_the_least_memory_of_a_kernel_is_told_by_its_size(images: ImageFolder, tmp_path: Path) -> None:
    elf, packed, initrd = tmp_path / "elf", tmp_path / "packed", tmp_path / "initrd"
    elf.write_bytes(b"\x7fELF" + bytes(40 << 20))
    packed.write_bytes((b"MZ".ljust(510, b"\0") + b"\x55\xaa\0\0HdrS\x0f\x02").ljust(8 << 20, b"\0"))
    initrd.write_bytes(b"070701" + bytes(5 << 20))
    assert (await images.bring_kernel("k1", "k", elf, None, "")).min_memory_mib == 24 + 40
    assert (await images.bring_kernel("k2", "k", packed, initrd, "")).min_memory_mib == 24 + 48 + 20
