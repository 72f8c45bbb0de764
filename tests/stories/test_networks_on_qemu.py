"""Networks as one story over HTTP: a server on a host in a network namespace, real guests, and a server that is killed.

What each part of it does by itself is tested in `tests/networks` and `tests/hypervisors`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from interlock.core.operations import CATALOGUE, Operation
from interlock.guests import small_guest
from networks.conftest import Host, host_namespace
from networks.namespaces import Namespace, processes_with
from processes.preloaded import NETWORK
from processes.real_server import RealServer, end_guests, guests_in
from small_guests import packages_folder
from tiers import only_long
from waiting import PATIENCE_S, until

__all__ = ["host_namespace"]
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
    pytest.mark.skipif(not all(map(shutil.which, ("qemu-system-x86_64", "apt-get"))), reason="QEMU or apt is missing"),
]


class Site:
    """A server on a host in a namespace, which has an uplink to one that stands for the internet."""

    def __init__(self, namespace: Namespace, folder: Path) -> None:
        self.host = Host(namespace, folder / "unused")
        path = f"/proc/{os.getpid()}/fd/{namespace.descriptor}"
        settings = {NETWORK: path, "INTERLOCK_DRIVER_GUEST_SHUTDOWN_TIMEOUT_MS": "200"}
        self.server = RealServer(folder / "data", settings)
        self.server.start()
        guest = small_guest.build(packages_folder())
        with guest.kernel.open("rb") as kernel, guest.initrd.open("rb") as initrd:
            form = {"name": "small", "kind": "kernel", "cmdline": guest.cmdline}
            self.send("/v1/images", data=form, files={"kernel": kernel, "initrd": initrd})

    @contextlib.contextmanager
    def asked_with(self, secret: str) -> Iterator[None]:
        """Use another token in the body of a `with`."""
        headers = self.server.client.headers
        before, headers["Authorization"] = headers["Authorization"], f"Bearer {secret}"
        try:
            yield
        finally:
            headers["Authorization"] = before

    def send(self, path: str, **content: Any) -> Any:
        """Post something; return the answer."""
        answer = self.server.client.post(path, **content)
        assert answer.is_success, answer.text
        return answer.json()

    def create(self, name: str, **fields: object) -> Any:
        """Ask for a VM in the network `lab`; return its instance and request."""
        wanted = {"name": name, "image": "small", "memory_mib": 128, "networks": [{"network": "lab"}], **fields}
        return self.send("/v1/instances", json=wanted)

    def succeeds(self, asked: Any) -> None:
        ended = self.server.ended(asked["request"]["id"])
        assert ended["status"] == "succeeded", str(ended)

    def does(self, name: str, operation: str, **parameters: object) -> None:
        asked = self.server.submit(name, operation, **parameters)
        assert asked.status_code == 202, asked.text
        self.succeeds(asked.json())

    def does_after_kill(self, moment: str, operation: str, **parameters: object) -> None:
        """Ask for an operation of a server that kills itself at that moment of it, and let the next one complete it."""
        (phase,) = CATALOGUE[Operation(operation)].phases
        self.server.stop()
        self.server.start(f"{phase}:{moment}")
        with contextlib.suppress(httpx.TransportError):  # it may die before it answers
            self.server.submit("web", operation, **parameters)
        self.server.until_dead()
        self.server.start()
        latest = self.server.get("/v1/instances/web/requests")["items"][0]
        assert latest["operation"] == operation
        self.succeeds({"request": latest})

    def is_up(self, asked: Any, address: str) -> None:
        """Wait until a guest that was asked for has its address, and answers at it."""
        self.succeeds(asked)
        self.said(asked["instance"]["id"], f"interlock-guest: address {address}")
        assert self.host.namespace.pings(address, within_s=10), "the host reaches its guests"

    def said(self, instance_id: str, text: str) -> None:
        """Wait until a guest has said something on its console."""
        console = self.server.folder / "guests" / "vms" / instance_id / "console.log"
        until(lambda: console.exists() and text in console.read_text(errors="replace"), console.read_text)

    def runs(self, instance_id: str, command: str) -> bool:
        """Run a command in a guest's shell; return whether it succeeded."""
        url = f"{self.server.client.base_url}".replace("http", "ws", 1).rstrip("/")
        authorization = {"Authorization": self.server.client.headers["Authorization"]}
        with connect(
            f"{url}/v1/instances/{instance_id}/console/live", additional_headers=authorization, open_timeout=PATIENCE_S
        ) as console:
            # The echo of the line has quotes where the output has none.
            console.send(f"\n{command}; echo en''ded-$?.\n".encode())
            text = b""
            while (ended := re.search(rb"ended-(\d+)\.", text)) is None:
                received = console.recv(PATIENCE_S)
                text += received if isinstance(received, bytes) else received.encode()
        return ended[1] == b"0"

    def addresses(self, name: str) -> Any:
        """Return the addresses of a VM's first interface."""
        return self.server.get(f"/v1/instances/{name}/addresses")["items"][0]

    def left(self) -> dict[str, list[Any]]:
        """Return what is on the host that is ours."""
        namespace = self.host.namespace
        links = [line.split()[0].partition("@")[0] for line in namespace.run("ip", "-br", "link").splitlines()]
        networks = self.server.folder / "guests" / "networks"
        return {
            "links": [name for name in links if name.startswith("il")],
            "tables": namespace.run("nft", "list", "tables").splitlines(),
            "processes": [*processes_with(str(networks)), *guests_in(self.server.folder)],
            "leases": [str(path) for path in networks.rglob("*") if path.is_file()],
        }

    def close(self) -> None:
        self.server.kill()
        end_guests(self.server.folder)
        for process in processes_with(str(self.server.folder / "guests" / "networks")):
            os.kill(process, 9)
        with contextlib.suppress(OSError):
            Path(f"/run/interlock/forwarding/ipv4-{os.fstat(self.host.namespace.descriptor).st_ino}").unlink()
        self.host.internet.close()


