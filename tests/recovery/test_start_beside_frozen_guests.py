"""A server that starts beside QEMUs that do not answer: it listens, takes requests and agents, and is not ready."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes.real_fleet import Fleet
from processes.real_server import guests_in

pytestmark = pytest.mark.qemu

SILENT_MS = 20_000
"""So long that nothing which waits for a frozen guest could be over when the server listens, on however slow a host."""
FROZEN = 4


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="interlock-frozen-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        one = Fleet(folder, {"INTERLOCK_QMP_TIMEOUT_MS": str(SILENT_MS)})
        try:
            one.start()
            yield one
        finally:
            one.clear()


def test_frozen_guests_hold_up_nobody_but_themselves(fleet: Fleet) -> None:
    """Not the listening, nor the leases of other hosts, nor the VMs beside them."""
    server = fleet.server
    for number in range(FROZEN):
        fleet.create(f"vm{number}", "here", memory_mib=64)
    frozen = guests_in(server.folder)
    assert len(frozen) == FROZEN
    fleet.create("healthy", "here", memory_mib=64)
    server.kill()
    for process_id in frozen:
        os.kill(process_id, signal.SIGSTOP)
    try:
        server.start(until_ready=False)
        fleet.carry_out("healthy", "pause")
        readiness = server.client.get("/readyz")
        assert readiness.status_code == 503, readiness.text
        assert f"still to be inspected: {FROZEN}" in readiness.json()["reasons"][0]
        asked = server.submit("vm0", "stop", hard=True)
        assert asked.status_code == 202, asked.text
        request_id = asked.json()["request"]["id"]
        fleet.add("north")
        assert server.client.get("/readyz").status_code == 503
        assert server.get(f"/v1/requests/{request_id}")["status"] == "queued"
    finally:
        for process_id in frozen:
            os.kill(process_id, signal.SIGCONT)
    assert server.ended(request_id)["status"] == "succeeded"
    server.until_ready()
