"""The parts of confinement one by one: users that are claimed, control groups on a made-up file system, reports."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from interlock.confinement import host_users
from interlock.confinement.control_groups import (
    GroupLimits,
    Resource,
    SystemdScopes,
    VersionTwo,
    control_groups,
)
from interlock.confinement.host_users import HostUsers
from interlock.confinement.sandbox import Namespaced, Namespaces
from interlock.core.errors import OperationRejected
from interlock.hypervisors.factory import log_protections
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.protections import protections
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.networks import host_abilities, host_programs
from waiting import until

FIRST = 1_990_000_000
LIMITS = GroupLimits(memory_bytes=1 << 30, threads=100, cpu_weight=200, io_weight=50)
MADE = Namespaced(namespaces=Namespaces.BY_ROOT, because="")


@pytest.fixture
def users(tmp_path: Path) -> HostUsers:
    users = HostUsers(FIRST, 3, tmp_path / "users")
    (tmp_path / "users").mkdir()
    return users


def test_no_two_vms_have_the_same_user_at_once(users: HostUsers) -> None:
    claims = [users.claim(name) for name in ("a", "b", "c")]
    assert {claim.user_id for claim in claims} == {FIRST, FIRST + 1, FIRST + 2}
    with pytest.raises(OperationRejected, match="All 3 users"):
        users.claim("d")
    os.close(claims[1].descriptor)
    again = users.claim("d")
    assert again.user_id == claims[1].user_id
    for claim in (claims[0], claims[2], again):
        os.close(claim.descriptor)


def test_a_vm_gets_the_same_user_again_while_that_is_free(users: HostUsers) -> None:
    first = users.claim("a")
    os.close(first.descriptor)
    second = users.claim("a")
    os.close(second.descriptor)
    assert first.user_id == second.user_id


def test_a_user_stays_claimed_by_the_process_that_inherited_it_when_the_server_has_ended(users: HostUsers) -> None:
    claim = users.claim("a")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[claim.descriptor]) as process:
        os.close(claim.descriptor)
        others = [users.claim(name) for name in ("b", "c")]
        assert claim.user_id not in {other.user_id for other in others}
        with pytest.raises(OperationRejected):
            users.claim("a")
        process.communicate()
    assert users.claim("a").user_id == claim.user_id
    for other in others:
        os.close(other.descriptor)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")
def test_a_process_that_unlocks_its_user_does_not_free_it(users: HostUsers) -> None:
    claim = users.claim("a")
    words = ["setpriv", f"--reuid={claim.user_id}", "--clear-groups", "cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        until(lambda: Path(f"/proc/{process.pid}").stat().st_uid == claim.user_id)
        fcntl.flock(claim.descriptor, fcntl.LOCK_UN)
        other = users.claim("a")
        assert other.user_id != claim.user_id
        process.communicate()
    for one in (claim, other):
        os.close(one.descriptor)


def test_users_that_do_not_exist_in_a_container_are_not_used(
    users: HostUsers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert users.unusable() == ""
    (tmp_path / "map").write_text("0 100000 65536\n")
    monkeypatch.setattr(host_users, "_MAP", tmp_path / "map")
    assert "do not exist in this container" in users.unusable()


# ------------------------------------------------------------------------------------------------ control groups


def made_up(folder: Path, controllers: str) -> VersionTwo:
    """A tree with the files that the kernel would make."""
    for place in (folder, folder / "interlock", folder / "interlock" / "vm"):
        place.mkdir(exist_ok=True)
        (place / "cgroup.controllers").write_text(controllers)
        (place / "cgroup.subtree_control").write_text("")
    return VersionTwo(folder)


def test_version_two_passes_controllers_on_and_writes_limits(tmp_path: Path) -> None:
    groups = made_up(tmp_path, "cpuset cpu io memory pids")
    groups.prepare()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +io +memory +pids"
    for place in (tmp_path, tmp_path / "interlock"):
        (place / "cgroup.subtree_control").write_text("cpu io memory pids")
    assert groups.resources == frozenset(Resource)
    groups.place("vm", 1234, LIMITS)
    group = tmp_path / "interlock" / "vm"
    names = ("memory.max", "pids.max", "cpu.weight", "io.weight", "cgroup.procs")
    assert [(group / name).read_text() for name in names] == [str(1 << 30), "100", "200", "50", "1234"]
    groups.join("vm", 5678)
    assert [(group / name).read_text() for name in names] == [str(1 << 30), "100", "200", "50", "5678"]


def test_version_two_without_a_controller_does_without_it(tmp_path: Path) -> None:
    groups = made_up(tmp_path, "memory")
    (tmp_path / "interlock" / "cgroup.subtree_control").write_text("memory")
    groups.prepare()
    groups.place("vm", 1234, LIMITS)
    assert groups.resources == {Resource.MEMORY}
    assert not (tmp_path / "interlock" / "vm" / "pids.max").exists()


def test_where_systemd_runs_a_vm_gets_a_scope_by_one_call(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def call(words: list[str]) -> None:
        calls.append(words)
        raise OSError("recorded")

    with pytest.raises(OSError, match="recorded"):
        SystemdScopes(tmp_path, as_root=True, call=call).place("vm", 1234, LIMITS)
    assert " ".join(calls[0]) == (
        "busctl --system --quiet call org.freedesktop.systemd1 /org/freedesktop/systemd1 "
        "org.freedesktop.systemd1.Manager StartTransientUnit ssa(sv)a(sa(sv)) interlock-vm.scope fail 8 "
        "PIDs au 1 1234 Slice s interlock.slice Description s Interlock VM vm CollectMode s inactive-or-failed "
        "MemoryMax t 1073741824 TasksMax t 100 CPUWeight t 200 IOWeight t 50 0"
    )


def test_a_host_without_a_writable_cgroup_file_system_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n")
    assert control_groups(mounts, tmp_path / "absent") == (None, "no cgroup file system is mounted")
    mounts.write_text(f"cgroup2 {tmp_path}/absent cgroup2 ro 0 0\n")
    found, why = control_groups(mounts, tmp_path / "absent")
    assert found is None
    assert "No such file or directory" in why
    systemd = tmp_path / "systemd"
    systemd.mkdir()
    tool = tmp_path / "busctl"
    tool.write_text("#!/bin/sh\necho No system bus. >&2; exit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert control_groups(mounts, systemd) == (None, "systemd scope: No system bus.")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes to a user who may not")
def test_a_group_of_another_user_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    (tmp_path / "interlock").mkdir(mode=0o755)
    (tmp_path / "mounts").write_text(f"cgroup {tmp_path} cgroup rw,memory 0 0\n")
    for folder in (tmp_path.parent, tmp_path.parent.parent, tmp_path.parent.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o111)
    os.seteuid(65_534)
    try:
        found, why = control_groups(tmp_path / "mounts", tmp_path / "absent")
    finally:
        os.seteuid(0)
    assert found is None
    assert "Permission denied" in why


# ---------------------------------------------------------------------------------------------------- reports


def test_protections_are_reported_by_name_with_how_or_why_not(users: HostUsers) -> None:
    on = protections(users, MADE, None, "no cgroup file system is mounted", has_passt=True, no_filter="")
    found = {one.name: one for one in on}
    assert [one.name for one in on if not one.on] == ["memory_limit", "cpu_weight", "io_weight"]
    assert found["own_user"].detail == f"user ids {FIRST} to {FIRST + 2}"
    assert found["memory_limit"].detail == "no cgroup file system is mounted"
    because = Namespaced(namespaces=Namespaces.NONE, because="bwrap is missing")
    off = protections("not root", because, None, "none", has_passt=True, no_filter="")
    assert {one.name for one in off if one.on} == {"no_privileges", "system_call_filter"}
    assert {one.detail for one in off if one.name.endswith("_namespace")} == {"bwrap is missing"}


@pytest.mark.parametrize(
    ("shared", "missing", "has_passt", "why"),
    [
        (False, "", True, ""),
        (False, "nft is not installed (package nftables)", True, "nft is not installed (package nftables)"),
        (True, "", True, "VMs have no users of their own: not root"),
        (False, "", False, "passt is not installed; VMs have QEMU's own user network, and reach no address"),
    ],
)
def test_a_host_says_whether_it_filters_user_networks_and_if_not_why(
    users: HostUsers, shared: bool, missing: str, has_passt: bool, why: str
) -> None:
    given = "not root" if shared else users
    found = protections(given, MADE, None, "none", has_passt=has_passt, no_filter=missing)
    (line,) = [one for one in found if one.name == "user_network_filter"]
    assert line.on == (not why)
    assert line.detail == (why or "rules of nftables by the user of each passt process")


def test_what_keeps_a_host_from_filtering_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("CapEff:\t0000000000001000\n")
    monkeypatch.setattr(host_abilities, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(host_programs, "_SYSTEM", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host_abilities.why_no_filter() == "nft is not installed (package nftables)"
    program = tmp_path / "nft"
    program.write_text("#!/bin/sh\necho Error: Operation not permitted >&2; exit 1\n")
    program.chmod(0o755)
    assert host_abilities.why_no_filter() == "nft does not work: Error: Operation not permitted"
    program.write_text("#!/bin/sh\n")
    assert not host_abilities.why_no_filter()
    (tmp_path / "status").write_text("CapEff:\t0000000000000000\n")
    assert host_abilities.why_no_filter() == "the server has no CAP_NET_ADMIN (run it as root)"


def test_the_log_names_what_is_on_and_why_the_rest_is_off(users: HostUsers, tmp_path: Path) -> None:
    hypervisor = QemuHypervisor(QemuSettings(folder=tmp_path))
    with capture_logs() as nothing:
        log_protections(hypervisor)
    why = "no cgroup file system is mounted"
    hypervisor.registry.protections = protections(users, MADE, None, why, has_passt=True, no_filter="")
    with capture_logs() as logs:
        log_protections(hypervisor)
    assert nothing == []
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("protections selected", "warning")
    assert line["on"][:2] == ["own_user", "no_privileges"]
    assert line["off"] == dict.fromkeys(("memory_limit", "cpu_weight", "io_weight"), "no cgroup file system is mounted")
