"""Images of other makers' formats: what the guest sees of them is what was in them, and what is kept is qcow2."""
# ruff: noqa: ASYNC221, ASYNC240 - a test has the loop to itself

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import msgspec
import pytest

from interlock.confinement.sandbox import Namespaced, Namespaces, nobody
from interlock.core.errors import Invalid, Unavailable
from interlock.core.records import Seed
from interlock.images import cloud_init, qemu_img
from interlock.images.image_folder import ImageFolder
from interlock.images.qemu_img import ImageTool

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

FORMS = {
    "vmdk": ("vmdk", "subformat=monolithicSparse"),
    "stream.vmdk": ("vmdk", "subformat=streamOptimized"),
    "vhd": ("vpc", "subformat=dynamic,force_size=on"),
    "fixed.vhd": ("vpc", "subformat=fixed,force_size=on"),
    "vhdx": ("vhdx", "subformat=dynamic"),
    "vdi": ("vdi", "static=off"),
    "static.vdi": ("vdi", "static=on"),
}
"""What QEMU calls each of them, and with which options it makes one."""


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    # As the server's folder is: its own, not to be entered by the tool's user.
    (tmp_path / "server").mkdir(mode=0o700)
    return ImageFolder(tmp_path / "server" / "images")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with something at its beginning, in its middle and at its end."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        for at in (0, 3 << 20, (8 << 20) - 4096):
            file.seek(at)
            file.write(os.urandom(4096))
    return path


def given_as(disk: Path, form: str) -> Path:
    driver, options = FORMS.get(form, (form, "cluster_size=65536"))
    made = disk.with_name(f"given.{form}")
    command = ["qemu-img", "convert", "-f", "raw", "-O", driver, "-o", options, str(disk), str(made)]
    subprocess.run(command, check=True)
    return made


def seen_by_a_guest(path: str, image_format: str) -> bytes:
    raw = Path(path).with_suffix(".seen")
    subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", path, str(raw)], check=True)
    content = raw.read_bytes()
    raw.unlink()
    return content


def kept(images: ImageFolder) -> list[str]:
    return sorted(path.name for path in images._folder.iterdir())


@pytest.mark.parametrize("form", FORMS)
async def test_a_guest_sees_what_was_in_the_image(images: ImageFolder, disk: Path, form: str) -> None:
    given = given_as(disk, form)
    image = await images.bring_disk("i1", "disk", given)
    assert seen_by_a_guest(image.path, image.format) == disk.read_bytes()
    assert (image.kind, image.size_bytes) == ("disk", 8 << 20)
    assert image.converted_from == form.rpartition(".")[2]
    assert image.sha256 == hashlib.sha256(given.read_bytes()).hexdigest()
    assert 0 < image.stored_bytes < 4 << 20
    found = Path(image.path).stat()
    assert (found.st_mode & 0o777, found.st_uid) == (0o640, os.geteuid())
    assert kept(images) == [f"i1.{image.format}"]
    assert image.format == ("raw" if form == "fixed.vhd" else "qcow2")


async def test_what_is_kept_needs_no_other_file(images: ImageFolder, disk: Path) -> None:
    image = await images.bring_disk("i1", "disk", given_as(disk, "vmdk"))
    told = subprocess.run(["qemu-img", "info", "--output=json", image.path], check=True, capture_output=True)
    info = msgspec.json.decode(told.stdout)
    assert info["format"] == "qcow2"
    assert "backing-filename" not in info
    assert "data-file" not in info["format-specific"]["data"]
    assert not info.get("encrypted")


async def test_an_iso_is_kept_as_it_is_also_one_that_a_stick_can_boot(images: ImageFolder, tmp_path: Path) -> None:
    content = bytearray(cloud_init.build(Seed(hostname="h"), "i"))
    for name, head in {"a.iso": b"", "b.iso": b"\x80" + bytes(3) + b"\x17" + bytes(59) + b"\x55\xaa"}.items():
        if head:
            content[446 : 446 + 16] = head[:16]
            content[510:512] = head[-2:]
        (tmp_path / name).write_bytes(content)
        image = await images.bring_disk(name[0], "disc", tmp_path / name)
        assert (image.kind, image.format, image.converted_from) == ("iso", "raw", None)
        assert Path(image.path).read_bytes() == content
        assert image.path.endswith(".iso")
        await images.remove(image)
    assert kept(images) == []


