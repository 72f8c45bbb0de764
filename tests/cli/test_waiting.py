"""Following a request to its end."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from cli.conftest import Interlock
from cli.scripted_server import HANG_UP, Asked, Given, ScriptedServer
from cli.wire_samples import admitted, instance, request
from interlock.core.operations import Operation
from interlock.core.records import Status

REQUESTS = "/v1/instances/demo/requests"
ENDED = Given(value=request(status=Status.SUCCEEDED, duration_s=3.24, ended_at="2026-03-01T12:00:06.240Z"))
FAILED = Given(value=request(status=Status.FAILED, duration_s=1.0, reason="refused", message="QEMU said no."))


def _in_phase(phase: str, **more: object) -> Given:
    return Given(value=request(status=Status.IN_FLIGHT, phase=phase, **more))


def test_phases_are_told_as_they_happen_and_then_the_end(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("POST", REQUESTS, Given(202, admitted()))
    server.on("GET", "/v1/requests/r-1", _in_phase("rebooting", progress=0.5), _in_phase("reboot_started"), ENDED)
    server.on("GET", "/v1/instances/i-1", Given(value=instance()))
    ran = interlock("vm", "reboot", "demo", "--wait")
    assert ran.code == 0
    assert [line.split(" s  ")[-1] for line in ran.out.splitlines()] == [
        "reboot of demo: queued",
        "reboot of demo: rebooting 50 %",
        "reboot of demo: reboot started",
        "Done: reboot of demo in 3.2 s",
    ]
    assert [asked.target for asked in server.asked if "after" in asked.target] == [
        "/v1/instances/i-1?after_generation=7&wait=20s"
    ]


def test_an_operation_that_failed_ends_with_one_and_says_why(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("POST", REQUESTS, Given(202, admitted()))
    server.on("GET", "/v1/requests/r-1", FAILED)
    ran = interlock("vm", "reboot", "demo", "--wait")
    assert ran.code == 1
    assert ran.err == "Failed: reboot of demo in 1 s (refused)\n  QEMU said no.\n"


@pytest.mark.parametrize(("answer", "code"), [(ENDED, 0), (FAILED, 1)])
def test_with_json_only_the_request_as_it_ended_is_printed(
    interlock: Interlock, server: ScriptedServer, answer: Given, code: int
) -> None:
    server.on("POST", REQUESTS, Given(202, admitted()))
    server.on("GET", "/v1/requests/r-1", _in_phase("rebooting"), answer)
    server.on("GET", "/v1/instances/i-1", Given(value=instance()))
    ran = interlock("vm", "reboot", "demo", "--wait", "--json")
    assert (ran.code, ran.err) == (code, "")
    assert json.loads(ran.out)["status"] == answer.value.status.value


def test_waiting_goes_on_when_the_server_comes_back(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("POST", REQUESTS, Given(202, admitted()))
    server.on("GET", "/v1/requests/r-1", _in_phase("rebooting"), HANG_UP, HANG_UP, HANG_UP, ENDED)
    server.on("GET", "/v1/instances/i-1", Given(value=instance()))
    ran = interlock("vm", "reboot", "demo", "--wait")
    assert ran.code == 0
    assert "connection lost; reconnecting" in ran.out


def test_ctrl_c_ends_the_waiting_with_130(interlock: Interlock, server: ScriptedServer) -> None:
    def interrupt(_: Asked) -> Given:
        import signal

        signal.raise_signal(signal.SIGINT)
        return ENDED

    server.on("POST", REQUESTS, Given(202, admitted()))
    server.on("GET", "/v1/requests/r-1", interrupt)
    assert interlock("vm", "reboot", "demo", "--wait").code == 130


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_wait_that_loses_the_server_says_that_the_operation_continues(
    interlock: Interlock, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    times = itertools.count(0, 40)
    clock = SimpleNamespace(monotonic=lambda: next(times), sleep=lambda _s: None)
    monkeypatch.setattr("interlock.cli.commands.submission.time", clock)
    server.on("POST", REQUESTS, Given(202, admitted()))
    server.on("GET", "/v1/requests/r-1", HANG_UP)
    ran = interlock("vm", "reboot", "demo", "--wait", *options)
    assert ran.code == 5
    continues = "Reboot of demo continues.\n  Watch it:  interlock request show r-1 --wait\n"
    assert (continues in ran.err) is not bool(options)


def test_a_vm_that_is_renamed_is_named_as_before_and_now(interlock: Interlock, server: ScriptedServer) -> None:
    done = request(operation=Operation.RENAME, parameters={"name": "third"}, status=Status.SUCCEEDED)
    server.on("POST", "/v1/instances/second/requests", Given(202, admitted(done)))
    assert interlock("vm", "rename", "second", "third").out == "Done: rename of second to third\n"


def test_where_nothing_moves_it_is_said_what_can_be_done(
    interlock: Interlock, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.cli.commands.submission._STILL_S", 0.0)
    server.on("POST", REQUESTS, Given(202, admitted()))
    server.on("GET", "/v1/requests/r-1", Given(value=request(status=Status.UNKNOWN)), ENDED)
    server.on("GET", "/v1/instances/i-1", Given(value=instance()))
    ran = interlock("vm", "stop", "demo", "--wait")
    assert "No progress: `interlock why demo` shows what can take over and when" in ran.out
    assert "`interlock vm stop demo --hard`" in ran.out
