"""A short soak: real VMs, random admitted operations, a server that is killed; the long one is
`python -m interlock.testing.soak`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from interlock.testing.real_server import end_guests
from interlock.testing.soak import Soak

pytestmark = pytest.mark.qemu

SECONDS = float(os.environ.get("INTERLOCK_SOAK_SECONDS", "25"))


@pytest.mark.slow
def test_nothing_is_stuck_damaged_or_left_over_after_random_operations_and_kills() -> None:
    with tempfile.TemporaryDirectory(prefix="interlock-soak-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        soak = Soak(folder, vms=5, seed=20_26)
        try:
            soak.run(SECONDS, callers=4, kill_every_s=5.0)
        finally:
            soak.server.kill()
            end_guests(soak.server.folder)
    assert soak.wrong == []
    assert soak.counts["kills"] >= 3
    assert soak.counts["ended succeeded"] > 30, soak.counts
