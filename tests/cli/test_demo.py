"""`interlock demo` as far as it goes without a guest: whether a server runs, ports, and what is left behind."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import instance, problem
from interlock.cli.commands import demo
from interlock.cli.commands.demo import free_port
from interlock.cli.context import Invocation
from interlock.cli.failures import Failure
from interlock.core.operations import Operation
from interlock.core.states import PowerState, VmState
from interlock.service.request_models import NewForward


def test_a_second_demo_says_that_one_runs_and_shows_its_vm(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/healthz", Given(value={"status": "alive"}))
    forwards = (NewForward(host_port=8083, guest_port=80),)
    server.on("GET", "/v1/instances/demo", Given(value=instance(forwards=forwards)))
    ran = interlock("demo")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"A server already runs at {server.url}")
    assert "curl http://127.0.0.1:8083/" in ran.out
    assert {asked.method for asked in server.asked} == {"GET"}


def test_a_second_demo_without_its_vm_changes_nothing_either(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/healthz", Given(value={"status": "alive"}))
    server.on("GET", "/v1/instances/demo", Given(404, problem(404, "VM not found: demo.")))
    ran = interlock("demo")
    assert ran.code == 0
    assert "VM demo not found: stop the server with Ctrl-C, and run `interlock demo` again" in ran.out


@pytest.mark.parametrize(
    ("state", "power", "operation"),
    [
        (VmState.ACTIVE, PowerState.RUNNING, None),
        (VmState.RESIZED, PowerState.RUNNING, None),
        (VmState.RESIZED, PowerState.NONE, Operation.START),
        (VmState.STOPPED, PowerState.NONE, Operation.START),
        (VmState.PAUSED, PowerState.PAUSED, Operation.UNPAUSE),
        (VmState.SUSPENDED, PowerState.NONE, Operation.RESUME),
        (VmState.RESCUED, PowerState.RUNNING, Operation.UNRESCUE),
        (VmState.SHELVED_OFFLOADED, PowerState.NONE, Operation.UNSHELVE),
        (VmState.SOFT_DELETED, PowerState.NONE, Operation.RESTORE),
    ],
)
def test_a_demo_vm_is_made_to_run_again_from_every_state(
    state: VmState, power: PowerState, operation: Operation | None
) -> None:
    assert demo.runs_again_by(instance(vm_state=state, power_state=power)) is operation


@pytest.fixture
def invocation(folder: Path) -> Iterator[Invocation]:
    with contextlib.closing(Invocation({"INTERLOCK_DATA_DIR": str(folder)})) as one:
        yield one


def test_a_demo_waits_for_a_server_that_still_looks_for_its_guests(
    invocation: Invocation, server: ScriptedServer
) -> None:
    server.on("GET", "/readyz", Given(503, problem(503, "still looking")), Given(value={"ready": True, "reasons": []}))
    pauses: list[float] = []
    demo.wait_until_ready(invocation, pauses.append)
    assert len(pauses) == 1


@pytest.mark.parametrize(("status", "expected"), [(503, False), (404, True), (200, True)])
def test_a_demo_vm_that_was_frozen_without_a_server_is_noticed(
    invocation: Invocation, server: ScriptedServer, status: int, expected: bool
) -> None:
    answer = Given(value="a picture") if status == 200 else Given(status, problem(status, "no picture"))
    server.on("GET", "/v1/instances/demo/screenshot", answer)
    assert demo.responds(invocation) is expected


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(demo, "_FIRST_PORT", port)
        assert free_port() > port
        monkeypatch.setattr(demo, "_PORTS", 1)
        with pytest.raises(Failure, match="No free port"):
            free_port()
