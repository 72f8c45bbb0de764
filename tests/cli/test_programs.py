"""The program as a shell runs it: pipes, completion, the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import instance
from interlock import __version__

PROGRAM = (sys.executable, "-m", "interlock")


def _run(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        (*PROGRAM, *arguments), input=stdin, capture_output=True, env={**os.environ, **environment}, check=False
    )


def test_a_rehearsal_answers_each_line_before_the_next_is_asked() -> None:
    with subprocess.Popen((*PROGRAM, "rehearse", "--policy", "propolis"), stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for event, key in (('{"submit": "start"}', "disposition"), ('{"take": "any"}', "taken")):
            process.stdin.write(event.encode() + b"\n")
            process.stdin.flush()
            assert key in json.loads(process.stdout.readline())
        process.stdin.write(b'{"show": true}')
        process.stdin.close()
        assert json.loads(process.stdout.read())["in_flight"] == "start"


def test_a_rehearsal_of_many_blocks_answers_every_line_in_order(tmp_path: Path) -> None:
    script = b'{"instance": {"vm_state": "active"}}\n{"submit": "stop"}\n' * 5_000
    (tmp_path / "script").write_bytes(script)
    with (tmp_path / "script").open("rb") as source:
        ran = subprocess.run(
            (*PROGRAM, "rehearse", "--policy", "standard"), stdin=source, capture_output=True, check=True
        )
    answers = ran.stdout.splitlines()
    assert len(script) > 3 * 64 * 1024
    assert [b"disposition" in answer for answer in answers] == [False, True] * 5_000


@pytest.mark.parametrize("asked", [("--version",), ("-V",), ("version",)])
def test_the_version_is_told_however_one_asks(interlock: Interlock, asked: tuple[str, ...]) -> None:
    ran = interlock(*asked)
    assert (ran.code, ran.out.strip()) == (0, f"interlock {__version__}")


def test_help_can_be_asked_for_by_a_word_too(interlock: Interlock) -> None:
    for words in ((), ("vm",), ("vm", "create")):
        ran = interlock("help", *words)
        assert ran.code == 0
        assert ran.out == interlock(*words, "--help").out
    wrong = interlock("help", "vm", "creat")
    assert wrong.code == 2
    assert "Did you mean 'create'?" in wrong.err


def test_a_policy_that_is_wrong_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("[policy]\nname = 'x'\nextnds = 'standard'\n")
    ran = _run("rehearse", "--policy", str(tmp_path / "p.toml"))
    assert ran.returncode == 2
    assert b"p.toml:3" in ran.stderr
    assert b"Traceback" not in ran.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m interlock rehearse --policy standard | head -n 1"
    script = b'{"show": true}\n' * 50_000
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", command], input=script, capture_output=True, check=False)
    assert ran.stderr == b""
    assert ran.stdout.count(b"\n") == 1
    assert ran.returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_completion_script(shell: str) -> None:
    ran = _run("completion", shell)
    assert ran.returncode == 0
    assert b"_INTERLOCK_COMPLETE" in ran.stdout


def test_bash_completes_commands_options_and_the_names_of_vms(folder: Path, server: ScriptedServer) -> None:
    program = folder / "interlock"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m interlock "$@"\n')
    program.chmod(0o755)

    def completed(*words: str) -> list[str]:
        script = (
            f'eval "$(interlock completion bash)"; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; '
            '_interlock_completion interlock; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        path = f"{folder}:{os.environ['PATH']}"
        environment = {**os.environ, "INTERLOCK_DATA_DIR": str(folder), "PATH": path}
        ran = subprocess.run(["bash", "-c", script], capture_output=True, env=environment, check=True, text=True)
        return ran.stdout.split()

    server.on("GET", "/v1/instances", Given(value={"items": [instance(), instance(name="web")], "next_cursor": None}))
    assert completed("interlock", "st") == ["stuck"]
    assert completed("interlock", "vm", "show", "d") == ["demo"]
    assert completed("interlock", "why", "demo", "reb") == ["reboot", "rebuild"]
    assert completed("interlock", "vm", "stop", "--h") == ["--hard", "--hold", "--help"]
    (folder / "server.json").unlink()
    assert completed("interlock", "vm", "show", "d") == []


def test_there_are_no_colours_in_a_pipe_nor_with_no_color(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances/demo", Given(value=instance()))
    assert "\x1b" not in interlock("vm", "show", "demo").out


def test_a_listing_imports_nothing_of_the_server() -> None:
    """What makes a command slow to start is what it imports."""
    code = "import sys; from interlock.__main__ import root; root(); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(ran.stdout.split())
    assert loaded.isdisjoint({"asyncio", "httpx", "rich", "uvicorn", "structlog", "apsw", "interlock.server"})
