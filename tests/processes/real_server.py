"""A real `interlock serve` in a process of its own, to be stopped or killed, and a small client to ask it.

Nothing here knows what is asked for, or looks into the server's process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec

from interlock.hypervisors.qemu.process.qemu_process import find_in
from processes.preloaded import PreloadedProcess
from waiting import PATIENCE_S, until

_ANSWER_S = PATIENCE_S + 30.0
"""How long an answer is waited for, which the server may hold back for `PATIENCE_S`."""


class RealServer:
    """One server process after the other on one data folder, each on a free port.

    Args:
        folder: the data folder; QEMU's user must be able to pass through the folders above it.
        settings: `INTERLOCK_*` variables beside those of the folder and the address.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.log = folder.with_name(folder.name + ".log")
        """What all of them wrote on standard error."""
        self.client: httpx.Client
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")},
            "INTERLOCK_DATA_DIR": str(folder),
            "INTERLOCK_LISTEN_PORT": "0",
            "INTERLOCK_LOG_FORMAT": "json",
            **(settings or {}),
        }
        self._process: PreloadedProcess | None = None

    def start(
        self,
        dying_in: str | None = None,
        *,
        until_ready: bool = True,
        program: tuple[str, ...] = ("-m", "interlock", "serve"),
    ) -> None:
        """Start a server and return when it is ready: it listens, and has inspected the guests of its host.

        Args:
            dying_in: a phase and moment (`crash_injection`) in which it is to kill itself.
            until_ready: False to return as soon as it listens.
            program: what Python runs instead of `interlock serve`: a script, or `-m` and a module; and its arguments.

        Raises:
            RuntimeError: it ended instead; says what it wrote.
        """
        if dying_in is not None:
            program = (str(Path(__file__).with_name("crash_injection.py")), dying_in)
        self._process = PreloadedProcess(program, self._environment)
        url = self._until_serving(self._process)
        token = (self.folder / "admin.token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=url, headers=headers, timeout=_ANSWER_S)
        if until_ready:
            self.until_ready()

    def until_ready(self) -> None:
        """Return when the server says that it is ready, or has died. Raises `AssertionError` if neither comes about."""

        def ready() -> bool:
            try:
                return self.client.get("/readyz").is_success
            except httpx.TransportError:
                return True

        until(ready, lambda: f"The server is not ready: {self.client.get('/readyz').text}")

    def _until_serving(self, process: PreloadedProcess) -> str:
        with self.log.open("a", encoding="utf-8") as log:
            for line in process.stderr:
                log.write(line)
                if '"serving"' in line:
                    # Whatever else it writes must not fill the pipe and hold it up.
                    self._drain(process)
                    return str(msgspec.json.decode(line)["url"])
        raise RuntimeError(f"The server ended with {process.wait()}: {self.log.read_text()[-2000:]}")

    def _drain(self, process: PreloadedProcess) -> None:
        def copy() -> None:
            with self.log.open("a", encoding="utf-8") as log, process.stderr as lines:
                for line in lines:
                    log.write(line)
                    log.flush()

        threading.Thread(target=copy, daemon=True).start()

    def kill(self) -> None:
        """End the server as `kill -9` does; it is gone when this returns. Does nothing if it is gone already."""
        self._end(PreloadedProcess.kill)

    def until_dead(self) -> None:
        """Wait until the server has killed itself. Raises `subprocess.TimeoutExpired` if it does not."""
        self._end(lambda process: process)

    def stop(self) -> None:
        """Ask the server to end, and wait until it has."""
        self._end(PreloadedProcess.terminate)

    def _end(self, signal: Any) -> None:
        if self._process is not None:
            signal(self._process)
            self._process.wait(PATIENCE_S)
            self._process = None
            self.client.close()

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    # ------------------------------------------------------------------------------------------------- asking it

    def get(self, path: str, **query: str | int) -> dict[str, Any]:
        """What is found under the path. Raises `httpx.HTTPStatusError`."""
        answer = self.client.get(path, params=query)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def submit(self, reference: str, operation: str, **parameters: object) -> httpx.Response:
        """Ask for an operation; whatever the gate says is the answer."""
        body = {"operation": operation, "parameters": parameters}
        return self.client.post(f"/v1/instances/{reference}/requests", json=body)

    def ended(self, request_id: str) -> dict[str, Any]:
        """The request as soon as it has ended, or as it is after `PATIENCE_S`."""
        return self.get(f"/v1/requests/{request_id}", wait=f"{PATIENCE_S:.0f}s")


def guests_in(folder: Path) -> list[int]:
    """The processes that hold guests in a data folder."""
    found = (find_in(one / "inside") for one in (folder / "guests" / "vms").glob("*"))
    return [process_id for process_id in found if process_id is not None]


def end_guests(folder: Path) -> None:
    """Kill every process that holds a guest in a data folder, whatever went wrong."""
    for process_id in guests_in(folder):
        os.kill(process_id, signal.SIGKILL)
