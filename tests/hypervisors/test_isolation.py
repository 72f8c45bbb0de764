"""Each row of the isolation table in SECURITY.md: attacks that run in QEMU's place, confined as QEMU is."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clean_environments import ROOT
from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench, opened
from interlock.confinement import sandbox
from interlock.confinement.host_users import HostUsers, temporary_user
from interlock.confinement.sandbox import Namespaces, View, confined, namespaces_for
from interlock.core.errors import OperationRejected
from interlock.core.specs import PRIMARY
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.network import passt
from interlock.hypervisors.qemu.process.qemu_process import has_ended
from interlock.images.qemu_img import ImageTool
from interlock.service import policy_verifier
from waiting import PATIENCE_S

PERMIT = GivenPermit()
SYSTEM_PYTHON = Path("/usr/bin/python3")
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root gives each VM a user of its own"),
    pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="the attacks need the system's Python"),
]
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
PROCESSES_MAX = 12
MEMORY_MIB = 96
HOST_NAMESPACES = {kind: str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("mnt", "pid", "ipc", "uts")}


class Scene:
    """A VM, and the attacks of another one on it."""

    def __init__(self, folder: Path) -> None:
        self.victim = QemuWorkbench(_made(folder / "victim"))
        self.attacker = QemuWorkbench(_made(folder / "attacker"))
        self.image = self.victim.folder / "image.qcow2"
        self.victim_process = 0
        self.shared_memory = ctypes.CDLL(None).shmget(0x1EAF, 4096, 0o1666)
        self.program = folder / "attacks.py"
        shutil.copy(Path(__file__).with_name("attacks.py"), self.program)
        self.program.chmod(0o755)

    async def attack(self, *, namespaces: bool) -> dict[str, Any]:
        """Run the attacks in QEMU's place; return what came of them."""
        victim = await opened(self.victim)
        spec = msgspec.structs.replace(self.victim.spec(), root_gib=1)
        await victim.define(PERMIT, "victim", spec)
        await victim.power_on(PERMIT, "victim", spec)
        self.victim_process = self.victim.process_id("victim")
        root = self.victim.instance_folder("victim").roots(spec).disk(0)
        groups = victim.registry.groups
        self._describe([str(root), str(self.victim.instance_folder("victim").console)], cgroups=groups is not None)
        attacker = await self._attacker(namespaces=namespaces)
        try:
            await attacker.define(PERMIT, "attacker", self.attacker.spec())
            with pytest.raises(OperationRejected, match="QEMU did not start"):
                await attacker.power_on(PERMIT, "attacker", self.attacker.spec())
            written = self.attacker.instance_folder("attacker").errors.read_text()
            return {"victim": owner_of(self.victim_process), **json.loads(written)}
        finally:
            for hypervisor, name in ((attacker, "attacker"), (victim, "victim")):
                await hypervisor.undefine(PERMIT, name)
                await hypervisor.close()

    async def _attacker(self, *, namespaces: bool) -> QemuHypervisor:
        self.attacker.settings = msgspec.structs.replace(
            self.attacker.settings,
            qemu_binary=str(self.program),
            program_paths=(str(SYSTEM_PYTHON), str(self.program.with_name("target.json"))),
            threads_extra=PROCESSES_MAX - 1,
            memory_overhead_mib=MEMORY_MIB - 16 - self.attacker.settings.translation_cache_mib,
        )
        hypervisor = await opened(self.attacker, Told())
        # What is counted is QEMU's own: whether passt is in the group by then, which takes one, is a matter of time.
        hypervisor.registry.join_group = _not_joined  # type: ignore[method-assign, assignment]
        if not namespaces:
            hypervisor.registry.namespaces = Namespaces.NONE
        return hypervisor

    def _describe(self, files: list[str], *, cgroups: bool) -> None:
        folders = ["/", "/tmp", "/usr/lib", "/run/inside", "/dev", "/dev/shm", "/etc", str(self.program.parent)]
        target = {
            "process_id": self.victim_process,
            "files": files,
            "writable": [f"{folder}/written-by-attack" for folder in folders],
            "shared_memory": 0x1EAF,
            "processes_max": PROCESSES_MAX * 3,
            "memory_mib": MEMORY_MIB * 4,
            "cgroups": cgroups,
        }
        self.program.with_name("target.json").write_text(json.dumps(target))

    def close(self) -> None:
        for bench in (self.victim, self.attacker):
            bench.end_everything()
        ctypes.CDLL(None).shmctl(self.shared_memory, 0, None)


