"""An agent that stalls while an instance is to come to its host: the instance stays, and runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes.real_fleet import Fleet
from processes.real_server import guests_in

pytestmark = pytest.mark.qemu


@pytest.fixture
def hasty() -> Iterator[Fleet]:
    """A fleet that takes a host for silent soon."""
    with tempfile.TemporaryDirectory(prefix="interlock-stall-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        # Agents send something every 2 s, and on a busy machine later.
        one = Fleet(folder, {"INTERLOCK_HOSTS_SILENCE_MS": "5000", "INTERLOCK_HOSTS_LEASE_MS": "6000"})
        try:
            one.start()
            yield one
        finally:
            one.clear()


@pytest.mark.parametrize("operation", ["live_migrate", "migrate"])
def test_a_target_whose_agent_stalls_leaves_the_guest_running_here(hasty: Fleet, operation: str) -> None:
    """Its connection counts as broken after `hosts.silence_ms`, and by that the migration has failed."""
    north = hasty.add("north")
    hasty.create("one", "here", root_gib=1)
    (before,) = guests_in(hasty.server.folder)
    north.freeze()
    try:
        request = hasty.server.submit("one", operation, host="north").json()["request"]["id"]
        ended = hasty.server.ended(request)
        assert ended["status"] == "failed", ended
        assert "Host north rejected the incoming migration" in ended["message"]
        assert guests_in(hasty.server.folder) == [before]
        hasty.carry_out("one", "pause")
        hasty.carry_out("one", "unpause")
    finally:
        north.thaw()
