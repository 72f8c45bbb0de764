"""A server and agents of other hosts, each a real process, and the few things that tests of them ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.nano_guest import nano_guest
from processes.real_agent import RealAgent
from processes.real_server import RealServer, end_guests
from waiting import until

_ADMITTED = 202

QUICK = {
    # The nano guest ignores the power button, so that every stop takes as long.
    "INTERLOCK_DRIVER_GUEST_SHUTDOWN_TIMEOUT_MS": "1000",
    "INTERLOCK_DRIVER_INSPECT_RETRY_MS": "50",
    "INTERLOCK_HOSTS_LEASE_MS": "60000",
    "INTERLOCK_HOSTS_LEASE_MARGIN_MS": "1000",
    "INTERLOCK_HOSTS_SILENCE_MS": "15000",
}


class Fleet:
    """One server, and agents by name."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.server = RealServer(folder / "here", {**QUICK, "INTERLOCK_HOST": "here", **(settings or {})})
        self.agents: dict[str, RealAgent] = {}

    def start(self) -> None:
        """Start the server, with the image `nano`."""
        self.server.start()
        kernel = nano_guest(self.folder)
        with Path(kernel.path).open("rb") as file:
            form = {"name": "nano", "kind": "kernel", "cmdline": "nano"}
            self.server.client.post("/v1/images", data=form, files={"kernel": file}).raise_for_status()

    def add(
        self, name: str, *options: str, settings: Mapping[str, str] | None = None, namespace: str | None = None
    ) -> RealAgent:
        """Start an agent for a host of that name; `settings` are `INTERLOCK_*` variables."""
        agent = RealAgent(self.server, name, self.folder / name, options, settings, namespace)
        self.agents[name] = agent
        agent.start()
        self.until_linked(name)
        return agent

    def until_linked(self, name: str) -> None:
        """Return when the server can ask the host, and accepts requests for it.

        An agent is `connected` as soon as it is admitted, and its host is `up`; the server asks it only once it has
        delivered the earlier events of its guests.
        """

        def linked() -> bool:
            seen = {one["name"]: one for one in self.server.get("/v1/hosts")["items"]}
            return name in seen and bool(seen[name]["linked"]) and seen[name]["state"] == "up"

        until(linked, f"{name} is not connected")

    def until_gone(self, name: str) -> None:
        """Return when the server has noticed that the host's agent is disconnected."""
        until(lambda: not self.server.get(f"/v1/hosts/{name}")["linked"], f"{name} is connected still")

    def until_fenced(self, name: str) -> None:
        """Return when the host's lease has ended, and its guests with it."""
        until(lambda: self.server.get(f"/v1/hosts/{name}")["state"] == "fenced", f"{name} is not fenced")

    def carry_out(self, vm: str, operation: str, **parameters: object) -> dict[str, Any]:
        """Ask for an operation, which must be admitted and succeed."""
        answer = self.server.submit(vm, operation, **parameters)
        assert answer.status_code == _ADMITTED, answer.text
        ended = self.server.ended(answer.json()["request"]["id"])
        assert ended["status"] == "succeeded", ended
        return ended

    def create(self, name: str, host: str, image: str = "nano", **more: object) -> str:
        """Create a VM on a host; its id, once it runs."""
        body: dict[str, object] = {"name": name, "image": image, "host": host, **more}
        answer = self.server.client.post("/v1/instances", json=body)
        assert answer.status_code == _ADMITTED, answer.text
        ended = self.server.ended(answer.json()["request"]["id"])
        assert ended["status"] == "succeeded", ended
        return str(answer.json()["instance"]["id"])

    def guest_folder(self, host: str, instance_id: str) -> Path:
        """Where a host keeps what it has of an instance, if it has anything."""
        folder = self.server.folder if host == "here" else self.agents[host].folder
        return folder / "guests" / "vms" / instance_id

    def holds(self, host: str, instance_id: str) -> list[str]:
        """The names of the root disks that a host has of an instance."""
        return sorted(one.name for one in self.guest_folder(host, instance_id).glob("root*.qcow2"))

    def left_over(self) -> list[Path]:
        """The files that were on their way to a host or back, or to an image, and are still there."""
        folders = [agent.folder / "spool" for agent in self.agents.values()]
        found = [one for folder in folders for one in folder.glob("*")]
        return found + list((self.server.folder / "images").glob("*.export*"))

    def clear(self) -> None:
        """Kill everything, guests too."""
        self.server.kill()
        for agent in self.agents.values():
            agent.clear()
        end_guests(self.server.folder)