@pytest.mark.parametrize("form", ["qcow2", *(form for form in FORMS if form != "fixed.vhd")])
async def test_an_image_that_is_cut_short_is_refused(images: ImageFolder, disk: Path, form: str) -> None:
    given = given_as(disk, form)
    whole = given.read_bytes()
    given.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(Invalid) as refused:
        await images.bring_disk("i1", "disk", given)
    assert refused.value.message.startswith(f"{given.name}: "), "the folder that it came through is nobody's affair"
    assert kept(images) == []


async def test_an_iso_that_is_cut_short_is_refused(images: ImageFolder, tmp_path: Path) -> None:
    content = cloud_init.build(Seed(hostname="h"), "i")
    (tmp_path / "a.iso").write_bytes(content[:-2048])
    with pytest.raises(Invalid, match="truncated"):
        await images.bring_disk("i1", "disc", tmp_path / "a.iso")


async def test_the_sum_is_that_of_what_was_given(images: ImageFolder, disk: Path) -> None:
    given = given_as(disk, "vdi")
    right = hashlib.sha256(given.read_bytes()).hexdigest()
    with pytest.raises(Invalid, match=right):
        await images.bring_disk("i1", "disk", given, "0" * 64)
    assert kept(images) == []
    assert (await images.bring_disk("i1", "disk", given, right)).sha256 == right


async def test_without_the_tool_the_remedy_says_how_to_get_it(
    images: ImageFolder, disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = given_as(disk, "vmdk")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable) as told:
        await images.bring_disk("i1", "disk", given)
    assert "qemu-utils" in (told.value.remedy or "")
    assert kept(images) == []


async def test_an_image_may_not_become_larger_than_is_allowed(tmp_path: Path, disk: Path) -> None:
    disk.write_bytes(os.urandom(4 << 20))
    images = ImageFolder(tmp_path / "images", tool=ImageTool(bytes_max=2 << 20))
    with pytest.raises(Invalid, match="larger than 2097152"):
        await images.bring_disk("i1", "disk", given_as(disk, "stream.vmdk"))
    assert kept(images) == []


STAND_IN = """#!/bin/sh
echo $$ > {folder}/begun
id -u > {folder}/user
ls /proc/self/fd > {folder}/open
pwd > {folder}/place
ulimit -a > {folder}/limits
exec {then}
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH, open to all, for a stand-in of QEMU's tool that notes how it was started."""
    folder = tmp_path / "tools"
    folder.mkdir()
    above = (place for place in tmp_path.parents if Path(tempfile.gettempdir()) in place.parents)
    for place in (folder, tmp_path, *above):
        place.chmod(0o777 if place == folder else 0o711)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    # In namespaces it would see neither a shell nor the folder.
    monkeypatch.setattr(qemu_img, "namespaces_for", lambda _: Namespaced(namespaces=Namespaces.NONE, because="none"))
    return folder


def put(folder: Path, then: str) -> None:
    (folder / "qemu-img").write_text(STAND_IN.format(folder=folder, then=then))
    (folder / "qemu-img").chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
async def test_the_tool_has_no_privileges_and_limits(images: ImageFolder, disk: Path, stand_in: Path) -> None:
    given = given_as(disk, "vmdk")
    put(stand_in, "false")
    with pytest.raises(Invalid, match="cannot convert"):
        await images.bring_disk("i1", "disk", given)
    assert int((stand_in / "user").read_text()) == nobody().user_id != 0
    limits = (stand_in / "limits").read_text()
    assert f"{(1 << 30) >> 10}" in limits
    assert "600" in limits
    assert kept(images) == []


async def test_a_tool_that_does_not_end_is_ended(tmp_path: Path, disk: Path, stand_in: Path) -> None:
    given = given_as(disk, "vmdk")
    put(stand_in, "sleep 1000")
    images = ImageFolder(tmp_path / "images", tool=ImageTool(timeout_ms=300))
    with pytest.raises(Invalid, match="longer than 300 ms"):
        await images.bring_disk("i1", "disk", given)
    assert not Path(f"/proc/{(stand_in / 'begun').read_text().strip()}").exists()
    assert kept(images) == []


async def test_whoever_gives_up_leaves_nothing_behind(images: ImageFolder, disk: Path, stand_in: Path) -> None:
    given = given_as(disk, "vmdk")
    os.mkfifo(stand_in / "begun")
    (stand_in / "begun").chmod(0o666)
    put(stand_in, "sleep 1000")
    bringing = asyncio.create_task(images.bring_disk("i1", "disk", given))
    process = int(await asyncio.to_thread((stand_in / "begun").read_text))
    bringing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bringing
    assert not Path(f"/proc/{process}").exists()
    assert kept(images) == []
