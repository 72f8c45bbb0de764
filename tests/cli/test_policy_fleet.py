"""`policy fleet`: what is counted of all pages, what another policy would change, and what cannot be asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli import wire_samples
from cli.conftest import Ran
from cli.scripted_server import Given, ScriptedServer
from interlock.api.routes.policy import policy_view
from interlock.api.schemas.hosts import HostList
from interlock.api.schemas.responses import InstancePage
from interlock.cli.application import run
from interlock.cli.commands.policy.group import policy_commands
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named
from interlock.ports import HostState

Fleet = Callable[..., Ran]
NO_STOP = """
[policy]
name = "no-stop"
extends = "standard"

[[rule]]
id = "never-stop"
operations = ["stop"]
tags = ["gold"]
verdict = "deny"
reason = "gold_runs"
"""


def vm(number: int, **changes: Any) -> Any:
    return wire_samples.instance(id=f"i-{number}", name=f"vm-{number}", **changes)


def shown() -> dict[str, Any]:
    """The policy of the server."""
    policy = compile_named("standard", frozenset(Operation) - {Operation.BACKUP})
    document: dict[str, Any] = msgspec.to_builtins(policy_view(policy))
    return document


def hosts(**states: HostState) -> HostList:
    """The hosts that are in these states, and a server's own."""
    others = tuple(wire_samples.other_host(name, state, linked=state is HostState.UP) for name, state in states.items())
    return HostList(own="here", items=others)


