"""What people have in files: compressed disks, OVAs, and much that is no disk: taken, or refused by name."""
# ruff: noqa: ASYNC221, ASYNC240 - a test has the loop to itself

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import random
import shutil
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interlock.core.errors import Invalid
from interlock.images.image_folder import ImageFolder
from interlock.images.qemu_img import ImageTool
from tiers import tier

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor().compress,
}
NAMES = {"gz": "gzip", "xz": "xz", "bz2": "bzip2", "zst": "zstd"}
_NOISE = random.Random(9).randbytes(256 << 10)
DISK = _NOISE[:446] + bytes(64) + b"\x55\xaa" + _NOISE[512:] + bytes(1 << 20)
"""A disk with a boot sector and an empty partition table."""


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    (tmp_path / "server").mkdir(mode=0o700)
    return ImageFolder(tmp_path / "server" / "images")


def kept(images: ImageFolder) -> list[str]:
    return sorted(path.name for path in images._folder.iterdir()) if images._folder.exists() else []


def put(folder: Path, name: str, content: bytes | bytearray) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def gpt(sectors: int, sector: int = 512) -> bytes:
    """A disk with a GPT that has no partitions: the protective MBR, the header, and its copy in the last sector."""
    disk = bytearray(sectors * sector)
    disk[446:462] = struct.pack("<B3sB3sII", 0, b"\0\x02\0", 0xEE, b"\xff\xff\xff", 1, min(sectors - 1, 0xFFFFFFFF))
    disk[510:512] = b"\x55\xaa"
    entries = zlib.crc32(bytes(128 * 128))
    for at, other, table in ((1, sectors - 1, 2), (sectors - 1, 1, sectors - 33)):
        fields = (at, other, 34, sectors - 34, bytes(16), table, 128, 128, entries)
        head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields)
        head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
        disk[at * sector : at * sector + 92] = head
    return bytes(disk)