async def _not_joined(_guest: Guest, _process_id: int) -> None:
    """Leave a process out of the guest's control group."""


def owner_of(process_id: int) -> int:
    return Path(f"/proc/{process_id}").stat().st_uid


def groups_of(process_id: int) -> dict[str, str]:
    """The control group of a process, by controller."""
    lines = Path(f"/proc/{process_id}/cgroup").read_text().splitlines()
    return {line.split(":")[1]: line.split(":")[2] for line in lines}


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o755)
    return folder


def _attacked(*, namespaces: bool) -> dict[str, Any]:
    # Readable to all users, unlike pytest's own folders: without namespaces only the user keeps the attacker out.
    with tempfile.TemporaryDirectory(prefix="interlock-isolation-") as folder:
        Path(folder).chmod(0o755)
        scene = Scene(Path(folder))
        try:
            return asyncio.run(scene.attack(namespaces=namespaces))
        finally:
            scene.close()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What came of the attacks on a host with every protection."""
    return _attacked(namespaces=True)


@needs_bwrap
def test_a_confined_process_cannot_read_the_memory_of_another_vm(found: dict[str, Any]) -> None:
    assert found["memory"] == "No such file or directory"


@needs_bwrap
def test_a_confined_process_cannot_signal_another_vm(found: dict[str, Any]) -> None:
    assert found["signal"] == "No such process"


@needs_bwrap
def test_a_confined_process_sees_no_process_but_its_own(found: dict[str, Any]) -> None:
    assert found["processes"] == [1]


@needs_bwrap
def test_a_confined_process_cannot_read_the_files_of_another_vm(found: dict[str, Any]) -> None:
    assert set(found["files"].values()) == {"No such file or directory"}


@needs_bwrap
def test_a_confined_process_can_write_no_file(found: dict[str, Any]) -> None:
    assert found["written"] == []


@needs_bwrap
def test_a_confined_process_shares_no_memory_segments_and_no_hostname_with_the_host(found: dict[str, Any]) -> None:
    assert found["shared_memory"] == "No such file or directory"
    assert found["hostname"] == "Operation not permitted"
    assert [kind for kind, space in found["namespaces"].items() if space == HOST_NAMESPACES[kind]] == []


def test_each_vm_runs_as_a_user_of_its_own(found: dict[str, Any]) -> None:
    assert found["user"] == found["group"]
    assert found["user"] not in {0, found["victim"]}
    assert found["groups"] == []


def test_a_confined_process_has_no_privileges_and_gets_none(found: dict[str, Any]) -> None:
    status = found["status"]
    assert {name: int(status[name].strip(), 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
        **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    }
    assert status["NoNewPrivs"].strip() == "1"
    assert found["become_root"] == "Operation not permitted"


def test_a_fork_bomb_is_limited(found: dict[str, Any]) -> None:
    assert found["bomb"] == PROCESSES_MAX - 1


def test_a_process_that_takes_more_memory_than_its_vm_has_is_killed(found: dict[str, Any]) -> None:
    if not found["cgroups"]:
        pytest.skip("this host has no cgroups")
    assert found["memory_signal"] == -signal.SIGKILL


def test_without_namespaces_the_user_of_its_own_keeps_a_process_from_other_vms() -> None:
    found = _attacked(namespaces=False)
    assert found["memory"] == "Permission denied"
    assert found["signal"] == "Operation not permitted"
    assert set(found["files"].values()) == {"Permission denied"}
    assert {path for path in found["written"] if not path.startswith(("/tmp/", "/dev/shm"))} == set()
    assert found["bomb"] == PROCESSES_MAX - 1


@needs_bwrap
def test_a_user_without_privileges_gets_what_user_namespaces_allow() -> None:
    words = confined(["ls", "/proc", "/tmp"], View(folder=Path("/usr/lib"), files=(Path("/bin/ls"),)), [], None)
    assert "bwrap" not in words
    words = confined(
        ["ls", "/proc", "/"],
        View(folder=Path("/usr/lib")),
        ["--core=0"],
        None,
        namespaces=Namespaces.IN_USER_NAMESPACE,
    )
    dropped = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    if subprocess.run([*dropped, "bwrap", "--unshare-user", "--ro-bind", "/", "/", "true"], check=False).returncode:
        pytest.skip("this host permits no user namespaces")
    seen = subprocess.run([*dropped, *words], capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout
    assert [name for name in seen.split() if name.isdigit()] == ["1"]
    assert "tmp" not in seen.split()


def test_a_host_without_bubblewrap_says_why_it_has_no_namespaces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox._tried.cache_clear()
    try:
        assert "bubblewrap" in namespaces_for(None).because
    finally:
        sandbox._tried.cache_clear()


@needs_bwrap
@pytest.mark.parametrize("unit", ["interlock.service", "interlock-agent.service"])
def test_the_capabilities_of_the_packaged_units_are_enough_to_make_namespaces(unit: str) -> None:
    lines = (ROOT / "packaging" / unit).read_text().splitlines()
    given = [line.partition("=")[2] for line in lines if line.startswith("CapabilityBoundingSet=")]
    bounding = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in " ".join(given).split())])
    code = "from interlock.confinement.sandbox import *; print(namespaces_for(nobody()))"
    words = ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set={bounding}", sys.executable, "-c", code]
    assert Namespaces.BY_ROOT.name in subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Nothing of a VM may be left in the control groups."""
    yield
    assert list(Path("/sys/fs/cgroup").glob("*/interlock/*-group-test")) == []


