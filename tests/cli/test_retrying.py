"""A command waits as long as a busy server says, and repeats what may be repeated."""

from __future__ import annotations

import time

import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import admitted, problem

IMAGES = Given(200, {"items": []})
LIMITED = Given(429, problem(429, "Too often."), retry_after="7")
OVERLOADED = Given(503, {**problem(503, "Busy."), "type": "urn:interlock:problem:overloaded"}, retry_after="2")
OTHER = Given(503, problem(503, "No answer."), retry_after="3")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_a_refused_read_is_repeated_after_the_time_that_the_server_names(
    interlock: Interlock, server: ScriptedServer, slept: list[float]
) -> None:
    server.on("GET", "/v1/images", LIMITED, OVERLOADED, OTHER, IMAGES)
    assert interlock("image", "list").code == 0
    assert slept == [7, 2, 3]


def test_it_is_not_repeated_for_ever_nor_without_a_time(
    interlock: Interlock, server: ScriptedServer, slept: list[float]
) -> None:
    server.on("GET", "/v1/images", LIMITED)
    ran = interlock("image", "list")
    assert (ran.code, "Too often." in ran.err) == (7, True)
    assert slept == [7] * 8
    for retry_after in ("61", "soon", "-1", "1" * 30, None):
        server.on("GET", "/v1/images", LIMITED._replace(retry_after=retry_after))
        assert interlock("image", "list").code == 7
    assert len(slept) == 8


def test_a_submission_is_repeated_with_the_same_key(
    interlock: Interlock, server: ScriptedServer, slept: list[float]
) -> None:
    server.on("POST", "/v1/instances/demo/requests", OTHER, LIMITED, Given(202, admitted()))
    assert interlock("vm", "reboot", "demo").code == 0
    assert slept == [3, 7]
    assert len({asked.headers["idempotency-key"] for asked in server.asked}) == 1


def test_what_may_have_had_an_effect_is_not_repeated(
    interlock: Interlock, server: ScriptedServer, slept: list[float]
) -> None:
    server.on("DELETE", "/v1/images/old", OTHER)
    assert interlock("image", "delete", "--yes", "old").code == 8
    assert slept == []
    server.on("DELETE", "/v1/images/old", OVERLOADED, LIMITED, Given(204, b""))
    assert interlock("image", "delete", "--yes", "old").code == 0
    assert slept == [2, 7]
