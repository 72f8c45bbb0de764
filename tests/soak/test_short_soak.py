"""A short soak: real VMs on two hosts, random admitted operations, a server and an agent that are killed; the long one
is `python -m interlock.testing.soak`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from hypervisors.test_seeded_guest import cache_folder
from interlock.testing.soak import Soak

pytestmark = pytest.mark.qemu

SECONDS = float(os.environ.get("INTERLOCK_SOAK_SECONDS", "25"))


@pytest.mark.slow
def test_nothing_is_stuck_doubled_damaged_or_left_over_after_random_operations_and_kills() -> None:
    packages = cache_folder()
    with tempfile.TemporaryDirectory(prefix="interlock-soak-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        kept = packages if packages.exists() else None
        soak = Soak(folder, vms=5, small=1, hosts=2, shared=False, seed=20_26, packages=kept)
        try:
            soak.run(SECONDS, callers=4, kill_every_s=5.0)
        finally:
            soak.ground.close()
    assert soak.book.wrong == []
    assert soak.book.counts["kills of the server"] >= 3
    assert soak.book.succeeded() > 30, soak.report()
