"""Each operation has a command, and each command asks for just that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import admitted, instance
from interlock.cli.operations import SIMPLE
from interlock.core.operations import Operation
from interlock.core.states import VmState

REQUESTS = "/v1/instances/demo/requests"

WITH_PARAMETERS: tuple[tuple[str, Operation, dict[str, Any]], ...] = (
    ("stop demo", Operation.STOP, {}),
    ("stop demo --hard", Operation.STOP, {"hard": True}),
    ("delete demo --yes", Operation.DELETE, {}),
    ("force-delete demo --yes", Operation.FORCE_DELETE, {}),
    ("rebuild demo --yes", Operation.REBUILD, {}),
    ("rebuild demo --yes --image debian", Operation.REBUILD, {"image": "debian"}),
    ("rescue demo --image debian", Operation.RESCUE, {"image": "debian"}),
    ("resize demo --vcpus 2 --memory 512", Operation.RESIZE, {"vcpus": 2, "memory_mib": 512}),
    ("resize demo --root-size 10", Operation.RESIZE, {"root_gib": 10}),
    ("snapshot demo golden", Operation.SNAPSHOT, {"name": "golden"}),
    ("backup demo --keep 7", Operation.BACKUP, {"backup_type": "daily", "rotation": 7}),
    ("backup demo --type weekly --keep 4", Operation.BACKUP, {"backup_type": "weekly", "rotation": 4}),
    ("attach demo data", Operation.ATTACH_VOLUME, {"volume": "data"}),
    ("detach demo data", Operation.DETACH_VOLUME, {"volume": "data"}),
    ("swap-volume demo old new", Operation.SWAP_VOLUME, {"old": "old", "new": "new"}),
    ("swap-volume demo old new --no-copy", Operation.SWAP_VOLUME, {"old": "old", "new": "new", "copy": False}),
    ("attach-interface demo", Operation.ATTACH_INTERFACE, {}),
    ("attach-interface demo --mac 52:54:00:00:00:01", Operation.ATTACH_INTERFACE, {"mac": "52:54:00:00:00:01"}),
    ("detach-interface demo nic", Operation.DETACH_INTERFACE, {"interface": "nic"}),
    ("migrate demo north --live", Operation.LIVE_MIGRATE, {"host": "north"}),
    ("migrate demo north --cold", Operation.MIGRATE, {"host": "north"}),
    ("set-password demo --user alice", Operation.SET_PASSWORD, {"user": "alice"}),
    ("reset-state demo --reason why", Operation.RESET_STATE, {"vm_state": "error", "reason": "why"}),
    ("metadata demo --set a=1 --remove b", Operation.SET_METADATA, {"set": {"a": "1"}, "remove": ["b"]}),
)
_SIMPLE: tuple[tuple[str, Operation, dict[str, Any]], ...] = tuple(
    (f"{name} demo", operation, {}) for name, (operation, _) in SIMPLE.items()
)


@pytest.mark.parametrize(("line", "operation", "parameters"), [*_SIMPLE, *WITH_PARAMETERS])
def test_a_command_asks_for_its_operation(
    interlock: Interlock, server: ScriptedServer, line: str, operation: Operation, parameters: dict[str, Any]
) -> None:
    server.on("POST", REQUESTS, Given(202, admitted()))
    ran = interlock("vm", *line.split())
    assert ran.code == 0, ran.err
    (asked,) = server.asked
    assert asked.json == {"operation": operation.value, "parameters": parameters}


@pytest.mark.parametrize(
    "line", ["resize demo", "metadata demo", "metadata demo --set a", "metadata demo --set a=1 --set a=2"]
)
def test_what_asks_for_nothing_is_not_sent(interlock: Interlock, server: ScriptedServer, line: str) -> None:
    assert interlock("vm", *line.split()).code == 2
    assert server.asked == []


@pytest.mark.parametrize(
    ("vm_state", "operation"),
    [
        (VmState.ACTIVE, Operation.LIVE_MIGRATE),
        (VmState.PAUSED, Operation.LIVE_MIGRATE),
        (VmState.STOPPED, Operation.MIGRATE),
    ],
)
def test_a_migration_is_live_where_there_is_something_to_keep_running(
    interlock: Interlock, server: ScriptedServer, vm_state: VmState, operation: Operation
) -> None:
    server.on("GET", "/v1/instances/demo", Given(200, instance(vm_state=vm_state)))
    server.on("POST", REQUESTS, Given(202, admitted()))
    ran = interlock("vm", "migrate", "demo", "north")
    assert ran.code == 0, ran.err
    assert server.asked[-1].json == {"operation": operation.value, "parameters": {"host": "north"}}


def test_a_password_that_was_made_up_is_told(interlock: Interlock, server: ScriptedServer) -> None:
    answer = admitted()
    server.on("POST", REQUESTS, Given(202, {**json.loads(_encoded(answer)), "password": "correct horse"}))
    assert "The password, told this once: correct horse" in interlock("vm", "set-password", "demo").out


def test_a_resize_and_interfaces_are_shown(interlock: Interlock, server: ScriptedServer) -> None:
    one = json.loads(_encoded(instance()))
    one["prior_size"] = {"vcpus": 1, "memory_mib": 64, "root_gib": 3}
    one["interfaces"] = [{"id": "nic", "mac": "52:54:00:00:00:01"}]
    server.on("GET", "/v1/instances/demo", Given(200, one))
    out = interlock("vm", "show", "demo").out
    assert "Size before:    1 vcpu, 64 MiB memory, root disk 3 GiB" in out
    assert "52:54:00:00:00:01 [nic]" in out


def _encoded(value: object) -> bytes:
    import msgspec

    return msgspec.json.encode(value)
