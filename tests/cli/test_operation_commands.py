"""Each operation has a command, and each command asks for just that."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import admitted, instance, problem, refusal, request
from interlock.cli.failures import ExitCode
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.parameters import NoParameters
from interlock.core.records import Status
from interlock.core.states import VmState

REQUESTS = "/v1/instances/demo/requests"

FORWARD = {"protocol": "tcp", "host_address": "127.0.0.1"}
WITH_PARAMETERS: tuple[tuple[str, Operation, dict[str, Any]], ...] = (
    ("stop demo", Operation.STOP, {}),
    ("stop demo --hard", Operation.STOP, {"hard": True}),
    ("reboot demo", Operation.REBOOT, {}),
    ("reboot demo --hard", Operation.REBOOT, {"hard": True}),
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
    (
        "attach-interface demo --network lab --address 10.7.0.9",
        Operation.ATTACH_INTERFACE,
        {"network": "lab", "address": "10.7.0.9"},
    ),
    ("move-interface demo primary lab", Operation.MOVE_INTERFACE, {"interface": "primary", "network": "lab"}),
    (
        "set-interface demo nic --inbound 100 --outbound 0",
        Operation.SET_INTERFACE,
        {"interface": "nic", "inbound_kbit": 100, "outbound_kbit": 0},
    ),
    ("add-forward demo 8080 80", Operation.ADD_FORWARD, {"host_port": 8080, "guest_port": 80, **FORWARD}),
    ("remove-forward demo 8080", Operation.REMOVE_FORWARD, {"host_port": 8080}),
    ("migrate demo north --live", Operation.LIVE_MIGRATE, {"host": "north"}),
    ("migrate demo north --cold", Operation.MIGRATE, {"host": "north"}),
    ("set-password demo --user alice", Operation.SET_PASSWORD, {"user": "alice"}),
    ("reset-state demo --reason why", Operation.RESET_STATE, {"vm_state": "error", "reason": "why"}),
    ("rename demo web2", Operation.RENAME, {"name": "web2"}),
    ("metadata demo --set a=1 --remove b", Operation.SET_METADATA, {"set": {"a": "1"}, "remove": ["b"]}),
)
_SIMPLE: tuple[tuple[str, Operation, dict[str, Any]], ...] = tuple(
    (f"{entry.command} demo", entry.operation, {})
    for entry in CATALOGUE.values()
    if entry.command is not None and entry.parameters is NoParameters and entry.confirm is None
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


def test_every_operation_has_a_command_or_is_named_here() -> None:
    """A command is made from the definition, unless it needs more than its parameters."""
    asked = {operation for _, operation, _ in (*_SIMPLE, *WITH_PARAMETERS)}
    elsewhere = {Operation.CREATE, Operation.CRASH_DUMP, Operation.EVACUATE}  # vm create, vm dump, vm evacuate
    not_there = {Operation.LIVE_MIGRATE_ABORT, Operation.LIVE_MIGRATE_FORCE_COMPLETE}  # request cancel; none yet
    assert set(Operation) - asked == elsewhere | not_there


def test_a_password_is_prompted_for_and_sent(
    interlock: Interlock, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("click.prompt", lambda *_, **__: "s3cret")
    server.on("POST", REQUESTS, Given(202, admitted()))
    assert interlock("vm", "set-password", "demo", "--ask").code == 0
    assert server.asked[-1].json["parameters"] == {"user": "root", "password": "s3cret"}


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


DESTROYS = {
    "delete": ("vm", "delete", "demo"),
    "force-delete": ("vm", "force-delete", "demo"),
    "rebuild": ("vm", "rebuild", "demo"),
    "evacuate from the image": ("vm", "evacuate", "demo", "--from-image"),
    "volume delete": ("volume", "delete", "data"),
    "image delete": ("image", "delete", "small"),
}


@pytest.mark.parametrize("words", DESTROYS.values(), ids=DESTROYS)
def test_what_destroys_something_wants_yes_where_nobody_can_be_asked(
    interlock: Interlock, server: ScriptedServer, words: tuple[str, ...]
) -> None:
    ran = interlock(*words)
    assert (ran.code, ran.out, server.asked) == (ExitCode.USAGE, "", [])
    assert "Cannot prompt without a terminal: add --yes to confirm." in ran.err
    server.on("POST", "/v1/instances/demo/requests", Given(202, admitted()))
    server.on("DELETE", "/v1/volumes/data", Given(204))
    server.on("DELETE", "/v1/images/small", Given(204))
    assert interlock(*words, "--yes").code == 0
    assert len(server.asked) == 1


def test_a_password_that_was_made_up_is_told_once_it_is_set(interlock: Interlock, server: ScriptedServer) -> None:
    """Found by a guest without an agent: the password came first, and `Failed` after it."""
    server.on("POST", "/v1/instances/demo/requests", Given(202, msgspec.structs.replace(admitted(), password="s3cret")))
    server.on("GET", "/v1/requests/r-1", Given(value=request(status=Status.FAILED, message="There is no agent.")))
    ran = interlock("vm", "set-password", "demo", "--wait")
    assert ran.code != 0
    assert "s3cret" not in ran.out + ran.err
    server.on("GET", "/v1/requests/r-1", Given(value=request(status=Status.SUCCEEDED)))
    ran = interlock("vm", "set-password", "demo", "--wait")
    assert ran.out.splitlines()[-1] == "The password, shown only once: s3cret"
    ran = interlock("vm", "set-password", "demo")
    assert ran.out.splitlines()[-1] == "  Once that has succeeded, the password is: s3cret"


@pytest.mark.parametrize(
    ("typed", "mib"), [("256", 256), ("2GiB", 2048), ("2g", 2048), ("1.5 GiB", 1536), ("512MiB", 512), ("1T", 1 << 20)]
)
def test_a_size_may_have_a_unit(interlock: Interlock, server: ScriptedServer, typed: str, mib: int) -> None:
    server.on("POST", "/v1/instances/demo/requests", Given(202, admitted()))
    assert interlock("vm", "resize", "demo", "--memory", typed).code == 0
    assert server.asked[-1].json["parameters"] == {"memory_mib": mib}


@pytest.mark.parametrize("typed", ["", "lots", "-1", "63", "1.5", "2GB", "1e3", "nan", "12kib", "9" * 13, "2 GiB x"])
def test_what_is_no_size_is_told_what_to_write(interlock: Interlock, server: ScriptedServer, typed: str) -> None:
    ran = interlock("vm", "resize", "demo", f"--memory={typed}")
    assert (ran.code, server.asked) == (ExitCode.USAGE, [])
    assert repr(typed) in ran.err


@pytest.mark.parametrize(("typed", "mib"), [("10", 10_240), ("0.5", 512), ("0.001", 1), ("3MiB", 3)])
def test_a_volume_is_so_many_gib_unless_a_unit_is_named(
    interlock: Interlock, server: ScriptedServer, typed: str, mib: int
) -> None:
    server.on("POST", "/v1/volumes", Given(403, problem(403, "no")))
    interlock("volume", "create", "data", "--size", typed)
    assert server.asked[-1].json == {"name": "data", "size_mib": mib}


def test_a_refusal_for_protection_names_the_way_out(interlock: Interlock, server: ScriptedServer) -> None:
    blocked = refusal(reason="operation_blocked", operation=Operation.FORCE_DELETE)
    server.on("POST", "/v1/instances/demo/requests", Given(409, blocked))
    ran = interlock("vm", "force-delete", "demo", "--yes")
    assert "`interlock vm unprotect demo --from force-delete` removes the protection." in ran.err
