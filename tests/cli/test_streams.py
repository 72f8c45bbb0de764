"""Events and the console, as they happen."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest

from cli.conftest import Interlock
from cli.scripted_server import HANG_UP, Given, ScriptedServer
from cli.wire_samples import event, instance, problem, request
from interlock.api.schemas import responses
from interlock.cli.client import event_stream
from interlock.cli.client.event_stream import Message, messages
from interlock.cli.commands import watch
from interlock.core.records import Status

NOT_AUTHORISED = Given(401, problem(401, "The token was deleted."))
"""With this a stream ends for good."""


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "_PAUSE_S", 0)


def _stream(*events: responses.Event) -> Given:
    text = ": hello\n\n" + "".join(
        f"id: {one.sequence}\nevent: {one.kind}\ndata: {msgspec.json.encode(one).decode()}\n\n" for one in events
    )
    return Given(200, text.encode(), "text/event-stream")


def test_messages_are_read_as_the_standard_has_them() -> None:
    lines = [": comment", "", "id: 4", "data: a", "data:b", "", "data: c", "", "data: unfinished"]
    assert list(messages(lines)) == [Message("4", "a\nb"), Message("4", "c")]


def test_watching_goes_on_where_the_connection_broke(interlock: Interlock, server: ScriptedServer) -> None:
    server.on(
        "GET",
        "/v1/events",
        _stream(event(3, "request.admitted", operation="stop"), event(4, "request.taken", operation="stop")),
        HANG_UP,
        _stream(event(5, "request.succeeded", operation="stop")),
        NOT_AUTHORISED,
    )
    server.on("GET", "/v1/instances/i-1", Given(value=instance()))
    ran = interlock("watch")
    assert ran.code == 6
    assert [line.split()[1:3] for line in ran.out.splitlines()] == [
        ["demo", "request.admitted"],
        ["demo", "request.taken"],
        ["demo", "request.succeeded"],
    ]
    assert "connection lost; reconnecting" in ran.err
    assert "reconnected" in ran.err
    asked = [one.headers.get("last-event-id") for one in server.asked if one.path == "/v1/events"]
    assert asked == [None, "4", "4", "5"]


def test_a_vm_that_is_renamed_is_watched_on_under_its_new_name(interlock: Interlock, server: ScriptedServer) -> None:
    server.on(
        "GET",
        "/v1/events",
        _stream(
            event(3, "guest.stopped"),
            event(4, "instance.renamed", name="web2", before="demo"),
            event(5, "guest.reset"),
        ),
        NOT_AUTHORISED,
    )
    server.on("GET", "/v1/instances/i-1", Given(value=instance()))
    first, renamed, last = interlock("watch").out.splitlines()
    assert ("demo" in first, "name=web2  before=demo" in renamed, "web2" in last, "demo" in last) == (
        *(True, True, True),
        False,
    )
    server.on("GET", "/v1/instances/demo", Given(value=instance(outstanding=(request(),))), Given(404))
    server.on("GET", "/v1/requests/r-1", Given(value=request(status=Status.SUCCEEDED)))
    server.on("GET", "/v1/instances/i-1", Given(value=instance(name="web2")))
    assert interlock("vm", "watch", "demo").code == 0


def test_watching_with_json_prints_one_event_a_line(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/events", _stream(event(3, "guest.stopped"), event(4, "guest.reset")), NOT_AUTHORISED)
    ran = interlock("watch", "--json")
    assert [json.loads(line)["sequence"] for line in ran.out.splitlines()] == [3, 4]


def test_the_events_of_a_vm_are_followed_without_a_gap(interlock: Interlock, server: ScriptedServer) -> None:
    first = responses.EventList(items=(event(1, "instance.created", name="demo", by="alice", view=[1]),), next_after=1)
    server.on(
        "GET",
        "/v1/instances/demo/events",
        Given(value=first),
        Given(value=responses.EventList(items=(), next_after=1)),
    )
    server.on("GET", "/v1/instances/demo", Given(value=instance()))
    server.on(
        "GET",
        "/v1/events",
        _stream(event(3, "instance.state", before="active", vm_state="error")),
        NOT_AUTHORISED,
    )
    ran = interlock("vm", "events", "demo", "--follow")
    created, changed = ran.out.splitlines()
    assert created.split()[-2:] == ["name=demo", "by=alice"]
    assert changed.endswith("active -> error")
    following = next(one for one in server.asked if one.path == "/v1/events")
    assert (following.target, following.headers["last-event-id"]) == ("/v1/events?instance=i-1", "1")


def test_the_console_is_printed_as_the_guest_wrote_it(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances/demo/console", Given(200, b"boot\ninterlock-guest: up demo\n", "text/plain"))
    ran = interlock("vm", "console", "demo")
    assert (ran.code, ran.out) == (0, "boot\ninterlock-guest: up demo\n")


def test_a_console_log_begins_with_as_many_lines_as_are_asked_for(interlock: Interlock, server: ScriptedServer) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    server.on("GET", "/v1/instances/demo/console", Given(200, "".join(lines).encode(), "text/plain"))
    assert interlock("vm", "console", "demo", "--log").out == "".join(lines)
    assert interlock("vm", "console", "demo", "--log", "--history", "2").out == "".join(lines[-2:])
    assert interlock("vm", "console", "demo", "--log", "--history", "0").out == ""


def test_a_console_is_followed_from_as_many_lines_as_are_asked_for(
    interlock: Interlock, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_CONSOLE_PAUSE_S", 0)
    texts = [Given(200, text, "text/plain") for text in (b"one\ntwo\n", b"one\ntwo\nthree\n")]
    server.on("GET", "/v1/instances/demo/console", *texts, Given(404, problem(404, "VM not found: demo.")))
    assert interlock("vm", "console", "demo", "--follow", "--history", "1").out == "two\nthree\n"


def test_a_vm_without_a_console_yet_has_said_nothing(interlock: Interlock, server: ScriptedServer) -> None:
    none_yet = problem(404, "The VM demo has no console yet.")
    server.on("GET", "/v1/instances/demo/console", Given(404, none_yet))
    assert interlock("vm", "console", "demo")[:2] == (0, "")


@pytest.mark.parametrize(
    ("seen", "text", "new"),
    [
        (b"", b"abc", b"abc"),
        (b"abc", b"abcd", b"d"),
        (b"abc", b"abc", b""),
        (b"abcdef", b"cdefgh", b"gh"),
        (b"abcdef", b"xyz", b"xyz"),
    ],
    ids=["first", "more", "the same", "the beginning fell off", "begun anew"],
)
def test_following_a_console_shows_only_what_is_new(
    seen: bytes, text: bytes, new: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_OVERLAP_BYTES", 3)
    assert watch.since(seen, text) == new


def test_an_event_names_its_policy_and_when_a_hold_ends() -> None:
    data: dict[str, Any] = {
        "operation": "stop",
        "policy": {"name": "standard", "digest": "5babefa9"},
        "until_ms": 1_796_092_545_269,
    }
    words = watch.event_facts(event(1, "request.held", **data)).split("  ")
    assert words[0] == "stop"
    assert re.fullmatch(r"until=\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", words[1])
    assert words[2:] == ["policy=standard"]
