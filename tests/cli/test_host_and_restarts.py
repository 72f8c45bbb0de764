"""`host show`, `--restart`, and what is said when a VM does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import instance, other_host, problem
from interlock.api.schemas.hosts import HostCapacity, HostEvent, HostEventList, HostList, Protection, Resources
from interlock.core.restart_policy import OnCrash, RestartPolicy
from interlock.ports import HostState

VM = "/v1/instances/demo"


def test_the_host_is_shown_with_what_is_free(interlock: Interlock, server: ScriptedServer) -> None:
    stands = HostCapacity(
        name="here",
        hypervisor="qemu",
        accelerator="tcg",
        protections=(
            Protection(name="own_user", on=True, detail="user ids 1 to 9"),
            Protection(name="memory_limit", on=False, detail="no cgroups"),
        ),
        guests=3,
        total=Resources(memory_mib=1000, vcpus=32, disk_mib=None),
        promised=Resources(memory_mib=400, vcpus=3, disk_mib=7),
        free=Resources(memory_mib=600, vcpus=29, disk_mib=None),
        disk_free_mib=12345,
    )
    server.on("GET", "/v1/host", Given(value=stands))
    ran = interlock("host", "show")
    assert ran.code == 0
    assert [line.split() for line in ran.out.splitlines()] == [
        ["here:", "3", "VMs,", "hypervisor", "qemu", "(tcg)"],
        ["TOTAL", "CLAIMED", "FREE"],
        ["Memory", "(MiB)", "1000", "400", "600"],
        ["vCPUs", "32", "3", "29"],
        ["Disk", "(MiB)", "unlimited", "7", "unlimited"],
        ["Free", "disk", "space:", "12345", "MiB"],
        ["protections", "of", "VMs:"],
        ["own_user", "on", "user", "ids", "1", "to", "9"],
        ["memory_limit", "OFF", "no", "cgroups"],
    ]


def test_what_happened_to_the_servers_own_host_is_shown_without_its_name(
    interlock: Interlock, server: ScriptedServer
) -> None:
    server.on("GET", "/v1/hosts", Given(value=HostList(own="here", own_drain=None, items=())))
    jumped = HostEvent(kind="clock_jumped", at="2026-01-02T03:04:05Z", by=None, detail="The clock jumped 9 days ahead.")
    server.on("GET", "/v1/hosts/here/events", Given(value=HostEventList(items=(jumped,))))
    ran = interlock("host", "events")
    assert ran.code == 0
    assert "clock_jumped" in ran.out
    assert "The clock jumped 9 days ahead." in ran.out


def test_restart_is_one_word_for_a_whole_policy(interlock: Interlock, server: ScriptedServer) -> None:
    restart = RestartPolicy(on_crash=OnCrash.RESTART)
    server.on("PATCH", VM, Given(value=instance(restart=restart, restarts=2)))
    ran = interlock("vm", "label", "demo", "--restart", "on-crash")
    assert ran.code == 0
    wish = server.asked[-1].json["restart"]
    assert (wish["on_crash"], wish["on_power_off"]) == ("restart", "leave")
    assert "restart when it crashed; at most 5 times within 600 s, 2 so far" in ran.out
    interlock("vm", "label", "demo", "--restart", "always")
    assert server.asked[-1].json["restart"]["on_power_off"] == "restart"
    interlock("vm", "label", "demo", "--restart", "never")
    assert server.asked[-1].json["restart"]["on_crash"] == "leave"
    assert interlock("vm", "label", "demo", "--restart", "sometimes").code == 2


def test_what_does_not_fit_is_told_in_words(interlock: Interlock, server: ScriptedServer) -> None:
    said = "demo does not fit on the host here: needs 4096 MiB of memory, 1024 MiB free."
    server.on("POST", "/v1/instances", Given(409, problem(409, said)))
    ran = interlock("vm", "create", "demo", "--image", "small", "--memory", "4096")
    assert ran.code != 0
    assert said in ran.err


def test_a_vm_whose_host_is_lost_says_so(interlock: Interlock, server: ScriptedServer) -> None:
    north = other_host("north", HostState.UP, linked=True)
    states = [
        north,
        replace(north, linked=False),
        replace(north, state=HostState.LOST, linked=False),
        replace(north, state=HostState.FENCED, linked=False),
    ]
    server.on("GET", VM, *[Given(value=instance(host="north")) for _ in states])
    server.on("GET", "/v1/hosts/north", *[Given(value=host) for host in states])
    shown = [interlock("vm", "show", "demo").out.partition("Host:")[2].splitlines()[0].strip() for _ in states]
    assert shown == [
        "north",
        "north (its agent is disconnected; requests wait until it is back)",
        "north (lost: unknown whether its guests run; requests wait until it is back)",
        "north (fenced: its guests have ended; `vm evacuate` moves a VM to another host)",
    ]


def test_a_list_of_no_hosts_prints_no_empty_table(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/hosts", Given(value=HostList(own="here", own_drain=None, items=())))
    ran = interlock("host", "list")
    assert (ran.code, ran.out, ran.err) == (0, "", "No other hosts. The server runs on here.\n")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:7931", "http://", "http://north:99999"])
def test_an_agent_is_not_started_for_what_is_no_url(interlock: Interlock, tmp_path: Path, url: str) -> None:
    (tmp_path / "token").write_text("ilk_secret\n")
    ran = interlock("agent", "--server", url, "--token-file", str(tmp_path / "token"))
    assert ran.code == 2
    assert ran.err == f"Error: Invalid URL {url!r}.\n  Expected a URL such as http://127.0.0.1:7420.\n"
