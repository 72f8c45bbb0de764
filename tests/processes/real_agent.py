"""A real `interlock agent` in a process of its own, to be stopped or killed. What it holds is not looked at here."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from processes.preloaded import PreloadedProcess
from processes.real_server import RealServer, guests_in
from waiting import PATIENCE_S


class RealAgent:
    """One agent process after the other on one data folder, for one server.

    Args:
        server: that it serves; it must have been started.
        name: of the host.
        folder: the data folder; QEMU's user must be able to pass through the folders above it.
        options: of `interlock agent`, beside server, token, name and folder.
        settings: `INTERLOCK_*` variables.
        namespace: the path of the network namespace that it runs in; None: that of the tests.
    """

    def __init__(
        self,
        server: RealServer,
        name: str,
        folder: Path,
        options: tuple[str, ...] = (),
        settings: Mapping[str, str] | None = None,
        namespace: str | None = None,
    ) -> None:
        self.server = server
        self.name = name
        self.folder = folder
        self.log = folder.with_name(folder.name + ".log")
        """What all of them wrote on standard error."""
        self.token = folder.with_name(folder.name + ".token")
        """The file with the secret of the token for the host; made when it is first asked for."""
        self._options = options
        self._entering = () if namespace is None else (str(Path(__file__).with_name("in_namespace.py")), namespace)
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("INTERLOCK_")},
            "INTERLOCK_LOG_FORMAT": "json",
            **(settings or {}),
        }
        self._process: PreloadedProcess | None = None
        self._copying: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it was started, and neither stopped nor killed since."""
        return self._process is not None

    @property
    def ended(self) -> bool:
        """Whether it was started, and has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start an agent and return when it is connected.

        Raises:
            RuntimeError: it ended instead; says what it wrote.
        """
        connected = self.begin()
        while not connected.wait(0.05):
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"The agent ended: {self.log.read_text()[-2000:]}")

    def begin(self) -> threading.Event:
        """Start an agent, which the server may refuse; the answer is set when it is connected."""
        words = (*self._entering, *self.command()[1:], "--data-dir", str(self.folder), *self._options)
        self._process = PreloadedProcess(words, self._environment)
        process, connected = self._process, threading.Event()
        self._copying = threading.Thread(target=lambda: self._copy(process, connected.set), daemon=True)
        self._copying.start()
        return connected

    def command(self, name: str | None = None) -> tuple[str, ...]:
        """The command that starts it without its folder and options; as another host where one is named."""
        url, token = str(self.server.client.base_url), str(self.token_file())
        words = ("agent", "--server", url, "--token-file", token, "--name", name or self.name)
        return (sys.executable, "-m", "interlock", *words)

    def logged(self, event: str) -> list[dict[str, Any]]:
        """What all of them logged under that name."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        records = [msgspec.json.decode(line) for line in lines if line.startswith("{")]
        return [record for record in records if record.get("event") == event]

    def token_file(self) -> Path:
        """The file with the secret of a token for this host, made where there is none; the server must run then."""
        if not self.token.exists():
            name = f"agent-{secrets.token_hex(8)}"
            wish = {"name": name, "role": "agent", "project": "default", "host": self.name}
            made = self.server.client.post("/v1/tokens", json=wish)
            made.raise_for_status()
            self.token.write_text(made.json()["secret"])
        return self.token

    def _copy(self, process: PreloadedProcess, connected: Callable[[], None]) -> None:
        with self.log.open("a", encoding="utf-8") as log, process.stderr as lines:
            for line in lines:
                log.write(line)
                log.flush()
                if '"connected"' in line:
                    connected()

    def kill(self) -> None:
        """End the agent as `kill -9` does; it is gone when this returns. Does nothing if it is gone already."""
        self._end(PreloadedProcess.kill)

    def stop(self) -> None:
        """Ask the agent to end, and wait until it has."""
        self._end(PreloadedProcess.terminate)

    def freeze(self) -> None:
        """Have the agent stand still, without an end, until `thaw`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: Callable[[PreloadedProcess], None]) -> None:
        if self._process is not None:
            how(self._process)
            self._process.wait(PATIENCE_S)
            self._process = None
            if self._copying is not None:
                # What it wrote last is in the log then, unless it left its standard error to others.
                self._copying.join(1.0)

    def guests(self) -> list[int]:
        """The processes that hold guests in this agent's folder."""
        return guests_in(self.folder)

    def clear(self) -> None:
        """Kill everything of this host: agent, watchdog, guests."""
        self.kill()
        for process_id in (*self.guests(), *self._watchdog()):
            os.kill(process_id, signal.SIGKILL)

    def _watchdog(self) -> list[int]:
        lock = self.folder / "watchdog.lock"
        text = lock.read_text() if lock.exists() else ""
        alive = text.isdigit() and Path(f"/proc/{text}").exists()
        return [int(text)] if alive and b"watchdog" in Path(f"/proc/{text}/cmdline").read_bytes() else []
