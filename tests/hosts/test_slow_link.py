"""An image that takes long on its way to a host, over a slow link that is cut: the lease is renewed in time."""

from __future__ import annotations

import filecmp
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot_sector import bootable_image
from processes.real_fleet import Fleet
from processes.slow_link import SlowLink

pytestmark = pytest.mark.qemu

LEASE_MS = 3_000
"""A host is lost after two thirds of it without a renewal."""
BYTES_PER_S = 400_000
"""A message of 1 MiB takes longer than that."""
DATA_BYTES = 1 << 20
SIZE_BYTES = 256 << 20


@pytest.fixture
def short() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="interlock-slow-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        one = Fleet(folder, {"INTERLOCK_HOSTS_LEASE_MS": str(LEASE_MS)})
        try:
            one.start()
            yield one
        finally:
            one.clear()


def add_sparse_image(fleet: Fleet) -> Path:
    """An image with data at its beginning and its end, and a hole between; its file on the server."""
    raw = Path(bootable_image(fleet.folder, "sparse").path)
    disk = raw.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)], check=True)
    with disk.open("rb") as file:
        form = {"name": "sparse", "kind": "disk"}
        made = fleet.server.client.post("/v1/images", data=form, files={"disk": file})
    made.raise_for_status()
    (kept,) = (fleet.server.folder / "images").glob(f"{made.json()['id']}.*")
    with kept.open("r+b") as file:  # what is behind the end of a qcow2 image belongs to nothing in it
        os.pwrite(file.fileno(), os.urandom(DATA_BYTES), SIZE_BYTES - DATA_BYTES)
    return kept


def test_an_image_comes_over_a_slow_link_that_is_cut_while_the_lease_is_renewed(short: Fleet) -> None:
    image = add_sparse_image(short)
    with SlowLink(str(short.server.client.base_url), BYTES_PER_S, cut_after=DATA_BYTES // 2) as link:
        north = short.add("north", "--server", link.url)
        begun = time.monotonic()
        short.create("one", "north", image="sparse", memory_mib=64)
        took_s = time.monotonic() - begun
        history = [one["kind"] for one in short.server.get("/v1/hosts/north/events")["items"]]
        (copy,) = (north.folder / "images").glob(f"*{image.name}")
        assert filecmp.cmp(copy, image, shallow=False)
        assert copy.stat().st_blocks * 512 < SIZE_BYTES / 10
        assert history == ["joined"], "never lost"
        assert took_s > DATA_BYTES / BYTES_PER_S
        assert (link.cuts, link.file_connections) == (1, 2)
        assert link.received_files < DATA_BYTES * 1.5, "it went on where it was cut"
        assert north.logged("server not responding") == []
