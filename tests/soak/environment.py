"""What a soak stands on: a server, the agent of a second host, images, volumes, and the VMs that are to be there."""

from __future__ import annotations

import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from websockets.sync.client import ClientConnection, connect

from benchmarks.nano_guest import GREETING, nano_guest
from processes.real_agent import RealAgent
from processes.real_server import RealServer, end_guests
from soak.report import Book

HERE: Final = "here"
"""What the server's own host is called."""
FAR: Final = "far"
"""What the other one is called."""
VOLUMES: Final = 6
NANO: Final = "nano"
SMALL: Final = "small-disk"
LEASE_MS: Final = 8_000
_MARGIN_MS: Final = 3_000
_QUICK: Final = {
    "INTERLOCK_DRIVER_GUEST_SHUTDOWN_TIMEOUT_MS": "3000",
    "INTERLOCK_DRIVER_INSPECT_RETRY_MS": "100",
    "INTERLOCK_DRIVER_HEARTBEAT_MS": "1000",
    "INTERLOCK_DRIVER_CONVERGE_TIMEOUT_MS": "20000",
    "INTERLOCK_HOST": HERE,
    "INTERLOCK_HOSTS_LEASE_MS": str(LEASE_MS),
    "INTERLOCK_HOSTS_LEASE_MARGIN_MS": str(_MARGIN_MS),
}
_QUICK_QEMU: Final = {
    "INTERLOCK_QEMU_LIVENESS_INTERVAL_MS": "1000",
    "INTERLOCK_QEMU_LIVENESS_TIMEOUT_MS": "5000",
    "INTERLOCK_QEMU_MEMORY_STALL_TIMEOUT_MS": "10000",
}
"""What the guests of both hosts are held with, so that one that stands still is noticed soon."""
_GREETINGS: Final = {NANO: GREETING, SMALL: "interlock-guest: up"}
_PORTS: Final = range(20_000, 30_000)
"""Below those that the system gives to whoever calls, so that none is taken while nobody listens on it."""
_MARK_AT: Final = 1 << 20
"""Where on the disk of a small guest nothing of its own is; see `guests.small_disk`."""
_SECTOR: Final = 512
_OF_PROGRESS: Final = ("vm_state", "task_state", "power_state", "host", "guest_trouble", "generation")
_PATIENCE_S: Final = 120.0
_AT_MOST_S: Final = 1_200.0
"""For what never comes to rest, such as a request that is performed again and again."""
_LOOK_AGAIN_S: Final = 0.1
_LOOKS: Final = 200
_TYPE_AGAIN_S: Final = 5.0


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM as it is made, and made again where it was deleted."""

    name: str
    image: str
    host: str
    root_gib: int
    port: int | None
    """Of the host, forwarded to the guest's port 80."""

    @property
    def small(self) -> bool:
        """Whether it is a Linux that boots from its own disk."""
        return self.image == SMALL

    @property
    def mark(self) -> bytes:
        """What is written on the disk of a small one before anything else is done to it."""
        return f"the disk of {self.name}".encode()


