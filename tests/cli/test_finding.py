"""Where the server is, and who we are to it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import structlog

from cli.conftest import Interlock
from cli.scripted_server import HANG_UP, Given, ScriptedServer
from interlock.agent import Contact, HostAgent
from interlock.cli.client.connection import find
from interlock.config import Config

EMPTY = Given(value={"items": [], "next_cursor": None})


def test_the_server_and_its_token_are_found_in_the_data_folder(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances", EMPTY)
    assert interlock("vm", "list").code == 0
    assert server.asked[0].headers["authorization"] == "Bearer ilk_secret"


def test_the_environment_goes_before_the_data_folder(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances", EMPTY)
    ran = interlock("vm", "list", INTERLOCK_DATA_DIR="/nowhere", INTERLOCK_URL=server.url, INTERLOCK_TOKEN="other")
    assert ran.code == 0
    assert server.asked[0].headers["authorization"] == "Bearer other"


def test_the_admin_token_is_not_shown_to_another_server(interlock: Interlock, server: ScriptedServer) -> None:
    ran = interlock("--url", server.url.replace("127.0.0.1", "localhost"), "vm", "list")
    assert ran.code == 6
    assert "INTERLOCK_TOKEN" in ran.err
    assert server.asked == []


def test_a_command_does_not_send_its_token_unencrypted_to_another_machine(interlock: Interlock) -> None:
    ran = interlock("--url", "http://192.0.2.1:7420", "vm", "list", INTERLOCK_TOKEN="ilk_secret")
    assert ran.code == 2
    assert "The connection to http://192.0.2.1:7420 would not be encrypted" in ran.err
    assert "INTERLOCK_INSECURE_PLAIN_HTTP=1" in ran.err


def test_a_command_may_be_allowed_to_send_its_token_unencrypted() -> None:
    environment = {"INTERLOCK_TOKEN": "ilk_secret", "INTERLOCK_INSECURE_PLAIN_HTTP": "1"}
    assert find(environment, "http://192.0.2.1:7420").url == "http://192.0.2.1:7420"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "north.token"
    path.write_text("ilk_secret")
    return path


@pytest.mark.parametrize("server_url", ["http://192.0.2.1:7420", "http://server.example:7420"])
def test_an_agent_does_not_send_its_token_unencrypted_to_another_machine(
    interlock: Interlock, token_file: Path, server_url: str
) -> None:
    ran = interlock("agent", "--server", server_url, "--token-file", str(token_file))
    assert ran.code == 2
    assert f"The connection to {server_url} would not be encrypted" in ran.err
    assert "--insecure-plain-http" in ran.err


def test_an_agent_that_may_do_so_names_the_flag_in_its_log(tmp_path: Path) -> None:
    contact = Contact(server="http://192.0.2.1:7420", token="ilk_secret", name="north")
    with structlog.testing.capture_logs() as logged:
        HostAgent(Config(data_dir=str(tmp_path), hypervisor="simulated"), contact)
    assert {
        "event": "connection not encrypted",
        "log_level": "warning",
        "server": "http://192.0.2.1:7420",
        "allowed_by": "--insecure-plain-http",
    } in logged


def test_without_a_server_it_says_how_to_start_one(interlock: Interlock, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
        ran = interlock("vm", "list", INTERLOCK_DATA_DIR=str(tmp_path / "other"), INTERLOCK_LISTEN_PORT=port)
    assert (ran.code, ran.out) == (5, "")
    assert "interlock serve" in ran.err


def test_a_server_that_was_there_and_is_not_any_more_is_not_reachable(interlock: Interlock, folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (folder / "server.json").write_text(json.dumps({"url": f"http://127.0.0.1:{unused.getsockname()[1]}"}))
        ran = interlock("vm", "list", "--json")
    assert ran.code == 5
    assert "server is not running" in json.loads(ran.err)["detail"]


def test_a_token_of_another_user_is_named_with_its_owner(
    interlock: Interlock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def forbid(path: Path, *args: str, **kwargs: str) -> str:
        if path.name == "admin.token":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", forbid)
    ran = interlock("vm", "list")
    assert ran.code == 6
    assert f"is readable only by {(folder / 'admin.token').owner()}" in ran.err


def test_what_is_no_url_is_said_to_be_none(interlock: Interlock) -> None:
    assert interlock("--url", "localhost:7420", "vm", "list", INTERLOCK_TOKEN="t").code == 2


def test_a_connection_that_the_server_closed_while_idle_is_made_again(
    interlock: Interlock, server: ScriptedServer
) -> None:
    one = {"id": "i", "name": "a"}
    server.on("GET", "/v1/instances", Given(value={"items": [one], "next_cursor": "c"}), HANG_UP, EMPTY)
    ran = interlock("vm", "list", "--json")
    assert (ran.code, json.loads(ran.out)) == (0, {"items": [one]})
