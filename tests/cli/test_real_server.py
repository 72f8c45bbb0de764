"""The program against a real server with simulated guests, each in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from processes.preloaded import PreloadedProcess, run
from small_file_systems import fill, small_file_system
from waiting import PATIENCE_S

PROGRAM = (sys.executable, "-m", "interlock")
Run = Callable[..., subprocess.CompletedProcess[str]]


class Serving:
    """A server process on a data folder, and command lines that find it by themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "INTERLOCK_DATA_DIR": str(folder),
            "INTERLOCK_HYPERVISOR": "simulated",
            "NO_COLOR": "1",
            "INTERLOCK_LOG_FORMAT": "json",
        }

    def start(self) -> list[str]:
        """Start it, and return what it has said when it serves."""
        self.process = PreloadedProcess((*PROGRAM[1:], "serve", "--listen", "127.0.0.1:0"), self.environment)
        said = []
        for line in self.process.stderr:
            said.append(line)
            if '"serving"' in line:
                return said
        raise AssertionError("the server did not come up")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.process.rest()
        return self.process.wait(PATIENCE_S)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run((*PROGRAM[1:], *arguments), self.environment, PATIENCE_S)

    def json(self, *arguments: str) -> dict[str, object]:
        ran = self.run(*arguments, "--json")
        assert ran.returncode == 0, ran.stderr
        document = json.loads(ran.stdout)
        assert isinstance(document, dict)
        return document


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    one = Serving(tmp_path / "data")
    one.start()
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1024 * 1024))
    one.json("image", "add", "empty", "--disk", str(disk), "--format", "raw")
    yield one
    if one.process.poll() is None:
        one.stop()


def test_a_vm_from_its_making_to_its_end(serving: Serving) -> None:
    made = serving.run("vm", "create", "demo", "--image", "empty", "--forward", "8080:80", "--tag", "web", "--wait")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.splitlines()[-1].startswith("Done: create of demo in ")
    shown = serving.json("vm", "show", "demo")
    assert (shown["vm_state"], shown["tags"], shown["forwards"]) == (
        "active",
        ["web"],
        [{"host_port": 8080, "guest_port": 80, "host_address": "127.0.0.1", "protocol": "tcp"}],
    )
    assert serving.json("volume", "create", "data", "--size", "0.01")["size_bytes"] == 10 * 1024 * 1024
    assert serving.run("vm", "attach", "demo", "data", "--wait").returncode == 0
    assert serving.run("volume", "delete", "data", "--yes").returncode == 3
    assert serving.run("vm", "detach", "demo", "data", "--wait").returncode == 0
    assert serving.run("vm", "pause", "demo", "--wait").returncode == 0
    assert serving.json("vm", "list", "--state", "paused")["items"] != []
    assert serving.run("vm", "delete", "demo", "--yes", "--wait").returncode == 0
    assert serving.run("vm", "show", "demo").returncode == 4


def test_a_vm_is_renamed_and_has_its_new_name_in_every_command(serving: Serving) -> None:
    serving.run("vm", "create", "old", "--image", "empty", "--wait")
    made = serving.json("vm", "show", "old")
    serving.json("vm", "create", "taken", "--image", "empty", "--no-start")
    renamed = serving.run("vm", "rename", "old", "new")
    assert (renamed.returncode, renamed.stdout) == (0, "Done: rename of old to new\n")
    assert serving.json("vm", "show", "new")["id"] == made["id"]
    assert serving.json("vm", "show", str(made["id"]))["name"] == "new"
    assert "old" not in serving.run("vm", "list").stdout
    assert "instance.renamed" in serving.run("vm", "events", "new").stdout
    assert serving.run("vm", "stop", "new", "--wait").returncode == 0
    gone = serving.run("vm", "rename", "old", "newer")
    assert (gone.returncode, "VM not found: old" in gone.stderr) == (4, True)
    again = serving.run("vm", "rename", "new", "new")
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "Redundant: rename of new (unchanged)")
    refused = serving.run("vm", "rename", "new", "taken")
    assert refused.returncode != 0
    assert "A VM named taken already exists" in refused.stderr
    wrong = serving.run("vm", "rename", "new", "a b")
    assert wrong.returncode != 0
    assert "1 to 63 letters, digits, hyphens, dots and underscores" in wrong.stderr
    why = serving.json("why", "new", "rename", "--with", "name=newer")
    assert why["disposition"] == "admitted"
    serving.stop()
    serving.start()
    assert serving.json("vm", "show", "new")["vm_state"] == "stopped"


def test_a_refusal_and_the_answer_to_why_agree(serving: Serving) -> None:
    serving.run("vm", "create", "demo", "--image", "empty", "--no-start", "--protect", "delete")
    refused = serving.run("vm", "delete", "demo", "--yes")
    assert refused.returncode == 3
    assert refused.stderr.startswith("Denied: delete of demo (")
    reason = refused.stderr.partition("(")[2].partition(")")[0]
    why = serving.json("why", "demo", "delete")
    assert (why["disposition"], why["reason"]) == ("denied", reason)
    allowed = refused.stderr.partition("Allowed now: ")[2].strip().split(", ")
    assert "start" in allowed
    assert "delete" not in allowed


