"""How far something is, on a terminal: against a server whose simulated guests take their time, and by itself."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from interlock.cli.output import progress
from interlock.cli.output.progress import LiveLine, Progress, ProgressBar
from waiting import PATIENCE_S

MIB = 1 << 20
SNAPSHOT = Progress("snapshot of demo: image uploading", 0.42, 1200 * MIB, 2900 * MIB, 31 * MIB)
STOP = Progress("stop of demo: waiting for the guest to power off, for 30 s at most")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of a `slow_server` with a VM called one."""
    folder = tmp_path_factory.mktemp("slow") / "data"
    program = Path(__file__).with_name("slow_server.py")
    process = subprocess.Popen((sys.executable, program, folder), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("listening" in line for line in process.stdout), "the server did not come up"
    kernel = folder / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(100))
    run(folder, "image", "add", "nothing", "--kernel", str(kernel))
    run(folder, "vm", "create", "one", "--image", "nothing", "--wait")
    yield folder
    process.terminate()
    process.communicate(timeout=PATIENCE_S)


def command(folder: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("INTERLOCK_", "NO_COLOR"))}
    return (
        [sys.executable, "-m", "interlock", *words],
        {**environment, "INTERLOCK_DATA_DIR": str(folder), "TERM": "xterm-256color", "COLUMNS": "120"},
    )


def run(folder: Path, *words: str) -> str:
    line, environment = command(folder, *words)
    return subprocess.run(line, env=environment, capture_output=True, timeout=PATIENCE_S, check=True, text=True).stdout


class Terminal:
    """A pseudo-terminal of 120 columns, with what was written on it."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        self.said = b""

    def until(self, expected: bytes) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while expected not in self.said:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{expected!r} was not said: {self.said[-500:]!r}"
            self.said += os.read(self._ours, 4096)

    def close(self) -> None:
        os.close(self._ours)
        os.close(self.theirs)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    one = Terminal()
    yield one
    one.close()


def test_a_bar_tells_how_far_something_long_is_and_leaves_nothing_behind(slow: Path, terminal: Terminal) -> None:
    line, environment = command(slow, "vm", "suspend", "one", "--wait")
    process = subprocess.Popen(line, env=environment, stdout=terminal.theirs, stderr=terminal.theirs)
    for expected in ("suspending", "━", " %", "/128 MiB", "left", "Done", "\r\n"):
        terminal.until(expected.encode())
    assert process.wait(PATIENCE_S) == 0
    text = terminal.said.decode()
    bar, _, rest = text.rpartition("\r\x1b[K")
    assert "\n" not in bar, "the bar stays on its line"
    assert CONTROL.sub("", rest).startswith("Done: suspend of one in "), "and nothing of it is left"
    assert "\x1b[?25l" not in text, "whoever kills the command keeps a cursor"


def test_ctrl_c_leaves_the_operation_going_and_says_how_to_watch_and_cancel_it(slow: Path, terminal: Terminal) -> None:
    run(slow, "vm", "create", "two", "--image", "nothing", "--wait")
    line, environment = command(slow, "vm", "suspend", "two", "--wait")
    process = subprocess.Popen(line, env=environment, stdout=terminal.theirs, stderr=terminal.theirs)
    terminal.until(b"/128 MiB")
    process.send_signal(signal.SIGINT)
    for expected in (b"Suspend of two continues.", b"interlock request show ", b"interlock request cancel "):
        terminal.until(expected)
    assert process.wait(PATIENCE_S) == 130
    (going,) = json.loads(run(slow, "vm", "show", "two", "--json"))["outstanding"]
    assert (going["status"], going["phase"], going["bytes_total"]) == ("in_flight", "suspending", 128 * MIB)
    assert 0 <= going["bytes_done"] <= 128 * MIB
    assert "Done" in run(slow, "vm", "watch", "two")
    assert json.loads(run(slow, "vm", "show", "two", "--json"))["vm_state"] == "suspended"


def test_the_bytes_that_a_phase_has_moved_go_over_the_wire_and_into_the_history(slow: Path) -> None:
    run(slow, "vm", "create", "three", "--image", "nothing", "--wait")
    asked = json.loads(run(slow, "vm", "suspend", "three", "--json"))["request"]["id"]
    run(slow, "request", "show", asked, "--wait")
    told = [
        event["data"]
        for event in json.loads(run(slow, "vm", "events", "three", "--json"))["items"]
        if event["kind"] == "request.progress" and "bytes_done" in event["data"]
    ]
    done = [data["bytes_done"] for data in told]
    assert done == sorted(done)
    assert 0 < done[-1] <= 128 * MIB
    assert {data["bytes_total"] for data in told} == {128 * MIB}
    assert any(data["bytes_per_s"] for data in told)
    assert json.loads(run(slow, "request", "show", asked, "--json"))["bytes_total"] == 128 * MIB


def test_what_ends_soon_paints_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_S", PATIENCE_S)
    with os.fdopen(os.dup(terminal.theirs), "w") as stream:
        with LiveLine(stream) as line:
            line.update("pause of one: pausing")
        stream.write("Done\n")
    terminal.until(b"\n")
    assert terminal.said == b"Done\r\n"


def test_a_terminal_that_cannot_move_its_cursor_is_told_in_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with os.fdopen(os.dup(terminal.theirs), "w") as stream, LiveLine(stream) as line:
        line.update("pause of one: pausing")
        terminal.until(b"\n")
    assert terminal.said.endswith(b" s  pause of one: pausing\r\n")


def drawn(standing: Progress, columns: int, monkeypatch: pytest.MonkeyPatch, **settings: bool) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    ProgressBar(stream, **settings).draw(standing, 12.0)
    return stream.getvalue()


def test_with_room_everything_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    line = CONTROL.sub("", drawn(SNAPSHOT, 140, monkeypatch))
    assert re.fullmatch(
        r". snapshot of demo: image uploading  [━╸╺]{22}   42 %  1\.2/2\.8 GiB  31 MiB/s  12 s  55 s left", line
    )


@pytest.mark.parametrize("standing", [SNAPSHOT, STOP, Progress("日本語" * 30, 0.5)])
@pytest.mark.parametrize("columns", [1, 20, 40, 60, 80, 100, 140])
def test_a_bar_fits_whatever_the_terminal(standing: Progress, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    line = drawn(standing, columns, monkeypatch)
    assert "\n" not in line
    assert line.startswith("\r")
    assert cell_len(CONTROL.sub("", line)) < max(columns, 14)


def test_a_narrow_terminal_is_told_what_and_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    line = CONTROL.sub("", drawn(SNAPSHOT, 40, monkeypatch))
    assert "snapshot of demo" in line
    assert line.endswith("42 %  12 s")


def test_no_color_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[36m" in drawn(SNAPSHOT, 100, monkeypatch)
    assert not re.search(r"\x1b\[[39]\dm", drawn(SNAPSHOT, 100, monkeypatch, plain=True))


def test_what_is_left_is_told_by_how_long_the_rest_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    bar = ProgressBar(stream)
    bar.draw(Progress("x", 0.0), 0.0)
    assert "left" not in stream.getvalue()
    bar.draw(Progress("x", 0.25), 10.0)
    assert "30 s left" in stream.getvalue()