async def test_the_control_groups_of_a_vm_have_its_limits_and_end_with_it(tmp_path: Path, nothing_left: None) -> None:
    host = QemuWorkbench(tmp_path)
    hypervisor = await opened(host)
    try:
        groups = hypervisor.registry.groups
        if groups is None or groups.kind != "cgroup version 1":
            pytest.skip("this host has no cgroups of version 1")
        await hypervisor.define(PERMIT, "group-test", host.spec())
        await hypervisor.power_on(PERMIT, "group-test", host.spec())
        places = groups_of(host.process_id("group-test"))
        name = f"/interlock/{hypervisor.registry.group_name('group-test')}"
        assert {places[controller] for controller in ("memory", "pids", "cpu", "blkio")} == {name}
        settings, top = host.settings, Path("/sys/fs/cgroup")
        memory_mib = host.spec().memory_mib + settings.translation_cache_mib + settings.memory_overhead_mib
        assert int((top / f"memory{name}/memory.limit_in_bytes").read_text()) == memory_mib << 20
        assert int((top / f"pids{name}/pids.max").read_text()) == 1 + settings.threads_extra
        assert int((top / f"cpu{name}/cpu.shares").read_text()) == 1024
        if passt.is_installed():
            process = hypervisor.registry.folder("group-test").network_process(PRIMARY)
            assert process is not None
            assert groups_of(process.process_id) == places, "of its user network too"
    finally:
        await hypervisor.undefine(PERMIT, "group-test")
        await hypervisor.close()
        host.end_everything()


@needs_bwrap
@pytest.mark.qemu
async def test_nothing_is_left_of_a_vm_whose_processes_were_all_stopped(tmp_path: Path) -> None:
    """As by the signal that freezes a VM, sent to whatever has its name; also after another server has found it."""
    host = QemuWorkbench(tmp_path)
    hypervisor = await opened(host)
    try:
        await hypervisor.define(PERMIT, "one", host.spec())
        for found_again in (False, True):
            await hypervisor.power_on(PERMIT, "one", host.spec())
            process_id = host.process_id("one")
            parent, program = parent_of(process_id)
            if program != sandbox.BWRAP:
                pytest.skip("this host permits no namespaces")
            if found_again:
                await hypervisor.close()
                hypervisor = await opened(host)
            others = [one.process_id for one in hypervisor.registry.folder("one").network_processes()]
            assert len(others) == passt.is_installed()
            with contextlib.ExitStack() as opened_here:
                watched = [opened_here.enter_context(open_pidfd(one)) for one in (parent, *others)]
                for one in (parent, process_id, *others):
                    os.kill(one, signal.SIGSTOP)
                await hypervisor.power_off(PERMIT, "one")
                for one in watched:
                    assert await asyncio.to_thread(select.select, [one], [], [], PATIENCE_S) != ([], [], [])
    finally:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()
        host.end_everything()