def test_protection_from_delete_can_be_given_and_taken_back(serving: Serving) -> None:
    serving.json("vm", "create", "web", "--image", "empty", "--no-start")
    assert serving.json("vm", "label", "web", "--protect", "delete", "--tag", "prod")["tags"] == ["prod"]
    refused = serving.run("vm", "delete", "web", "--yes")
    assert refused.returncode == 3
    assert "operation_blocked" in refused.stderr
    assert serving.json("vm", "label", "web", "--no-protect")["blocked_operations"] == []
    assert serving.run("vm", "delete", "web", "--yes", "--wait").returncode == 0


def test_a_lost_admin_token_can_be_replaced_by_the_owner_of_the_folder(serving: Serving) -> None:
    (serving.folder / "admin.token").unlink()
    assert serving.run("vm", "list").returncode == 6
    assert serving.run("token", "recover").returncode != 0  # a server runs
    assert serving.stop() == 0
    assert serving.run("token", "recover").returncode == 0
    assert (serving.folder / "admin.token").stat().st_mode & 0o777 == 0o600
    serving.start()
    assert serving.run("vm", "list").returncode == 0


def test_what_makes_no_sense_is_a_usage_error_and_shows_no_insides(serving: Serving) -> None:
    environment = serving.environment
    for arguments, more in (
        (("volume", "create", "v", "--size", "nan"), {}),
        (("volume", "create", "v", "--size", "inf"), {}),
        (("vm", "list"), {"INTERLOCK_TOKEN": "a\nb"}),
        (("--url", "http://[::1", "vm", "list"), {"INTERLOCK_TOKEN": "x"}),
        (("--url", "http://127.0.0.1:99999", "vm", "list"), {"INTERLOCK_TOKEN": "x"}),
    ):
        serving.environment = {**environment, **more}
        ran = serving.run(*arguments)
        assert ran.returncode == 2, (arguments, ran.stderr)
        assert "Traceback" not in ran.stderr, arguments


def test_the_history_outlives_the_server(serving: Serving) -> None:
    serving.run("vm", "create", "demo", "--image", "empty", "--wait")
    before = serving.run("vm", "events", "demo").stdout
    assert "building -> active" in before
    assert serving.stop() == 0
    gone = serving.run("vm", "list")
    assert gone.returncode == 5
    serving.start()
    assert serving.run("vm", "events", "demo").stdout.startswith(before)


def test_what_is_watched_is_told_while_it_happens(serving: Serving) -> None:
    watching = subprocess.Popen(
        (*PROGRAM, "watch"), env={**serving.environment, "PYTHONUNBUFFERED": "1"}, stdout=-1, stderr=-1, text=True
    )
    assert watching.stdout is not None
    assert watching.stderr is not None
    assert "watching" in watching.stderr.readline()
    # It says so before it is connected; what is made after its first line is seen must be told.
    names = iter(range(1000))
    while True:
        serving.run("vm", "create", f"vm{next(names)}", "--image", "empty", "--no-start")
        if watching.poll() is not None or _readable(watching.stdout.fileno()):
            break
    line = watching.stdout.readline()
    assert "instance.created" in line
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=PATIENCE_S)
    assert watching.returncode == 130


def _readable(descriptor: int) -> bool:
    import select

    return bool(select.select([descriptor], [], [], 0.2)[0])


def test_a_full_disk_does_not_keep_a_server_from_starting(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "16m") as folder:
        one = Serving(folder / "data")
        try:
            one.start()
            one.stop(signal.SIGKILL)
            fill(folder / "full")
            one.start()
            assert one.run("vm", "list").returncode == 0, "the file of the server that was killed was written over"
            assert one.stop() == 0
            fill(folder / "full")
            said = one.start()
            assert not (one.folder / "server.json").exists()
            told = next(line for line in map(json.loads, said) if "INTERLOCK_URL" in line["event"])
            assert one.run("vm", "list").returncode == 5
            one.environment["INTERLOCK_URL"] = told["url"]
            one.environment["INTERLOCK_TOKEN"] = (one.folder / "admin.token").read_text().strip()
            assert one.run("vm", "list").returncode == 0
            assert one.stop() == 0
        finally:
            one.process.kill()


def test_a_second_server_on_the_same_folder_says_what_is_wrong(serving: Serving) -> None:
    second = serving.run("serve", "--listen", "127.0.0.1:0")
    assert second.returncode == 8
    assert "Traceback" not in second.stderr
    assert serving.run("vm", "list").returncode == 0


def test_a_configuration_that_is_wrong_starts_nothing(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("listen_prt = 1\n")
    ran = Serving(tmp_path / "data").run("serve", "--config", str(config))
    assert ran.returncode == 2
    assert "listen_port" in ran.stderr
    assert not (tmp_path / "data").exists()


def test_a_token_that_was_deleted_is_turned_away(serving: Serving) -> None:
    secret = serving.run("token", "create", "bob", "--role", "reader").stdout.strip()
    serving.environment["INTERLOCK_TOKEN"] = secret
    assert serving.run("vm", "list").returncode == 0
    assert serving.run("vm", "create", "x", "--image", "empty").returncode == 6
    del serving.environment["INTERLOCK_TOKEN"]
    assert serving.run("token", "delete", "bob").returncode == 0
    serving.environment["INTERLOCK_TOKEN"] = secret
    assert serving.run("vm", "list").returncode == 6
