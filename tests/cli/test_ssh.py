"""`interlock vm ssh`, and what is said of a new VM to cloud-init."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import instance
from interlock.api.schemas import responses
from interlock.service.request_models import NewForward

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDdtZ1Zt5vDc5h3pTBWG8Yv6kBQ3Gk0k0kq5mV1n5u1x me@here"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What was started instead of this process; the program ssh is on the PATH."""
    words: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda _name, command: words.append(command))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return words


def forwarded(*pairs: tuple[int, int]) -> Given:
    return Given(value=instance(forwards=tuple(NewForward(host_port=host, guest_port=guest) for host, guest in pairs)))


def test_it_goes_to_the_port_of_the_guests_ssh_with_a_key_noted_by_the_vms_id(
    interlock: Interlock, server: ScriptedServer, started: list[list[str]], folder: Path
) -> None:
    server.on("GET", "/v1/instances/demo", forwarded((8080, 80), (2222, 22)))
    ran = interlock("vm", "ssh", "demo", "--user", "root", "--", "uptime", "-p")
    assert (ran.code, ran.err) == (0, "")
    (words,) = started
    assert words[:3] == ["ssh", "-p", "2222"]
    assert words[-5:] == ["-l", "root", "127.0.0.1", "uptime", "-p"]
    options = {words[at + 1] for at, word in enumerate(words) if word == "-o"}
    assert options == {
        f"UserKnownHostsFile={folder / 'known_hosts'}",
        "HostKeyAlias=i-1",
        "StrictHostKeyChecking=accept-new",
    }


def test_without_a_forward_it_says_which_one_is_missing(
    interlock: Interlock, server: ScriptedServer, started: list[list[str]]
) -> None:
    server.on("GET", "/v1/instances/demo", forwarded((8080, 80)))
    ran = interlock("vm", "ssh", "demo")
    assert ran.code == 2
    assert "no forward to port 22" in ran.err
    assert "8080:80" in ran.err
    assert "--forward 2222:22" in ran.err
    assert started == []


def test_without_the_program_it_says_what_to_install(
    interlock: Interlock, server: ScriptedServer, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    server.on("GET", "/v1/instances/demo", forwarded((2222, 22)))
    ran = interlock("vm", "ssh", "demo")
    assert ran.code == 2
    assert "openssh-client" in ran.err
    assert started == []


def test_a_new_vm_is_told_what_the_files_say(interlock: Interlock, server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "id.pub").write_text(f"{KEY}\n# a note\n\n{KEY}2\n")
    (tmp_path / "user-data").write_text("#cloud-config\n{}\n")
    (tmp_path / "net").write_text("version: 2\n")
    server.on(
        "POST",
        "/v1/instances",
        Given(201, responses.Created(instance=instance(), request=None, rule="recorded", because=None)),
    )
    ran = interlock(
        *("vm", "create", "demo", "--image", "debian", "--hostname", "web-1", "--no-start"),
        *("--ssh-key", str(tmp_path / "id.pub"), "--ssh-key", KEY),
        *("--user-data", str(tmp_path / "user-data"), "--network-config", str(tmp_path / "net")),
    )
    assert ran.code == 0, ran.err
    (asked,) = [one for one in server.asked if one.method == "POST"]
    sent = json.loads(asked.body)
    assert sent["hostname"] == "web-1"
    assert sent["ssh_keys"] == [KEY, f"{KEY}2", KEY]
    assert (sent["user_data"], sent["network_config"]) == ("#cloud-config\n{}\n", "version: 2\n")


def test_a_private_key_never_leaves(interlock: Interlock, server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    ran = interlock("vm", "create", "demo", "--image", "debian", "--ssh-key", str(tmp_path / "id"))
    assert ran.code == 2
    assert ".pub" in ran.err
    assert server.asked == []