def parent_of(process_id: int) -> tuple[int, str]:
    parent = int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])
    return parent, Path(f"/proc/{parent}/comm").read_text().strip()


@contextlib.contextmanager
def open_pidfd(process_id: int) -> Iterator[int]:
    descriptor = os.pidfd_open(process_id)
    yield descriptor
    os.close(descriptor)


@pytest.mark.qemu
@pytest.mark.skipif(not passt.is_installed(), reason="passt is not installed")
async def test_a_stopped_passt_whose_guest_ended_while_no_server_ran_is_ended_by_the_next_one(tmp_path: Path) -> None:
    host = QemuWorkbench(tmp_path)
    hypervisor = await opened(host)
    await hypervisor.define(PERMIT, "one", host.spec())
    await hypervisor.power_on(PERMIT, "one", host.spec())
    (process,) = hypervisor.registry.folder("one").network_processes()
    await hypervisor.close()
    os.kill(process.process_id, signal.SIGSTOP)
    host.end_everything()
    assert not has_ended(process.process_id)
    hypervisor = await opened(host)
    assert has_ended(process.process_id)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


# ------------------------------------------------------------------------------------- qemu-img and policy verifier

LOOK_AROUND = """
import json, os, socket, sys
def outcome(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError as error:
        return error.strerror
    return "done"
print(json.dumps({
    "user": os.getuid(),
    "process": os.getpid(),
    "network": [name for _, name in socket.if_nameindex()],
    "folder": sorted(os.listdir(".")),
    "top": sorted(os.listdir("/")),
    "other": outcome(open, "%(other)s"),
    "write": outcome(open, "written-by-attack", "w"),
    "capabilities": [line for line in open("/proc/self/status") if line.startswith("CapEff")]
        if os.path.exists("/proc/self") else None,
}))
"""


@needs_bwrap
def test_the_image_tool_sees_the_image_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, images = tmp_path / "tools", tmp_path / "images"
    for folder in (tools, images):
        folder.mkdir()
    for name in ("ours.qcow2", "other.qcow2"):
        (images / name).touch(mode=0o640)
    program = f"#!{SYSTEM_PYTHON} -IS{LOOK_AROUND % {'other': images / 'other.qcow2'}}"
    (tools / "qemu-img").write_text(program)
    (tools / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    tool = ImageTool(users=HostUsers(1_991_000_000, 10), program_paths=(str(SYSTEM_PYTHON),))
    ended = tool.run(["check"], 60_000, reads=images / "ours.qcow2")
    assert ended.status == 0, ended
    found = json.loads(ended.output)
    assert found["user"] in range(1_991_000_000, 1_991_000_010)
    assert (found["process"], found["network"], found["folder"]) == (1, ["lo"], ["ours.qcow2"])
    assert found["other"] == "No such file or directory"
    assert found["write"] == "Read-only file system"
    assert "proc" not in found["top"]
    after = (images / "ours.qcow2").stat()
    assert (after.st_uid, after.st_mode & 0o777) == (0, 0o600), "it is the server's again"


@needs_bwrap
def test_the_policy_verifier_sees_python_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with temporary_user(HostUsers(1_991_000_000, 10), "verifier") as account:
        words = policy_verifier._command(account, namespaces_for(account).namespaces)
        place = words.index("-P")
        words[place:] = ["-c", LOOK_AROUND % {"other": tmp_path / "other"}]
        found = json.loads(subprocess.run(words, capture_output=True, check=True, timeout=PATIENCE_S).stdout)
    assert found["user"] in range(1_991_000_000, 1_991_000_010)
    assert (found["process"], found["network"]) == (1, ["lo"])
    assert found["other"] == "No such file or directory"
    assert found["write"] == "Read-only file system"
    assert found["capabilities"] == ["CapEff:\t0000000000000000\n"]