class Ground:
    """One folder, with a host in each of its folders `here` and `far`.

    Args:
        folder: QEMU's user must be able to pass through it.
        vms: how many.
        small: how many of them boot from a disk.
        hosts: 1 or 2.
        shared: whether the hosts have all disks in common.
        packages: where packages for the small guest, and what was built of them, are kept already; None: nowhere.
    """

    def __init__(
        self,
        folder: Path,
        book: Book,
        *,
        vms: int,
        small: int,
        hosts: int,
        shared: bool,
        packages: Path | None,
    ) -> None:
        self.folder = folder
        self.shared = folder / HERE / "shared" if shared else None
        """Where root disks are that both hosts can reach; None where each has its own."""
        self.book = book
        self._packages = packages
        ports = _free_ports(vms + 1)
        address = {"INTERLOCK_LISTEN_PORT": str(ports.pop())}
        sharing = {"INTERLOCK_HOSTS_SHARED_DIR": str(self.shared)} if self.shared else {}
        self.server = RealServer(folder / HERE, {**_QUICK, **_QUICK_QEMU, **address, **sharing})
        self._made: list[RealAgent] = []
        self.agents = {FAR: self.make_agent(FAR, folder / FAR)} if hosts > 1 else {}
        """The agents of the other hosts by their names; another mapping whenever a host gets another name."""
        self.steady = threading.Lock()
        """Held by whoever needs the server to stay as it is, alive or dead, until done."""
        self.vms = {one.name: one for one in _plan(vms, small, tuple(self.folders), ports)}

    @property
    def folders(self) -> dict[str, Path]:
        """The data folders of all hosts, by their names."""
        return {HERE: self.folder / HERE} | {name: agent.folder for name, agent in self.agents.items()}

    def make_agent(self, name: str, folder: Path) -> RealAgent:
        """An agent that was not started yet, with the token for the host of that name, made when it is first needed."""
        options = ("--shared", str(self.folder / HERE)) if self.shared else ()
        agent = RealAgent(self.server, name, folder, options, _QUICK_QEMU)
        agent.token = self.folder / f"{name}.token"
        self._made.append(agent)
        return agent

    @property
    def ports(self) -> list[int]:
        """Every port of the host that is forwarded to some VM."""
        return [vm.port for vm in self.vms.values() if vm.port is not None]

    def open(self) -> None:
        """Start both hosts and make everything, each small guest with its mark."""
        self.server.folder.mkdir(mode=0o711, exist_ok=True)
        if self.shared is not None:
            self.shared.mkdir(mode=0o711)
        if self._packages is not None:
            (self.server.folder / "packages").symlink_to(self._packages)
        self.server.start()
        for agent in self.agents.values():
            agent.start()
        kernel = nano_guest(self.folder)
        with Path(kernel.path).open("rb") as file:
            form = {"name": NANO, "kind": "kernel", "cmdline": "nano"}
            self.server.client.post("/v1/images", data=form, files={"kernel": file}).raise_for_status()
        if any(vm.small for vm in self.vms.values()):
            wish = {"name": SMALL, "form": "disk"}
            self.server.client.post("/v1/images/small", json=wish).raise_for_status()
        for number in range(VOLUMES):
            self.server.client.post("/v1/volumes", json={"name": f"data-{number}", "size_mib": 8}).raise_for_status()
        made = {vm.name: self.create(vm) for vm in self.vms.values()}
        for name, request_id in made.items():
            if self.vms[name].small and request_id is not None:
                ended = self.ended(request_id)
                if ended["status"] == "succeeded":
                    self._write_mark(self.vms[name])

    def create(self, vm: Vm) -> str | None:
        """Ask for a VM that is not there; the request's id if that was admitted."""
        wish: dict[str, Any] = {"name": vm.name, "image": vm.image, "root_gib": vm.root_gib, "host": vm.host}
        wish["memory_mib"] = 128 if vm.small else 64
        if vm.port is not None:
            wish["forwards"] = [{"host_port": vm.port, "guest_port": 80}]
        answer = self.server.client.post("/v1/instances", json=wish)
        if answer.status_code == httpx.codes.ACCEPTED:
            return self.book.acknowledge(answer.json()["request"], "create")
        if answer.status_code == httpx.codes.CONFLICT:
            self.book.count("create: refused")
        elif answer.status_code == httpx.codes.INSUFFICIENT_STORAGE:
            self.book.count("create: no space")
        elif answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY and "not connected" in answer.text:
            self.book.count("create: its host is away")
        else:
            self.book.complain(f"create {vm.name}: {answer.status_code} {answer.text[:300]}")
        return None

    def close(self) -> None:
        """Kill everything that is still there."""
        self.server.kill()
        for agent in self._made:
            agent.clear()
        end_guests(self.server.folder)

    # ------------------------------------------------------------------------------------------------- looking

    def instance(self, name: str) -> dict[str, Any] | None:
        """The VM as it is told of, or None where there is none."""
        found = self.server.client.get(f"/v1/instances/{name}")
        if found.status_code == httpx.codes.NOT_FOUND:
            return None
        found.raise_for_status()
        told: dict[str, Any] = found.json()
        return told

    @property
    def guests(self) -> dict[str, Path]:
        """Where each host has its instances, a folder for each."""
        return {host: folder / "guests" / "vms" for host, folder in self.folders.items()}

    def files(self, host: str, instance_id: str) -> Path:
        """Where a host keeps what it has of an instance."""
        return self.guests[host] / instance_id

    def greetings(self, name: str) -> int:
        """How often the guest has told its console that it is up, as far as the host where it is has kept it."""
        instance = self.instance(name)
        if instance is None:
            return 0
        console = self.files(instance["host"], instance["id"]) / "console.log"
        try:
            return console.read_bytes().count(_GREETINGS[self.vms[name].image].encode())
        except FileNotFoundError:
            return 0

    def record(self, name: str) -> tuple[Any, ...]:
        """What changes in the record of a VM while anything goes on with it."""
        instance = self.instance(name) or {}
        return tuple(instance.get(key) for key in _OF_PROGRESS)

    def ended(self, request_id: str) -> dict[str, Any]:
        """A request as soon as it has ended, or as it is when nothing has moved for a long time."""
        found: dict[str, Any] = {}

        def has_ended() -> bool:
            found.update(self.server.get(f"/v1/requests/{request_id}", wait="5s"))
            return found["ended_at"] is not None

        def signs() -> object:
            return found and (found["status"], found["phase"], self.record(found["instance"]))

        until(has_ended, signs)
        return found

    # --------------------------------------------------------------------------------------------------- marks

    def _write_mark(self, vm: Vm) -> None:
        """Have a small guest write onto its disk, by the shell on its console. Raises `TimeoutError`."""
        url = str(self.server.client.base_url.join(f"/v1/instances/{vm.name}/console/live")).replace("http", "ws", 1)
        headers = {"Authorization": self.server.client.headers["Authorization"]}
        line = f"printf '%s\\n' '{vm.mark.decode()}' | dd of=/dev/vda bs={_SECTOR} seek={_MARK_AT // _SECTOR} "
        line += "conv=sync,fsync,notrunc && echo mark-$((1 + 1))"
        # It hears what is typed from then on; the history of a console is the server's only for its own host.
        if not until(lambda: self.greetings(vm.name) > 0, lambda: self.record(vm.name)):
            raise TimeoutError(f"The guest of {vm.name} does not come up.")
        with connect(url, additional_headers=headers) as console:
            _talk(console, "\r", "# ")
            _talk(console, line + "\r", "mark-2")

    def read_mark(self, name: str) -> bytes:
        """What is written in that place of a VM that is off."""
        instance = self.instance(name)
        assert instance is not None
        own = self.files(instance["host"], instance["id"])
        disks = sorted((own if self.shared is None else self.shared / "instances" / instance["id"]).glob("root*.qcow2"))
        assert len(disks) == 1, f"{name} has the root disks {[one.name for one in disks]}"
        words = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -v {_MARK_AT} {_SECTOR}", str(disks[0])]
        said = subprocess.run(words, capture_output=True, check=True).stdout.decode()
        rows = [row.split(":", 1)[1].split()[:16] for row in said.splitlines() if ":  " in row]
        return bytes(int(byte, 16) for row in rows for byte in row).partition(b"\n")[0].rstrip(b"\0")