@pytest.fixture
def fleet(folder: Path, server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> Fleet:
    """Run the command in this process, against a server that performs everything but a backup."""
    root = policy_commands
    server.on("GET", "/v1/policy", Given(200, shown()))
    server.on("GET", "/v1/hosts", Given(200, hosts()))
    rebooting = wire_samples.request(
        status=Status.IN_FLIGHT,
        phase="rebooting",
        taken_at=wire_samples.AT,
        last_sign_of_life_at=wire_samples.AT,
    )
    first = (vm(1, tags=("gold",)), vm(2, vm_state=VmState.STOPPED), vm(3, locked_by="alice"))
    second = (vm(4, outstanding=(rebooting,), task_state="rebooting"), vm(5, tags=("gold",)))
    server.on(
        "GET",
        "/v1/instances",
        Given(200, InstancePage(items=first, next_cursor="next")),
        Given(200, InstancePage(items=second, next_cursor=None)),
    )

    def call(*arguments: str | Path) -> Ran:
        code = run(root, ["fleet", *[str(one) for one in arguments]], {"INTERLOCK_DATA_DIR": str(folder)})
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


@pytest.fixture
def no_stop(tmp_path: Path) -> Path:
    path = tmp_path / "no-stop.toml"
    path.write_text(NO_STOP)
    return path


def counted(ran: Ran, operation: str) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    found: dict[str, Any] = next(one for one in json.loads(ran.out)["operations"] if one["operation"] == operation)
    return found


def test_every_vm_of_every_page_is_counted(fleet: Fleet, server: ScriptedServer) -> None:
    stop = counted(fleet("--json"), "stop")
    assert (stop["admitted"], stop["redundant"], stop["denied"]) == (2, 1, 2)
    assert {one["reason"]: one["vms"] for one in stop["reasons"]} == {
        "already_stopped": 1,
        "locked": 1,
        "no_sign_of_life": 1,
    }
    pages = [asked.target for asked in server.asked if asked.path == "/v1/instances"]
    assert pages == ["/v1/instances?limit=500", "/v1/instances?limit=500&cursor=next"]


def test_an_admin_is_not_bound_by_a_lock(fleet: Fleet) -> None:
    assert counted(fleet("--json", "--role", "admin"), "stop")["admitted"] == 3


def test_people_see_one_line_for_each_operation(fleet: Fleet) -> None:
    ran = fleet()
    assert ran.code == 0, ran.err
    assert "Policy standard on 5 VMs, role member." in ran.out
    (line,) = [line for line in ran.out.splitlines() if line.startswith("stop ")]
    assert line.split()[1:4] == ["2", "1", "2"]
    assert "locked 1" in line


def test_what_another_policy_would_change_is_grouped_with_examples(fleet: Fleet, no_stop: Path) -> None:
    ran = fleet("--policy", no_stop)
    assert ran.code == 0, ran.err
    expected = "2 VMs would refuse stop by the rule never-stop (gold_runs), and accept it now: vm-1, vm-5"
    assert [line.strip() for line in ran.out.splitlines() if "would refuse" in line] == [expected]


def test_programs_get_the_same_changes(fleet: Fleet, no_stop: Path) -> None:
    document = json.loads(fleet("--json", "--policy", no_stop).out)
    (change,) = document["changes"]
    assert (change["operation"], change["vms"], change["examples"]) == ("stop", 2, ["vm-1", "vm-5"])
    assert change["then"] == {"disposition": "denied", "rule": "never-stop", "reason": "gold_runs"}
    assert change["now"]["disposition"] == "admitted"


def test_a_policy_that_changes_nothing_says_so(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "same.toml"
    path.write_text('[policy]\nname = "same"\nextends = "standard"\n')
    document = json.loads(fleet("--json", "--policy", path).out)
    assert document["changes"] == [], "what the server's driver does not perform is no change either"


def test_the_vms_of_a_fenced_host_could_be_evacuated(fleet: Fleet, server: ScriptedServer) -> None:
    """Of one whose agent is only away they could not."""
    server.on("GET", "/v1/hosts", Given(200, hosts(south=HostState.FENCED, north=HostState.LOST)))
    vms = (vm(1, host="south"), vm(2, host="north"), vm(3, host="here"))
    server.on("GET", "/v1/instances", Given(200, InstancePage(items=vms, next_cursor=None)))
    document = json.loads(fleet("--json", "--role", "admin").out)
    counts = {one["operation"]: (one["admitted"], one["denied"]) for one in document["operations"]}
    assert counts["evacuate"] == (1, 2)


def test_no_vm_is_no_error(fleet: Fleet, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances", Given(200, InstancePage(items=(), next_cursor=None)))
    ran = fleet("--policy", "take2")
    assert (ran.code, ran.out) == (0, "Policy standard on 0 VMs, role member.\n")


def test_a_policy_that_is_wrong_is_told_before_the_server_is_asked(fleet: Fleet, server: ScriptedServer) -> None:
    ran = fleet("--policy", "standrad")
    assert ran.code == 2
    assert "standrad" in ran.err
    assert server.asked == []


def test_failures_and_the_age_of_a_state_count(fleet: Fleet, folder: Path, server: ScriptedServer) -> None:
    """As on the server, whose records have both."""
    file = folder / "site.toml"
    file.write_text("""
[policy]
name = "site"
extends = "standard"

[[rule]]
id = "fails-again"
operations = ["reboot"]
failures_min = 3
verdict = "deny"
reason = "fails_again"

[[rule]]
id = "just-started"
operations = ["stop"]
vm_state = ["active"]
state_for = "10m"
verdict = "deny"
reason = "long_runner"
""")
    failing = vm(1, failures={Operation.REBOOT: 3}, state_since_at=wire_samples.AT, updated_at=wire_samples.AT)
    failed = vm(2, failures={Operation.REBOOT: 2}, state_since_at="2026-03-01T11:00:00.000Z")
    server.on("GET", "/v1/instances", Given(200, InstancePage(items=(failing, failed), next_cursor=None)))
    changes = json.loads(fleet("--policy", str(file), "--json").out)["changes"]
    found = {(one["operation"], tuple(one["examples"]), one["then"]["reason"]) for one in changes}
    assert found == {("reboot", ("vm-1",), "fails_again"), ("stop", ("vm-2",), "long_runner")}
