"""Images that mean harm: each is refused before QEMU's tool is started on it, and nothing of it is kept."""
# ruff: noqa: ASYNC240 - a test has the loop to itself

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interlock.confinement.sandbox import Namespaced, Namespaces
from interlock.core.errors import Invalid
from interlock.core.records import Seed
from interlock.images import cloud_init, qemu_img
from interlock.images.image_folder import ImageFolder
from tiers import tier

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
SECRET = "/etc/passwd"
"""What an image would like to read."""


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    return ImageFolder(tmp_path / "images")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once QEMU's tool was started, which is recorded by a stand-in on the PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    above = (place for place in tmp_path.parents if Path(tempfile.gettempdir()) in place.parents)
    for place in (folder, tmp_path, *above):
        place.chmod(0o777 if place == folder else 0o711)
    (folder / "qemu-img").write_text(f"#!/bin/sh\necho $* >> {folder}/started\nexit 1\n")
    (folder / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    # In namespaces it would see neither a shell nor the folder.
    monkeypatch.setattr(qemu_img, "namespaces_for", lambda _: Namespaced(namespaces=Namespaces.NONE, because="none"))
    return folder / "started"


REAL = shutil.which("qemu-img") or "qemu-img"


def made(path: Path, form: str, *options: str, size: str = "8M") -> bytearray:
    command = [REAL, "create", "-q", "-f", form, *(word for option in options for word in ("-o", option))]
    subprocess.run([*command, str(path), size], check=True, cwd=path.parent)
    return bytearray(path.read_bytes())


def put(content: bytearray, layout: str, at: int, *values: int | bytes) -> bytearray:
    struct.pack_into(layout, content, at, *values)
    return content


def with_descriptor(content: bytearray, change: Callable[[bytes], bytes]) -> bytearray:
    """A vmdk image with another descriptor, of the same place and size."""
    at, sectors = (field * 512 for field in struct.unpack_from("<QQ", content, 28))
    text = change(bytes(content[at : at + sectors]).rstrip(b"\0"))
    content[at : at + sectors] = text.ljust(sectors, b"\0")
    return content


def qcow2(folder: Path) -> bytearray:
    return made(folder / "made.qcow2", "qcow2")


def vmdk(folder: Path) -> bytearray:
    return made(folder / "made.vmdk", "vmdk")


def vhd(folder: Path) -> bytearray:
    return made(folder / "made.vhd", "vpc")


def vhdx(folder: Path) -> bytearray:
    return made(folder / "made.vhdx", "vhdx")


def vdi(folder: Path) -> bytearray:
    return made(folder / "made.vdi", "vdi")


def backed(folder: Path, form: str) -> bytearray:
    (folder / "base.raw").write_bytes(bytes(8 << 20))
    made(folder / f"base.{form}", form)
    return made(folder / "made.img", form, f"backing_file=base.{form},backing_fmt={form}")


def luks(_folder: Path) -> bytes:
    return (b"LUKS\xba\xbe\0\1" + b"aes".ljust(32, b"\0") + b"xts-plain64".ljust(32, b"\0")).ljust(1 << 20, b"\0")


def vhdx_parameters(content: bytearray) -> int:
    """Where the file parameters of a vhdx image are: the block size, then flags."""
    metadata = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
    (region,) = struct.unpack_from("<Q", content, content.index(metadata, 192 << 10) + 16)
    item = content.index(bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b"), region)
    return int(region + struct.unpack_from("<I", content, item + 16)[0])


def vhdx_with_parent(folder: Path) -> bytearray:
    content = vhdx(folder)
    return put(content, "<I", vhdx_parameters(content) + 4, 2)


def vhdx_with_blocks(folder: Path) -> bytearray:
    content = vhdx(folder)
    return put(content, "<I", vhdx_parameters(content), 3)


def vhdx_with_log(folder: Path) -> bytearray:
    content = put(vhdx(folder), "<16s", (64 << 10) + 48, b"x" * 16)
    return put(content, "<16s", (128 << 10) + 48, b"x" * 16)


HINT = f'\nparentFileNameHint="{SECRET}"\n'.encode()

HOSTILE: dict[str, tuple[str, Callable[[Path], bytes | bytearray], str]] = {
    "qcow2 with a backing file": ("a.img", lambda at: backed(at, "qcow2"), "backing file"),
    "qcow2 with a data file": ("a.img", lambda at: made(at / "m", "qcow2", f"data_file={at}/data"), "data file"),
    "qcow2 that is encrypted": ("a.img", lambda at: put(qcow2(at), ">I", 32, 2), "encrypted"),
    "qcow2 with a first table of 32 GiB": ("a.img", lambda at: put(qcow2(at), ">I", 36, 0xFFFFFFFF), "first table"),
    "qcow2 with a first table elsewhere": ("a.img", lambda at: put(qcow2(at), ">Q", 40, 1 << 62), "first table"),
    "qcow2 with reference counts of 256 TiB": ("a.img", lambda at: put(qcow2(at), ">I", 56, 0xFFFFFFFF), "reference"),
    "qcow2 with reference counts elsewhere": ("a.img", lambda at: put(qcow2(at), ">Q", 48, 1 << 62), "reference"),
    "qcow2 with a million snapshots": ("a.img", lambda at: put(qcow2(at), ">I", 60, 1 << 20), "snapshots"),
    "qcow2 with snapshots elsewhere": ("a.img", lambda at: put(qcow2(at), ">IQ", 60, 9, 1 << 62), "snapshots"),
    "qcow2 with clusters of 4 GiB": ("a.img", lambda at: put(qcow2(at), ">I", 20, 32), "clusters"),
    "qcow2 of an exabyte": ("a.img", lambda at: put(qcow2(at), ">Q", 24, 1 << 60), "invalid disk size"),
    "qcow2 truncated": ("a.img", lambda at: qcow2(at)[:70_000], "beyond the end"),
    "qcow2 under another name": ("a.vmdk", qcow2, "contains a qcow2"),
    "vmdk with a parent": ("a.img", lambda at: with_descriptor(vmdk(at), lambda text: text + HINT), "names a parent"),
    "vmdk with a parent behind a zero byte": (
        "a.img",
        lambda at: with_descriptor(vmdk(at), lambda text: text + b"\0" + HINT),
        "names a parent",
    ),
    "vmdk made over a parent": ("a.img", lambda at: backed(at, "vmdk"), "parent"),
    "vmdk that is a difference": (
        "a.img",
        lambda at: with_descriptor(vmdk(at), lambda text: text.replace(b"parentCID=ffffffff", b"parentCID=12345678")),
        "difference",
    ),
    "vmdk with an extent elsewhere": (
        "a.img",
        lambda at: with_descriptor(vmdk(at), lambda text: text.replace(b'"made.vmdk"', f'"{SECRET}"'.encode())),
        "other files",
    ),
    "vmdk with a second extent": (
        "a.img",
        lambda at: with_descriptor(vmdk(at), lambda text: text + b'\nRW 8 FLAT "secret" 0\n'),
        "other files",
    ),
    "vmdk that is only a descriptor": (
        "a.vmdk",
        lambda at: made(at / "flat.vmdk", "vmdk", "subformat=monolithicFlat").ljust(1024, b"\n"),
        "other files",
    ),
    "vmdk with a directory elsewhere": ("a.img", lambda at: put(vmdk(at), "<Q", 56, 1 << 40), "directory"),
    "vmdk with grains of nothing": ("a.img", lambda at: put(vmdk(at), "<Q", 20, 0), "grains"),
    "vmdk of an exabyte": ("a.img", lambda at: put(vmdk(at), "<Q", 12, 1 << 51), "invalid disk size"),
    "vhd that is a difference": ("a.img", lambda at: put(vhd(at), ">I", 60, 4), "difference"),
    "vhd with a parent locator": ("a.img", lambda at: put(vhd(at), ">4s", 512 + 576, b"W2ku"), "names a parent"),
    "vhd with a parent's id": ("a.img", lambda at: put(vhd(at), ">16s", 512 + 40, b"x" * 16), "names a parent"),
    "vhd with a table elsewhere": ("a.img", lambda at: put(vhd(at), ">Q", 512 + 16, 1 << 50), "table of blocks"),
    "vhd with four thousand million blocks": ("a.img", lambda at: put(vhd(at), ">I", 512 + 28, 0xFFFFFFFF), "blocks"),
    "vhd with blocks of nothing": ("a.img", lambda at: put(vhd(at), ">I", 512 + 32, 0), "blocks"),
    "vhd truncated": ("a.img", lambda at: vhd(at)[:1024], "truncated|beyond the end"),
    "vhdx with a parent": ("a.img", vhdx_with_parent, "difference"),
    "vhdx with a log to be replayed": ("a.img", vhdx_with_log, "log"),
    "vhdx with odd blocks": ("a.img", vhdx_with_blocks, "blocks"),
    "vhdx truncated": ("a.img", lambda at: vhdx(at)[: 1 << 20], "the image is invalid|invalid disk size|beyond"),
    "vdi that is a difference": ("a.img", lambda at: put(vdi(at), "<I", 76, 4), "difference"),
    "vdi with a parent": ("a.img", lambda at: put(vdi(at), "<16s", 440, b"x" * 16), "difference"),
    "vdi with a map elsewhere": ("a.img", lambda at: put(vdi(at), "<I", 340, 0xFFFFFF00), "table of blocks"),
    "vdi with four thousand million blocks": ("a.img", lambda at: put(vdi(at), "<I", 384, 0xFFFFFFFF), "blocks"),
    "vdi of sixteen tebibytes in a kilobyte": (
        "a.img",
        lambda at: put(put(vdi(at), "<Q", 368, 16 << 40), "<I", 384, 1 << 24),
        "table of blocks",
    ),
    "vdi under another name": ("a.vhd", vdi, "contains a vdi"),
    "luks": ("a.img", luks, "luks image"),
    "qed": ("a.img", lambda at: made(at / "m", "qed"), "qed image"),
    "an iso that is also a qcow2": (
        "a.iso",
        lambda at: bytes(qcow2(at)[:512]) + cloud_init.build(Seed(hostname="h"), "i")[512:],
        "ambiguous",
    ),
    "an iso that is also a vdi": (
        "a.iso",
        lambda at: bytes(vdi(at)[:1024]) + cloud_init.build(Seed(hostname="h"), "i")[1024:],
        "ambiguous",
    ),
    "a raw disk under the name of an iso": ("a.iso", lambda _at: bytes(65_536), "contains a raw"),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_it_is_refused_and_the_tool_was_not_started(
    images: ImageFolder, tmp_path: Path, started: Path, kind: str
) -> None:
    name, make, why = HOSTILE[kind]
    (tmp_path / "made").mkdir()
    content = make(tmp_path / "made")
    source = tmp_path / name
    source.write_bytes(content)
    with pytest.raises(Invalid, match=why):
        await images.bring_disk("i1", "hostile", source)
    assert not started.exists()
    assert list(images._folder.iterdir()) == []


@pytest.mark.parametrize("form", [qcow2, vmdk, vhd, vhdx, vdi])
async def test_the_record_would_show_that_the_tool_was_started(
    images: ImageFolder, tmp_path: Path, started: Path, form: Callable[[Path], bytearray]
) -> None:
    source = tmp_path / "sound.img"
    source.write_bytes(form(tmp_path))
    with pytest.raises(Invalid, match="QEMU cannot"):
        await images.bring_disk("i1", "sound", source)
    words = started.read_text().split()
    assert words[words.index("-f") + 1] == {"vhd": "vpc"}.get(form.__name__, form.__name__)
    assert list(images._folder.iterdir()) == []


SOUND = [qcow2, vmdk, vhd, vdi]


@settings(max_examples=tier(20, 300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(SOUND),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    length=st.integers(600, 1 << 18),
)
async def test_any_changed_image_passes_or_is_invalid_and_leaves_nothing(
    images: ImageFolder,
    tmp_path: Path,
    form: Callable[[Path], bytearray],
    changes: list[tuple[int, int]],
    length: int,
) -> None:
    content = form(tmp_path)
    for position, value in changes:
        content[position % len(content)] = value
    source = tmp_path / "fuzz.img"
    source.write_bytes(content[:length])
    try:
        image = await images.bring_disk("fuzzed", "fuzzed", source)
    except Invalid as error:
        if not error.message.startswith(f"{source.name}: "):
            raise
    else:
        await images.remove(image)
    assert list(images._folder.iterdir()) == []