def _plan(vms: int, small: int, hosts: tuple[str, ...], ports: list[int]) -> list[Vm]:
    """Which VMs there are: on each host in turn, some small, half of them with a port, a quarter without a disk."""
    made = []
    for number in range(vms):
        is_small, turn = number < small, number // len(hosts)
        made.append(
            Vm(
                name=f"vm-{number}",
                image=SMALL if is_small else NANO,
                host=hosts[number % len(hosts)],
                root_gib=0 if turn % 4 == 2 and not is_small else 1,
                # Both hosts are this machine: a guest with a port cannot be on the two at once, and travels cold only.
                port=ports[number] if turn % 2 else None,
            )
        )
    return made


def until(true: Callable[[], bool], signs: Callable[[], object] = lambda: None) -> bool:
    """Whether something becomes true while we look again and again.

    Given up when nothing in `signs` has changed for so long, and for so many looks: on a busy machine a look takes
    longer, and so does what is looked for.
    """
    begun = time.monotonic()
    seen, since, looks = signs(), begun, 0
    while not true():
        now = signs()
        if now != seen:
            seen, since, looks = now, time.monotonic(), 0
        looks += 1
        if looks > _LOOKS and time.monotonic() > since + _PATIENCE_S:
            return False
        if time.monotonic() > begun + _AT_MOST_S:
            return False
        # Nothing announces what is looked at: files, and what a guest wrote.
        time.sleep(_LOOK_AGAIN_S)
    return True


def _talk(console: ClientConnection, words: str, answer: str) -> None:
    """Type words, again and again as long as nothing is said, until the guest gives an answer."""
    deadline, said = time.monotonic() + _PATIENCE_S, b""
    console.send(words.encode())
    while answer.encode() not in said:
        try:
            piece = console.recv(timeout=_TYPE_AGAIN_S)
        except TimeoutError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The guest never said {answer!r}: {said[-300:]!r}") from None
            console.send(words.encode())
        else:
            said += piece if isinstance(piece, bytes) else piece.encode()


def _free_ports(number: int) -> list[int]:
    """So many ports on which nobody listens, others than those of a soak of the same seed that runs beside this one."""
    chance = random.SystemRandom()
    found: list[int] = []
    while len(found) < number:
        port = chance.choice(_PORTS)
        if port not in found and is_free(port):
            found.append(port)
    return found


def is_free(port: int) -> bool:
    """Whether nobody listens on that port of the loopback address."""
    with socket.socket() as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asking.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
