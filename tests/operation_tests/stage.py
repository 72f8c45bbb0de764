"""A server with real guests on which an operation can be proved, and what such a guest tells of itself."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx

from interlock.hypervisors.qemu.process.qemu_process import find_in
from processes.real_server import RealServer, end_guests
from waiting import PATIENCE_S

SMALL: Final = "small"
"""The name of the small guest's image: a kernel, which QEMU boots beside an empty root disk."""
SMALL_DISK: Final = "small-disk"
"""That of the same guest on a disk that boots by itself."""
MEMORY_MIB: Final = 128
_ASK_AGAIN_S: Final = 2.0
_QUICK: Final = {"INTERLOCK_DRIVER_INSPECT_RETRY_MS": "50", "INTERLOCK_DRIVER_PROGRESS_INTERVAL_MS": "100"}


class Stage:
    """One server after the other on one folder, with the images of the small guest and two volumes."""

    def __init__(self, folder: Path) -> None:
        """`folder` must let QEMU's user pass through."""
        self.server = RealServer(folder / "data", _QUICK)
        self.remembered: dict[str, Any] = {}
        """What a scenario saw earlier and wants to compare."""
        self._ports: dict[str, int] = {}

    def open(self) -> None:
        """Start the server and make what the scenarios need."""
        self.server.start()
        for name, form in ((SMALL, "kernel"), (SMALL_DISK, "disk")):
            self.server.client.post(
                "/v1/images/small", json={"name": name, "form": form}, timeout=300
            ).raise_for_status()
        for name in ("data", "other"):
            self.server.client.post("/v1/volumes", json={"name": name, "size_mib": 8}).raise_for_status()

    def close(self) -> None:
        """End everything."""
        self.server.kill()
        end_guests(self.server.folder)

    # -------------------------------------------------------------------------------------------------- asking it

    def create(self, name: str, image: str = SMALL) -> str:
        """Ask for a small guest with a root disk and a web server that can be reached; the request's id."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._ports[name] = int(free.getsockname()[1])
        forwards = [{"host_port": self._ports[name], "guest_port": 80}]
        wish = {"name": name, "image": image, "memory_mib": MEMORY_MIB, "root_gib": 1, "forwards": forwards}
        answer = self.server.client.post("/v1/instances", json=wish)
        answer.raise_for_status()
        return str(answer.json()["request"]["id"])

    def boot(self, name: str, image: str = SMALL) -> None:
        """Create a guest and wait until it answers."""
        ended = self.server.ended(self.create(name, image))
        assert ended["status"] == "succeeded", ended
        self.status(name)

    def carry_out(self, name: str, operation: str, **parameters: Any) -> dict[str, Any]:
        """Ask for an operation and wait until it has succeeded; the request."""
        answer = self.server.submit(name, operation, **parameters)
        assert answer.is_success, f"{operation}: {answer.status_code} {answer.text}"
        request = answer.json().get("request")
        if request is None:
            return {}
        ended = self.server.ended(request["id"])
        assert ended["status"] == "succeeded", f"{operation}: {ended['status']}, {ended['message']}"
        return ended

    def instance(self, name: str) -> dict[str, Any]:
        return self.server.get(f"/v1/instances/{name}")

    def discard(self, name: str) -> None:
        """Delete a guest, whatever state it is in, if it is still there."""
        if self.server.client.get(f"/v1/instances/{name}").status_code == httpx.codes.OK:
            self.carry_out(name, "force_delete")

    # ------------------------------------------------------------------------------------------ what the guest says

    def status(self, name: str) -> dict[str, Any]:
        """What the guest says of itself, as soon as it answers: its boot id, its running counter, its memory."""
        found: dict[str, Any] = json.loads(self._guest(name, "status"))
        return found

    def write(self, name: str, text: str, disk: str = "") -> None:
        """Have the guest write a text onto its first disk, or onto one such as `vdb`."""
        self._guest(name, f"write{disk and '/' + disk}?{quote(text)}")

    def read(self, name: str, disk: str = "") -> str:
        """The text that was written so."""
        return self._guest(name, f"read{disk and '/' + disk}").strip()

    def silent(self, name: str) -> bool:
        """Whether the guest gives no answer for a moment."""
        try:
            httpx.get(self._url(name, "status"), timeout=0.5)
        except httpx.HTTPError:
            return True
        return False

    def _guest(self, name: str, path: str) -> str:
        """What the guest's web server answers; it is asked again until it is up."""
        complaint = ""
        for _ in range(int(PATIENCE_S / _ASK_AGAIN_S)):
            try:
                answer = httpx.get(self._url(name, path), timeout=_ASK_AGAIN_S)
                answer.raise_for_status()
            except httpx.TransportError as error:
                complaint = repr(error)
                self._until_console_says(name)
            else:
                return answer.text
        raise AssertionError(f"the guest of {name} does not answer: {complaint}; {self.console(name)[-500:]}")

    def _until_console_says(self, name: str) -> None:
        # Until it is up a guest's port is closed, which is told at once: the server's long poll passes the time.
        generation = self.instance(name)["generation"]
        self.server.get(f"/v1/instances/{name}", wait="0.2s", after_generation=generation)

    def _url(self, name: str, path: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}/cgi-bin/{path}"

    def console(self, name: str) -> str:
        return self.server.client.get(f"/v1/instances/{name}/console").text

    def until_console(self, name: str, words: str) -> None:
        """Wait until the console has these words."""
        for _ in range(300):
            if words in self.console(name):
                return
            self._until_console_says(name)
        raise AssertionError(f"the console of {name} never said {words!r}: {self.console(name)[-500:]}")

    # -------------------------------------------------------------------------------------------- what the host has

    def process(self, name: str) -> int | None:
        """The process that holds the guest, found by looking."""
        return find_in(self.files(name) / "inside")

    def files(self, name: str) -> Path:
        """The folder of the instance on its host."""
        return self.server.folder / "guests" / "vms" / str(self.instance(name)["id"])