def tar(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            found = tarfile.TarInfo(name)
            found.size = len(content)
            archive.addfile(found, io.BytesIO(content))
    return out.getvalue()


def ovf(*disks: str) -> bytes:
    files = "".join(f'<File ovf:href="{name}" ovf:id="file{n}" ovf:size="1"/>' for n, name in enumerate(disks))
    listed = "".join(f'<Disk ovf:capacity="8" ovf:diskId="d{n}" ovf:fileRef="file{n}"/>' for n in range(len(disks)))
    return (
        '<?xml version="1.0"?>\n<Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">'
        f'<References>{files}<File ovf:href="cd.iso" ovf:id="cd"/></References>'
        f"<DiskSection>{listed}</DiskSection></Envelope>\n"
    ).encode()


def seen_by_a_guest(path: str, image_format: str) -> bytes:
    raw = Path(path).with_suffix(".seen")
    subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", path, str(raw)], check=True)
    content = raw.read_bytes()
    raw.unlink()
    return content


class TestCompressed:
    @pytest.mark.parametrize("kind", COMPRESS)
    @pytest.mark.parametrize("streams", [1, 3])
    @pytest.mark.parametrize("padding", [0, 512])
    async def test_a_disk_is_decompressed_while_it_is_read(
        self, images: ImageFolder, tmp_path: Path, kind: str, streams: int, padding: int
    ) -> None:
        step = -(-len(DISK) // streams)
        parts = [DISK[at : at + step] for at in range(0, len(DISK), step)]
        content = b"".join(COMPRESS[kind](part) for part in parts) + bytes(padding)
        image = await images.bring_disk("i1", "disk", put(tmp_path, f"disk.{kind}", content))
        assert Path(image.path).read_bytes() == DISK
        assert (image.format, image.size_bytes) == ("raw", len(DISK))
        assert image.converted_from == f"raw, {NAMES[kind]}"
        assert image.sha256 == hashlib.sha256(content).hexdigest()

    @needs_qemu_img
    async def test_what_is_compressed_may_be_of_any_usable_format(self, images: ImageFolder, tmp_path: Path) -> None:
        put(tmp_path, "disk.raw", DISK)
        for form in ("qcow2", "vmdk"):
            made = tmp_path / f"made.{form}"
            command = ["qemu-img", "convert", "-f", "raw", "-O", form, str(tmp_path / "disk.raw"), str(made)]
            subprocess.run(command, check=True)
            given = put(tmp_path, "given.gz", gzip.compress(made.read_bytes()))
            image = await images.bring_disk(form, "disk", given)
            assert seen_by_a_guest(image.path, image.format) == DISK
            assert image.converted_from == f"{form}, gzip"

    @pytest.mark.parametrize("kind", COMPRESS)
    @pytest.mark.parametrize("left", [0.3, 0.999])
    async def test_one_that_is_cut_short_is_refused(
        self, images: ImageFolder, tmp_path: Path, kind: str, left: float
    ) -> None:
        content = COMPRESS[kind](DISK)
        source = put(tmp_path, "disk.img", content[: int(len(content) * left)])
        with pytest.raises(Invalid, match=f"compressed with {NAMES[kind]}, and is truncated"):
            await images.bring_disk("i1", "disk", source)
        assert kept(images) == []

    @pytest.mark.parametrize("kind", COMPRESS)
    async def test_damage_and_what_follows_the_end_are_refused(
        self, images: ImageFolder, tmp_path: Path, kind: str
    ) -> None:
        content = COMPRESS[kind](DISK)
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 0xFF
        damaged[-6] ^= 0xFF
        for bad, why in ((bytes(damaged), "cannot be decompressed"), (content + b"more" * 9, "something else")):
            with pytest.raises(Invalid, match=why):
                await images.bring_disk("i1", "disk", put(tmp_path, f"disk.{kind}", bad))
        assert kept(images) == []

    async def test_several_layers_are_refused_by_their_names(self, images: ImageFolder, tmp_path: Path) -> None:
        for inner, why in (
            (gzip.compress(DISK), "compressed with gzip"),
            (tar(("disk.raw", DISK[:4096])), "a tar archive"),
            (b"", "nothing in it"),
        ):
            with pytest.raises(Invalid, match=why):
                await images.bring_disk("i1", "disk", put(tmp_path, "disk.xz", lzma.compress(inner)))

    @pytest.mark.parametrize("kind", COMPRESS)
    async def test_a_bomb_costs_neither_room_nor_memory(self, tmp_path: Path, kind: str) -> None:
        images = ImageFolder(tmp_path / "images", tool=ImageTool(bytes_max=32 << 20))
        bomb = DISK[:512] + bytes(64 << 20)
        source = put(tmp_path, "bomb", COMPRESS[kind](bomb))
        assert source.stat().st_size < 1 << 20
        del bomb
        tracemalloc.start()
        try:
            with pytest.raises(Invalid, match="larger than"):
                await images.bring_disk("i1", "disk", source)
            assert tracemalloc.get_traced_memory()[1] < 48 << 20
        finally:
            tracemalloc.stop()
        assert kept(images) == []

    async def test_it_may_not_take_for_ever(self, tmp_path: Path) -> None:
        images = ImageFolder(tmp_path / "images", tool=ImageTool(timeout_ms=0))
        with pytest.raises(Invalid, match="longer than 0 ms"):
            await images.bring_disk("i1", "disk", put(tmp_path, "disk.gz", gzip.compress(DISK)))

    async def test_a_header_may_not_ask_for_gigabytes_of_memory(self, images: ImageFolder, tmp_path: Path) -> None:
        frame = struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3) + b"\x01\0\0"
        with pytest.raises(Invalid, match="cannot be decompressed"):
            await images.bring_disk("i1", "disk", put(tmp_path, "a.zst", frame))
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
        hungry = bytearray(lzma.compress(DISK[:512], filters=filters, check=lzma.CHECK_NONE))
        at = hungry.index(b"\x21\x01")
        hungry[at + 2] = 40  # a dictionary of 4 GiB
        block = hungry[12 : 12 + (hungry[12] + 1) * 4]
        hungry[12 + len(block) - 4 : 12 + len(block)] = struct.pack("<I", zlib.crc32(block[:-4]))
        with pytest.raises(Invalid, match=r"cannot be decompressed.*[Mm]emory"):
            await images.bring_disk("i1", "disk", put(tmp_path, "a.xz", bytes(hungry)))


class TestArchives:
    @needs_qemu_img
    @pytest.mark.parametrize("subformat", ["streamOptimized", "monolithicSparse"])
    async def test_an_ova_gives_its_disk(self, images: ImageFolder, tmp_path: Path, subformat: str) -> None:
        put(tmp_path, "disk.raw", DISK)
        made = tmp_path / "box-disk1.vmdk"
        options = ["-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}"]
        subprocess.run(["qemu-img", "convert", *options, str(tmp_path / "disk.raw"), str(made)], check=True)
        members = (("box.ovf", ovf(made.name)), ("box.mf", b"SHA256(x)= 0\n"), (made.name, made.read_bytes()))
        for name, content in (("box.ova", tar(*members)), ("box", tar(*members, ("cd.iso", b"x" * 512)))):
            source = put(tmp_path, name, content)
            image = await images.bring_disk(name.replace(".", ""), "box", source)
            assert seen_by_a_guest(image.path, image.format) == DISK
            assert image.converted_from == "vmdk, ova"
            assert image.sha256 == hashlib.sha256(content).hexdigest()

    async def test_the_disk_in_an_ova_may_be_compressed(self, images: ImageFolder, tmp_path: Path) -> None:
        content = tar(("a.ovf", ovf("disk.raw.gz")), ("disk.raw.gz", gzip.compress(DISK)))
        image = await images.bring_disk("i1", "box", put(tmp_path, "a.ova", content))
        assert Path(image.path).read_bytes() == DISK
        assert image.converted_from == "raw, gzip, ova"

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (tar(("disk.raw", DISK[:1024])), "tar archive, and no OVA: it holds disk.raw"),
            (tar(("a.ovf", ovf("1.vmdk", "2.vmdk")), ("1.vmdk", b"")), "2 disks"),
            (tar(("a.ovf", ovf())), "no disk"),
            (tar(("a.ovf", ovf("1.vmdk"))), "which is not in it"),
            (tar(("a.ovf", ovf("1.vmdk")), ("1.vmdk", DISK))[: 1 << 20], "truncated"),
            (tar(("a.ovf", ovf("1.txt")), ("1.txt", b"hello\n")), "a text"),
            (tar(("a.ovf", ovf("in.ova")), ("in.ova", tar(("a.ovf", b"")))), "a tar archive"),
        ],
    )
    async def test_any_other_archive_is_refused_with_what_is_in_it(
        self, images: ImageFolder, tmp_path: Path, content: bytes, why: str
    ) -> None:
        with pytest.raises(Invalid, match=why) as refused:
            await images.bring_disk("i1", "box", put(tmp_path, "a.ova", content))
        assert refused.value.remedy
        assert kept(images) == []


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("disk.raw", DISK)
    return out.getvalue()


