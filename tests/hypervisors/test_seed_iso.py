"""The seed disk: the files that cloud-init's NoCloud looks for, for any reader, and the same bytes each time."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from pycdlib import PyCdlib

from interlock.core.errors import Invalid, StoreError
from interlock.core.records import Seed
from interlock.images import cloud_init

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDdtZ1Zt5vDc5h3pTBWG8Yv6kBQ3Gk0k0kq5mV1n5u1x somebody@somewhere"


def contents(image: bytes, extension: str) -> dict[str, str]:
    """The files of an image, as one who knows only that extension of ISO 9660 sees them."""
    disk = PyCdlib()
    disk.open_fp(io.BytesIO(image))
    found = {}
    for record in disk.list_children(rr_path="/"):
        name = record.rock_ridge.name().decode()
        if record.is_dir():
            continue
        out = io.BytesIO()
        disk.get_file_from_iso_fp(out, **{f"{extension}_path": f"/{name}"})
        found[name] = out.getvalue().decode()
    assert disk.pvd.volume_identifier.strip() == b"cidata"
    disk.close()
    return found


@pytest.mark.parametrize("extension", ["rr", "joliet"])
def test_a_guest_finds_its_name_and_keys_by_either_extension(extension: str) -> None:
    image = cloud_init.build(Seed(hostname="web-1", ssh_keys=(KEY,)), "id-1")
    found = contents(image, extension)
    assert json.loads(found["meta-data"]) == {"instance-id": "id-1", "local-hostname": "web-1", "public-keys": [KEY]}
    head, _, config = found["user-data"].partition("\n")
    assert head == "#cloud-config"
    assert json.loads(config) == {"hostname": "web-1", "ssh_authorized_keys": [KEY]}
    assert "network-config" not in found


def test_what_was_given_is_there_to_the_letter() -> None:
    seed = Seed(hostname="h", user_data="#!/bin/sh\necho ü\n", network_config="version: 2\n")
    found = contents(cloud_init.build(seed, "i"), "rr")
    assert (found["user-data"], found["network-config"]) == ("#!/bin/sh\necho ü\n", "version: 2\n")
    assert "public-keys" not in json.loads(found["meta-data"])


def test_the_same_seed_gives_the_same_bytes_at_another_time_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = Seed(hostname="web-1", ssh_keys=(KEY,))
    first = cloud_init.build(seed, "i")
    later = time.time() + 90_061
    monkeypatch.setattr("time.time", lambda: later)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        assert cloud_init.build(seed, "i") == first
    finally:
        monkeypatch.undo()
        time.tzset()


def test_another_instance_gets_another_disk() -> None:
    seed = Seed(hostname="web-1")
    assert cloud_init.build(seed, "i") != cloud_init.build(seed, "j")


def test_a_seed_that_is_too_large_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="the limit is 1048576"):
        cloud_init.write(tmp_path / "seed.iso", Seed(hostname="h", user_data="x" * (1 << 20)), "i")
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_over_whole_readable_by_us_alone_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    path.write_bytes(b"half")
    cloud_init.write(path, Seed(hostname="web-1"), "i")
    assert path.read_bytes() == cloud_init.build(Seed(hostname="web-1"), "i")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["seed.iso"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "seed.iso"
    path.write_bytes(b"what was there")

    def fail(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError):
        cloud_init.write(path, Seed(hostname="h"), "i")
    assert path.read_bytes() == b"what was there"
    assert [each.name for each in tmp_path.iterdir()] == ["seed.iso"]


def test_user_data_that_is_no_text_is_there_byte_for_byte() -> None:
    data = bytes(range(256)) * 3
    assert data in cloud_init.build(Seed(hostname="h", user_data_bytes=data), "i")
