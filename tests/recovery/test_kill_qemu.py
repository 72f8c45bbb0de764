"""A server that is killed while it works on a real VM loses nothing, and leaves no process and no file behind.

Real processes, real SIGKILLs, a real database and real QEMU; the guest is the smallest there is.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.nano_guest import nano_guest
from interlock.hypervisors.qemu.process.qemu_process import find_in
from processes.real_server import RealServer, end_guests, guests_in
from tiers import tier

pytestmark = pytest.mark.qemu

ROUNDS = tier(5, 50)
VM = "vm"
LIVES_S = 0.4
"""The longest that a server lives after the round's request was acknowledged: each operation takes less."""

KILLED_IN = ("create", "stop", "start", "reboot", "attach_volume", "detach_volume", "delete")
NEEDS_GUEST = {"stop", "reboot", "attach_volume", "detach_volume"}


@pytest.fixture
def server() -> Iterator[RealServer]:
    with tempfile.TemporaryDirectory(prefix="interlock-kill-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        quick = {"INTERLOCK_DRIVER_GUEST_SHUTDOWN_TIMEOUT_MS": "5000", "INTERLOCK_DRIVER_INSPECT_RETRY_MS": "50"}
        one = RealServer(folder / "data", quick)
        one.start()
        kernel = nano_guest(folder)
        with Path(kernel.path).open("rb") as file:
            form = {"name": "nano", "kind": "kernel", "cmdline": "nano"}
            one.client.post("/v1/images", data=form, files={"kernel": file}).raise_for_status()
        one.client.post("/v1/volumes", json={"name": "data", "size_mib": 1}).raise_for_status()
        try:
            yield one
        finally:
            one.kill()
            end_guests(one.folder)


def test_a_vm_survives_the_kill_of_its_server_at_any_moment(server: RealServer) -> None:
    chance = random.Random(20_26)
    acknowledged: list[str] = []
    for number in range(ROUNDS):
        operation = KILLED_IN[number % len(KILLED_IN)]
        prepare(server, operation)
        asked = ask(server, operation)
        assert asked.status_code == 202, (number, operation, asked.text)
        acknowledged.append(asked.json()["request"]["id"])
        time.sleep(chance.random() * LIVES_S)  # how long the server lives is what the round is about
        server.kill()
        server.start()
        for request_id in acknowledged:
            assert server.ended(request_id)["status"] == "succeeded", (number, operation, server.ended(request_id))
        agree(server, f"round {number}, killed in {operation}")
    delete(server)
    server.stop()
    assert guests_in(server.folder) == []
    assert list((server.folder / "guests" / "vms").iterdir()) == []


def ask(server: RealServer, operation: str) -> httpx.Response:
    if operation == "create":
        return server.client.post("/v1/instances", json={"name": VM, "image": "nano", "memory_mib": 64})
    return server.submit(VM, operation, **({"volume": "data"} if "volume" in operation else {}))


def carry_out(server: RealServer, operation: str) -> None:
    answer = ask(server, operation)
    assert answer.status_code == 202, (operation, answer.text)
    ended = server.ended(answer.json()["request"]["id"])
    assert ended["status"] == "succeeded", ended


def prepare(server: RealServer, operation: str) -> None:
    """Bring the VM to where the operation has something to do."""
    if operation == "create":
        delete(server)
        return
    if server.client.get(f"/v1/instances/{VM}").status_code == 404:
        carry_out(server, "create")
    instance = server.get(f"/v1/instances/{VM}")
    if operation in NEEDS_GUEST and instance["vm_state"] == "stopped":
        carry_out(server, "start")
    if operation == "start" and instance["vm_state"] == "active":
        carry_out(server, "stop")
    if operation == "attach_volume" and instance["volumes"]:
        carry_out(server, "detach_volume")
    if operation == "detach_volume" and not instance["volumes"]:
        carry_out(server, "attach_volume")


def delete(server: RealServer) -> None:
    if server.client.get(f"/v1/instances/{VM}").status_code == 200:
        carry_out(server, "delete")


def agree(server: RealServer, when: str) -> None:
    """Nothing is stuck, and record and processes say the same."""
    assert server.get("/v1/stuck")["items"] == [], when
    (volume,) = server.get("/v1/volumes")["items"]
    instances = server.get("/v1/instances")["items"]
    running = [one for one in instances if one["vm_state"] == "active"]
    assert len(guests_in(server.folder)) == len(running), (when, instances)
    for instance in instances:
        assert (instance["task_state"], instance["outstanding"]) == ("none", []), (when, instance)
        assert instance["vm_state"] in {"active", "stopped"}, (when, instance)
        assert instance["volumes"] == ([volume["id"]] if volume["attached_to"] == instance["id"] else []), when
        path = server.folder / "guests" / "vms" / instance["id"] / "inside"
        assert (find_in(path) is not None) == (instance["vm_state"] == "active"), (when, instance)
    if not instances:
        assert volume["attached_to"] is None, when
