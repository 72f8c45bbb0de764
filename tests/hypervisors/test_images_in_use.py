"""Which images a host's guests need is found in their folders."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from interlock.core.errors import OperationRejected
from interlock.core.records import Image, Spec
from interlock.hypervisors.qemu.disks.images_in_use import images_in_use
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder

KERNEL = Image(id="k", name="k", kind="kernel", path="/c/k", initrd="/c/i", size_bytes=1, sha256="0" * 64)
DISK = Image(id="d", name="d", kind="disk", path="/c/d", size_bytes=1, sha256="0" * 64)


def guest(folder: Path, name: str) -> InstanceFolder:
    (folder / name).mkdir(parents=True)
    return InstanceFolder(folder / name)


def layer(path: Path, backing: str | None) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    over = [] if backing is None else ["-b", backing, "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *over, path, "1M"], check=True)


def test_without_guests_no_image_is_in_use(tmp_path: Path) -> None:
    assert images_in_use(tmp_path / "vms") == frozenset()


def test_what_a_guest_was_started_with_is_in_use(tmp_path: Path) -> None:
    guest(tmp_path, "one").write_spec(Spec(image=KERNEL, rescue_image=DISK))
    assert images_in_use(tmp_path) == {"/c/k", "/c/i", "/c/d"}


def test_what_a_root_or_rescue_disk_is_a_layer_over_is_in_use_whatever_its_guest_was_started_with(
    tmp_path: Path,
) -> None:
    one, two = guest(tmp_path, "one"), guest(tmp_path, "two")
    layer(one.roots(Spec(image=KERNEL)).disk(0), "/c/first")
    layer(one.roots(Spec(image=KERNEL)).disk(3), "/c/third")
    layer(two.rescue_disk, "/c/rescue")
    layer(two.roots(Spec(image=KERNEL)).disk(0), None)
    assert images_in_use(tmp_path) == {"/c/first", "/c/third", "/c/rescue"}


def test_where_a_disk_cannot_be_understood_nothing_is_said(tmp_path: Path) -> None:
    guest(tmp_path, "one").roots(Spec(image=KERNEL)).disk(0).write_bytes(b"no disk at all")
    with pytest.raises(OperationRejected):
        images_in_use(tmp_path)
