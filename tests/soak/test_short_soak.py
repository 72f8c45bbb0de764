"""A short soak: real VMs on two hosts, random admitted operations, a server and an agent that are killed; the long one
is `PYTHONPATH=tests python -m soak`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from small_guests import packages_folder
from soak import Soak
from soak.faults import FROZEN, FULL
from soak.identities import IDENTITIES
from soak.operations import EARLY
from soak.report import ACKNOWLEDGED
from tiers import tier

pytestmark = pytest.mark.qemu

SECONDS = tier(10.0, 60.0)

AT_LEAST = {"kills of the server": 3, ACKNOWLEDGED: 80, FROZEN: 1, EARLY: 1, FULL: 1, IDENTITIES: 1}
"""What has to happen, however long a busy machine takes for it."""


def test_nothing_is_stuck_doubled_damaged_or_left_over_after_random_operations_and_kills() -> None:
    packages = packages_folder()
    with tempfile.TemporaryDirectory(prefix="interlock-soak-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        kept = packages if packages.exists() else None
        soak = Soak(folder, vms=5, small=1, hosts=2, shared=False, seed=20_26, packages=kept)
        can_mount = False
        try:
            soak.run(SECONDS, callers=4, kill_every_s=5.0, at_least=AT_LEAST)
            can_mount = soak.can_fill
        finally:
            soak.close()
    assert soak.book.wrong == []
    for what, times in AT_LEAST.items():
        assert soak.book.counts[what] >= times or (what == FULL and not can_mount), (what, soak.report())
    assert soak.book.succeeded() > 30, soak.report()