def ext4(folder: Path) -> bytes:
    path = folder / "fs"
    subprocess.run(["mkfs.ext4", "-q", str(path), "4M"], check=True, capture_output=True)
    return path.read_bytes()


DESCRIPTOR = b'# Disk DescriptorFile\nversion=1\nCID=1\ncreateType="monolithicFlat"\nRW 8 FLAT "f" 0\n'
FOREIGN: dict[str, tuple[str, bytes]] = {
    "tar": ("tar archive", tar(("notes", b"x" * 9000))),
    "zip": ("zip archive", zipped()),
    "7z": ("7z archive", b"7z\xbc\xaf\x27\x1c\0\4" + DISK[1000:9000]),
    "rar": ("rar archive", b"Rar!\x1a\x07\x01\0" + DISK[1000:9000]),
    "lz4": ("lz4", b"\x04\x22\x4d\x18" + DISK[1000:9000]),
    "lzma": ("lzma", lzma.compress(DISK, lzma.FORMAT_ALONE)),
    "vmdk descriptor": ("VMDK descriptor", DESCRIPTOR.replace(b"# Disk", b"\n\n# Disk").ljust(2048, b"\n")),
    "vmdk descriptor after comments": ("VMDK descriptor", b"\xef\xbb\xbf# made by hand\n\n" + DESCRIPTOR),
    "vmdk descriptor without its title": ("VMDK descriptor", DESCRIPTOR.partition(b"\n")[2]),
    "vmdk descriptor filled with zeros": ("VMDK descriptor", DESCRIPTOR.ljust(512, b"\0")),
    "esx vmdk": ("VMDK image of ESX", b"COWD" + DISK[1000:9000]),
    "dmg": ("Apple disk image", DISK[:446] + bytes(4096) + b"koly".ljust(512, b"\0")),
    "vhd with a wrong size": ("VHD image", DISK[:4096] + b"conectix".ljust(512, b"\0")),
    "parallels": ("Parallels", b"WithoutFreeSpace" + bytes(9000)),
    "qcow version 1": ("version 1", struct.pack(">4sIQIIQ", b"QFI\xfb", 1, 0, 0, 0, 1 << 20).ljust(70_000, b"\0")),
    "html": ("an HTML page", b"\n <!DOCTYPE html><html><title>404</title>"),
    "json": ("a JSON document", b'{"error": "not found"}\n'),
    "xml": ("an XML document", b'<?xml version="1.0"?><Error>AccessDenied</Error>'),
    "ovf": ("an OVF description", ovf("a.vmdk")),
    "text": ("a text", "Nicht gefunden: häßlich\n".encode() * 500),
    "sums": ("a text", b"0" * 64 + b"  debian.qcow2\n"),
    "kernel": ("a Linux kernel", (b"MZ".ljust(510, b"\0") + b"\x55\xaa\0\0HdrS").ljust(9000, b"\1")),
    "elf": ("an ELF", b"\x7fELF\2\1\1" + DISK[1000:9000]),
    "exe": ("a Windows or EFI program", b"MZ".ljust(60, b"\0") + b"\x40\0\0\0PE\0\0" + DISK[1000:9000]),
    "squashfs": ("SquashFS", b"hsqs" + DISK[1000:9000]),
    "xfs": ("XFS", b"XFSB" + bytes(9000)),
    "btrfs": ("Btrfs", bytes(65_600) + b"_BHRfS_M" + bytes(9000)),
    "lvm": ("LVM", bytes(512) + b"LABELONE" + bytes(9000)),
    "swap": ("swap", bytes(4086) + b"SWAPSPACE2" + bytes(9000)),
    "udf": ("UDF", bytes(32_768) + b"\0BEA01" + bytes(9000)),
    "android": ("Android sparse", b"\x3a\xff\x26\xed" + DISK[1000:9000]),
    "blank": ("blank", bytes(1 << 20)),
    "noise": ("no known disk image", DISK[1000:9192]),
    "one byte": ("a text", b"x"),
    "luks2": ("luks image", b"LUKS\xba\xbe\0\2" + DISK[1000:70_000]),
}


