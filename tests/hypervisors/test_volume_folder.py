"""The volume folder: disks that are there whole or not at all, and belong to the guests' user."""
# ruff: noqa: ASYNC221 - a test has the loop to itself

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from interlock.core.errors import Invalid, StoreFull, Unavailable
from interlock.images import subprocess_runner
from interlock.images.volume_folder import VolumeFolder

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


@pytest.fixture
def volumes(tmp_path: Path) -> VolumeFolder:
    return VolumeFolder(tmp_path / "volumes")


def kept(volumes: VolumeFolder) -> list[str]:
    return sorted(path.name for path in volumes._folder.iterdir())


@needs_qemu_img
async def test_a_volume_is_an_empty_qcow2_of_the_size_asked_for(volumes: VolumeFolder) -> None:
    path = await volumes.make("v1", 64 << 20)
    told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(path)]))
    assert (told["format"], told["virtual-size"]) == ("qcow2", 64 << 20)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o711
    assert kept(volumes) == ["v1.qcow2"]
    await volumes.remove("v1")
    await volumes.remove("v1")
    assert kept(volumes) == []


@needs_qemu_img
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
async def test_a_volume_belongs_to_the_guests_user(tmp_path: Path) -> None:
    path = await VolumeFolder(tmp_path / "volumes", uid=65534, gid=65534).make("v1", 1 << 20)
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


@needs_qemu_img
async def test_who_may_not_give_a_volume_away_is_told_so_and_nothing_is_left(
    volumes: VolumeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", denied)
    other = VolumeFolder(volumes._folder, uid=65534, gid=65534)
    with pytest.raises(Unavailable, match="Permission denied"):
        await other.make("v1", 1 << 20)
    assert kept(other) == []


@pytest.mark.parametrize("size", [-1, 0, 1, (1 << 20) - 512, (1 << 20) + 1, (16 << 40) + 512])
async def test_a_size_that_no_volume_can_have_is_refused(volumes: VolumeFolder, size: int) -> None:
    with pytest.raises(Invalid, match=str(size)):
        await volumes.make("v1", size)


@needs_qemu_img
async def test_a_volume_is_never_written_over(volumes: VolumeFolder) -> None:
    path = await volumes.make("v1", 1 << 20)
    path.write_bytes(b"precious")
    with pytest.raises(Invalid, match="already"):
        await volumes.make("v1", 1 << 20)
    assert path.read_bytes() == b"precious"
    assert kept(volumes) == ["v1.qcow2"]


async def test_without_qemu_img_the_remedy_names_the_package(
    volumes: VolumeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unavailable) as told:
        await volumes.make("v1", 1 << 20)
    assert "qemu-utils" in (told.value.remedy or "")
    assert kept(volumes) == []


async def test_a_full_disk_is_told_as_such(volumes: VolumeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "qemu-img: v: Could not write: No space left on device"
    ended = subprocess_runner.Ended(status=1, output=b"", complaint=complaint)
    monkeypatch.setattr(subprocess_runner, "run", lambda *_a, **_k: ended)
    with pytest.raises(StoreFull):
        await volumes.make("v1", 1 << 20)
    assert kept(volumes) == []


@needs_qemu_img
async def test_what_no_record_names_is_swept(volumes: VolumeFolder) -> None:
    await volumes.make("v1", 1 << 20)
    await volumes.make("v2", 1 << 20)
    assert volumes.sweep({"v2"}) == ("v1.qcow2",)
    assert kept(volumes) == ["v2.qcow2"]