@pytest.fixture
def site(host_namespace: Namespace) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="interlock-networks-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        site = Site(host_namespace, folder)
        try:
            yield site
        finally:
            site.close()


def test_guests_of_a_network_reach_each_other_and_outside_and_leave_nothing_when_deleted(site: Site) -> None:
    site.send("/v1/networks", json={"name": "lab", "subnets": [{"prefix": "10.7.0.0/24"}]})
    site.send("/v1/projects", json={"name": "research"})
    member = site.send("/v1/tokens", json={"name": "ann", "role": "member", "project": "research"})["secret"]
    asked = [site.create("web"), site.create("db")]
    with site.asked_with(member):
        site.send("/v1/networks", json={"name": "lab", "subnets": [{"prefix": "10.8.0.0/24"}]})
        spy = site.create("spy")
        site.is_up(spy, "10.8.0.2")
    for one, address in zip(asked, ("10.7.0.2", "10.7.0.3"), strict=True):
        site.is_up(one, address)
    web, db = (one["instance"]["id"] for one in asked)
    assert all(site.left().values()), site.left()
    with site.host.internet.serving(80):
        assert site.runs(web, "nc 192.0.2.1 80 | grep hello")
    assert site.runs(db, "nslookup web.lab.internal 10.7.0.1 | grep 10.7.0.2")
    assert site.runs(db, "echo word | nc -w 5 10.7.0.2 7 | grep word")
    until(lambda: "10.7.0.2" in site.addresses("web")["reported"], lambda: site.addresses("web"))
    site.runs(web, "ip addr add 10.7.0.99/24 dev eth0")
    found = site.addresses("web")
    assert found["leased"] == ["10.7.0.2"]
    assert {"10.7.0.2", "10.7.0.99"} <= set(found["reported"]), "what the guest says is told apart"
    site.does("web", "add_forward", host_port=18_080, guest_port=80)
    assert "is up" in httpx.get("http://127.0.0.1:18080/").text
    assert site.server.client.delete("/v1/networks/lab").status_code == 409
    with site.asked_with(member):
        assert [one["name"] for one in site.server.get("/v1/instances")["items"]] == ["spy"]
        assert site.runs("spy", "nslookup spy.lab.internal 10.8.0.1 | grep 10.8.0.2")
        assert not site.runs("spy", "nslookup web.lab.internal 10.8.0.1 | grep 10.7.0.2")
        assert not site.runs("spy", "echo word | nc -w 1 10.7.0.2 7 | grep word")
        site.does("spy", "delete")
    site.does("web", "delete")
    site.does("db", "delete")
    site.server.client.delete("/v1/networks/lab").raise_for_status()
    until(lambda: not any(site.left().values()), site.left)


@pytest.mark.parametrize("moment", ["done", *only_long("begun")])
def test_what_a_killed_server_was_changing_in_a_guests_networks_is_completed_by_the_next(
    site: Site, moment: str
) -> None:
    for number in (7, 8):
        subnet = {"prefix": f"10.{number}.0.0/24"}
        site.send("/v1/networks", json={"name": "lab" if number == 7 else "other", "subnets": [subnet]})
    made = site.create("web")
    site.is_up(made, "10.7.0.2")
    web = made["instance"]["id"]
    links = site.left()["links"]
    site.does_after_kill(moment, "add_forward", host_port=18_080, guest_port=80)
    assert "is up" in httpx.get("http://127.0.0.1:18080/").text
    site.does_after_kill(moment, "attach_interface", network="lab")
    (second,) = site.server.get("/v1/instances/web")["interfaces"]
    site.said(web, f"interlock-guest: interface eth1 {second['mac']}")
    site.said(web, "interlock-guest: address 10.7.0.3")
    site.does_after_kill(moment, "move_interface", interface=second["id"], network="other")
    assert site.runs("web", "ip addr flush dev eth1; udhcpc -n -q -i eth1 -s /bin/leased")
    site.said(web, "interlock-guest: address 10.8.0.2")
    site.does_after_kill(moment, "detach_interface", interface=second["id"])
    assert site.left()["links"] == links, "the bridge and the tap of its first interface"
    site.does("web", "delete")
    until(lambda: not any(site.left().values()), site.left)