class TestNoDisks:
    @pytest.mark.parametrize("kind", FOREIGN)
    async def test_it_is_refused_by_its_name_with_what_to_do(
        self, images: ImageFolder, tmp_path: Path, kind: str
    ) -> None:
        what, content = FOREIGN[kind]
        with pytest.raises(Invalid, match=what) as refused:
            await images.bring_disk("i1", "disk", put(tmp_path, "disk.img", content))
        assert refused.value.remedy
        assert kept(images) == []

    @pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="mkfs.ext4 is not installed")
    async def test_a_bare_file_system_boots_nothing_unless_it_has_a_boot_sector(
        self, images: ImageFolder, tmp_path: Path
    ) -> None:
        content = bytearray(ext4(tmp_path))
        source = put(tmp_path, "fs.img", content)
        with pytest.raises(Invalid, match="ext4"):
            await images.bring_disk("i1", "disk", source)
        assert (await images.bring_disk("i1", "disk", source, claimed="raw")).size_bytes == len(content)
        # As `extlinux` leaves it: code all over the first sector, and where a partition table would be.
        content[:512] = b"\xeb\x58\x90SYSLINUX".ljust(510, b"\xf4") + b"\x55\xaa"
        image = await images.bring_disk("i2", "disk", put(tmp_path, "boots.img", content))
        assert image.format == "raw"
        assert Path(image.path).read_bytes() == content

    @pytest.mark.parametrize("kind", ["tar", "zip", "lz4", "text", "elf", "vmdk descriptor filled with zeros"])
    async def test_saying_that_it_is_raw_does_not_make_it_a_disk(
        self, images: ImageFolder, tmp_path: Path, kind: str
    ) -> None:
        with pytest.raises(Invalid, match=FOREIGN[kind][0]):
            await images.bring_disk("i1", "disk", put(tmp_path, "disk.img", FOREIGN[kind][1]), claimed="raw")

    @needs_qemu_img
    async def test_saying_raw_of_another_format_is_refused(self, images: ImageFolder, tmp_path: Path) -> None:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "a"), "1M"], check=True)
        with pytest.raises(Invalid, match="a qcow2 image, and not raw"):
            await images.bring_disk("i1", "disk", tmp_path / "a", claimed="raw")


