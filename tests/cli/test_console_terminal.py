"""The console in a real terminal, through pipes, and the screen: against a real server with simulated guests."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from interlock.cli.failures import ExitCode
from processes.real_server import RealServer
from waiting import PATIENCE_S

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("console")
    kernel = folder / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(100))
    server = RealServer(folder / "data", {"INTERLOCK_HYPERVISOR": "simulated"})
    server.start()
    ran = run(server, "image", "add", "nothing", "--kernel", str(kernel))
    assert ran.returncode == 0, ran.stderr
    ran = run(server, "vm", "create", "one", "--image", "nothing", "--wait")
    assert ran.returncode == 0, ran.stderr
    yield server
    server.stop()


def command(server: RealServer, *words: str) -> tuple[list[str], dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")}
    return [sys.executable, "-m", "interlock", *words], {**environment, "INTERLOCK_DATA_DIR": str(server.folder)}


def run(server: RealServer, *words: str, typed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    line, environment = command(server, *words)
    return subprocess.run(line, env=environment, input=typed, capture_output=True, timeout=PATIENCE_S, check=False)


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, server: RealServer, *words: str) -> None:
        line, environment = command(server, *words)
        self._ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.said = b""
        self.process = subprocess.Popen(
            line, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )

    def until(self, expected: bytes) -> bytes:
        """Read until it was said, and give what came before, which is forgotten."""
        deadline = time.monotonic() + PATIENCE_S
        while expected not in self.said:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{expected!r} was not said: {self.said[-500:]!r}"
            self.said += os.read(self._ours, 4096)
        before, _, self.said = self.said.partition(expected)
        return before

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self._theirs)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def end(self) -> int:
        """Its exit code; the terminal must be what it was."""
        code = self.process.wait(PATIENCE_S)
        assert termios.tcgetattr(self._theirs) == self.before
        return code

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(PATIENCE_S)
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def sit(server: RealServer, terminals: list[Terminal], *words: str) -> Terminal:
    terminal = Terminal(server, "vm", "console", "one", *words)
    terminals.append(terminal)
    terminal.until(b"-- connected to the console of one")
    terminal.until(b"\n")
    terminal.press(b"hello\r")
    terminal.until(b"hello")
    return terminal


def test_every_key_goes_to_the_guest_until_the_one_that_detaches(server: RealServer, terminals: list[Terminal]) -> None:
    terminal = sit(server, terminals)
    assert terminal.is_raw
    terminal.press(b"\x03again\r")
    terminal.until(b"again")
    terminal.press(b"\x1d")
    terminal.until(b"detached from one")
    assert terminal.end() == 0


def test_another_key_can_detach(server: RealServer, terminals: list[Terminal]) -> None:
    terminal = sit(server, terminals, "--escape", "^a")
    terminal.press(b"\x1dstill here\r")
    terminal.until(b"still here")
    terminal.press(b"\x01")
    terminal.until(b"detached")
    assert terminal.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(
    server: RealServer, terminals: list[Terminal], number: signal.Signals
) -> None:
    terminal = sit(server, terminals)
    terminal.process.send_signal(number)
    assert terminal.end() != 0


def test_the_end_of_the_server_leaves_the_terminal_as_it_was_and_is_told(
    server: RealServer, terminals: list[Terminal]
) -> None:
    terminal = sit(server, terminals)
    server.kill()
    try:
        terminal.until(b"Connection to the console lost")
        assert terminal.end() == ExitCode.NOT_REACHABLE
    finally:
        server.start()


def test_through_pipes_what_is_typed_is_answered(server: RealServer) -> None:
    ran = run(server, "vm", "console", "one", "--linger", "0.5", typed=b"hello from a pipe\r")
    assert ran.returncode == 0, ran.stderr
    assert b"hello from a pipe" in ran.stdout


def test_without_input_the_log_is_printed(server: RealServer) -> None:
    for words in ((), ("--log",)):
        ran = run(server, "vm", "console", "one", *words)
        assert (ran.returncode, ran.stdout) == (0, b"")


def test_a_vm_that_is_not_there_is_told_with_the_terminal_as_it_was(
    server: RealServer, terminals: list[Terminal]
) -> None:
    terminal = Terminal(server, "vm", "console", "onf")
    terminals.append(terminal)
    terminal.until(b"one")
    assert terminal.end() == ExitCode.NOT_FOUND


def test_a_wrong_key_is_explained(server: RealServer) -> None:
    ran = run(server, "vm", "console", "one", "--escape", "^^^", typed=b"x")
    assert ran.returncode == 2
    assert b"Ctrl-]" in ran.stderr


def test_a_screenshot_is_saved(server: RealServer, tmp_path: Path) -> None:
    target = tmp_path / "one.png"
    assert run(server, "vm", "screenshot", "one", "--output", str(target)).returncode == 0
    assert target.read_bytes().startswith(PNG)
    assert run(server, "vm", "screenshot", "one", "--output", "-").stdout.startswith(PNG)
    assert run(server, "vm", "screenshot", "one").stdout.startswith(PNG)
    ran = run(server, "vm", "screenshot", "one", "--output", str(tmp_path / "none" / "x.png"))
    assert ran.returncode == 2
    assert b"Cannot write" in ran.stderr


def test_a_vnc_viewer_finds_the_display_until_ctrl_c(server: RealServer, terminals: list[Terminal]) -> None:
    terminal = Terminal(server, "vm", "vnc", "one", "--listen", "127.0.0.1:0")
    terminals.append(terminal)
    port = int(terminal.until(b"; Ctrl-C ends it").rpartition(b":")[2])
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as viewer:
            assert viewer.recv(12) == b"RFB 003.008\n"
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() != 0