class TestEnds:
    @pytest.mark.parametrize("sector", [512, 4096])
    @pytest.mark.parametrize("left", [1 << 20, -1, -512])
    async def test_a_gpt_disk_that_is_cut_short_is_refused_and_says_by_how_much(
        self, images: ImageFolder, tmp_path: Path, sector: int, left: int
    ) -> None:
        whole = gpt((4 << 20) // sector, sector)
        source = put(tmp_path, "disk.raw", whole[:left])
        for claimed in (None, "raw"):
            with pytest.raises(Invalid, match=f"truncated.*GPT.*{len(whole) - len(whole[:left])} bytes are missing"):
                await images.bring_disk("i1", "disk", source, claimed=claimed)
        assert kept(images) == []
        image = await images.bring_disk("i1", "disk", put(tmp_path, "whole.raw", whole))
        assert image.size_bytes == len(whole)
        assert (await images.bring_disk("i2", "disk", put(tmp_path, "w.raw", whole + bytes(1 << 20)))).format == "raw"

    async def test_one_in_a_compressed_file_too(self, images: ImageFolder, tmp_path: Path) -> None:
        with pytest.raises(Invalid, match="1048576 bytes are missing"):
            await images.bring_disk("i1", "disk", put(tmp_path, "d.gz", gzip.compress(gpt(8192)[: -1 << 20])))

    async def test_a_partition_that_ends_beyond_the_disk_is_refused_unless_it_is_to_be_so(
        self, images: ImageFolder, tmp_path: Path
    ) -> None:
        disk = bytearray(DISK)
        disk[446:462] = struct.pack("<B3sB3sII", 0x80, b"\0\x02\0", 0x83, b"\xff\xff\xff", 2048, 4096)
        source = put(tmp_path, "disk.raw", disk)
        with pytest.raises(Invalid, match=rf"last partition ends.*{6144 * 512 - len(disk)} bytes are missing"):
            await images.bring_disk("i1", "disk", source)
        assert (await images.bring_disk("i1", "disk", source, claimed="raw")).size_bytes == len(disk)
        disk[462:478] = b"\x90" * 16  # boot code where a table would be
        assert (await images.bring_disk("i2", "disk", put(tmp_path, "code.raw", disk))).size_bytes == len(disk)

    async def test_an_odd_length_is_padded(self, images: ImageFolder, tmp_path: Path) -> None:
        image = await images.bring_disk("i1", "disk", put(tmp_path, "disk.raw", DISK + b"x"))
        assert image.size_bytes == len(DISK) + 512
        assert Path(image.path).read_bytes() == DISK + b"x" + bytes(511)
        assert image.sha256 == hashlib.sha256(DISK + b"x").hexdigest()


@needs_qemu_img
class TestQcow2Features:
    def made(self, folder: Path, *options: str) -> bytearray:
        path = folder / "made.qcow2"
        words = [word for option in options for word in ("-o", option)]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, str(path), "8M"], check=True)
        return bytearray(path.read_bytes())

    @pytest.mark.parametrize("option", ["compression_type=zstd", "extended_l2=on", "lazy_refcounts=on", "compat=0.10"])
    async def test_what_qemu_reads_is_taken(self, images: ImageFolder, tmp_path: Path, option: str) -> None:
        path, raw = tmp_path / "made.qcow2", put(tmp_path, "disk.raw", DISK)
        command = ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", option, str(raw), str(path)]
        subprocess.run(command if option != "extended_l2=on" else [*command[:2], *command[3:]], check=True)
        image = await images.bring_disk("i1", "disk", path)
        assert seen_by_a_guest(image.path, "qcow2") == DISK

    @pytest.mark.parametrize(
        ("bit", "why", "remedy"),
        [
            (1, "marked as corrupt", "check -r all"),
            (2, "data file", "qemu-img convert"),
            (5, "incompatible feature bit 5", "qemu-img convert"),
            (63, "incompatible feature bit 63", "qemu-img convert"),
        ],
    )
    async def test_what_is_not_supported_is_named_with_what_to_do(
        self, images: ImageFolder, tmp_path: Path, bit: int, why: str, remedy: str
    ) -> None:
        content = self.made(tmp_path)
        (features,) = struct.unpack_from(">Q", content, 72)
        struct.pack_into(">Q", content, 72, features | 1 << bit)
        with pytest.raises(Invalid, match=why) as refused:
            await images.bring_disk("i1", "disk", put(tmp_path, "given", content))
        assert remedy in (refused.value.remedy or "")

    async def test_a_feature_has_the_name_that_the_image_gives_it(self, images: ImageFolder, tmp_path: Path) -> None:
        content = self.made(tmp_path)
        at = content.index(b"\0\0dirty bit")
        content[at : at + 48] = bytes([0, 9]) + b"time travel".ljust(46, b"\0")
        struct.pack_into(">Q", content, 72, 1 << 9)
        with pytest.raises(Invalid, match=r"'time travel' .incompatible feature bit 9"):
            await images.bring_disk("i1", "disk", put(tmp_path, "given", content))

    async def test_files_beside_it_and_keys_have_their_remedies(self, images: ImageFolder, tmp_path: Path) -> None:
        put(tmp_path, "base.raw", DISK)
        for options, what in (
            (("backing_file=base.raw", "backing_fmt=raw"), "backing file"),
            ((f"data_file={tmp_path / 'data'}",), "data file"),
        ):
            with pytest.raises(Invalid, match=what) as refused:
                await images.bring_disk("i1", "disk", put(tmp_path, "given", self.made(tmp_path, *options)))
            assert "qemu-img convert -O qcow2" in (refused.value.remedy or "")
        content = self.made(tmp_path)
        struct.pack_into(">I", content, 32, 2)
        with pytest.raises(Invalid, match="encrypted") as refused:
            await images.bring_disk("i1", "disk", put(tmp_path, "given", content))
        assert "encrypt.key-secret" in (refused.value.remedy or "")
        struct.pack_into(">I", content, 32, 0)
        struct.pack_into(">Q", content, 72, 8)
        content[104] = 7
        with pytest.raises(Invalid, match="compression type 7"):
            await images.bring_disk("i1", "disk", put(tmp_path, "given", content))


SEEDS = [
    *(content[:6000] for _, content in FOREIGN.values()),
    *(compress(DISK[:20_000]) for compress in COMPRESS.values()),
    tar(("a.ovf", ovf("disk.gz")), ("disk.gz", gzip.compress(DISK[:9000]))),
    gpt(64)[:9000],
]


@settings(max_examples=tier(30, 750), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 1600), st.integers(0, 255)), max_size=8),
    length=st.integers(1, 30_000),
    claimed=st.sampled_from([None, "raw"]),
)
async def test_whatever_the_bytes_are_they_pass_or_are_invalid(
    images: ImageFolder, tmp_path: Path, seed: bytes, changes: list[tuple[int, int]], length: int, claimed: str | None
) -> None:
    content = bytearray(seed)
    for position, value in changes:
        content[position % len(content)] = value
    source = put(tmp_path, "fuzz.img", content[:length])
    try:
        image = await images.bring_disk("fuzzed", "fuzzed", source, claimed=claimed)
    except Invalid as error:
        if not error.message.startswith("fuzz.img: "):
            raise
    else:
        assert image.size_bytes % 512 == 0
        assert Path(image.path).stat().st_size == image.size_bytes or image.format == "qcow2"
        await images.remove(image)
    assert kept(images) == []
