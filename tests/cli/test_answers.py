"""What the gate and the server answer, in words, as JSON and as exit codes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT, admitted, blocker, instance, problem, refusal, request
from interlock.api import schemas
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import VmState

REQUESTS = "/v1/instances/demo/requests"


def test_an_admitted_operation_is_submitted_once_and_named_with_its_request(
    interlock: Interlock, server: ScriptedServer
) -> None:
    server.on("POST", REQUESTS, Given(202, admitted()))
    ran = interlock("vm", "reboot", "demo", "--hard")
    assert (ran.code, ran.out, ran.err) == (0, "Admitted: reboot of demo, request r-1\n", "")
    (asked,) = server.asked
    assert asked.json == {"operation": "reboot", "parameters": {"hard": True}}
    assert len(asked.headers["idempotency-key"]) >= 16


def test_a_refusal_says_who_blocks_since_when_and_what_is_allowed(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("POST", REQUESTS, Given(409, refusal()))
    ran = interlock("vm", "reboot", "demo")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == (
        "Refused: reboot of demo (halt_pending)\n"
        "  stop r-0 by alice is queued since 12:00:03.\n"
        "  A stop is on its way and goes first.\n"
        "  Rule no-reboot-before-stop decided, judging the VM when it is stopped, after what is outstanding.\n"
        "  Judged anew: as soon as that has ended\n"
        "  Allowed now: delete, attach volume\n"
    )


def test_a_refusal_that_ends_by_itself_says_when(interlock: Interlock, server: ScriptedServer) -> None:
    timed = refusal(
        blocked_by=blocker(status=Status.IN_FLIGHT, phase="rebooting", last_sign_of_life=AT),
        allowed_at="2026-03-01T12:03:03.000Z",
        retry_after_s=161.0,
    )
    server.on("POST", REQUESTS, Given(409, timed))
    ran = interlock("vm", "reboot", "demo")
    assert "is in flight (rebooting) since 12:00:03; last sign of life 12:00:03." in ran.err
    assert "Allowed again: 12:03:03 (in 2 min 41 s), unless it shows life before" in ran.err


def test_with_json_a_refusal_is_one_problem_document_on_standard_error(
    interlock: Interlock, server: ScriptedServer
) -> None:
    server.on("POST", REQUESTS, Given(409, refusal()))
    ran = interlock("vm", "reboot", "demo", "--json")
    assert (ran.code, ran.out) == (3, "")
    assert json.loads(ran.err) == json.loads(msgspec.json.encode(refusal()))


def test_a_redundant_answer_is_no_failure(interlock: Interlock, server: ScriptedServer) -> None:
    earlier = request(operation=Operation.STOP)
    answer = schemas.Redundant(
        rule="again",
        reason="already",
        because="It is on its way.",
        request=earlier,
        allowed_at=None,
        retry_after_s=None,
    )
    server.on("POST", REQUESTS, Given(200, answer))
    ran = interlock("vm", "stop", "demo")
    assert ran.code == 0
    assert ran.out == "Nothing to do: stop of demo (already)\n  It is on its way.\n  On its way: stop r-1\n"


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 7), (401, 6), (403, 6), (404, 4), (409, 3), (412, 3), (413, 7), (422, 7), (500, 8), (503, 8)],
)
def test_every_kind_of_problem_has_its_exit_code(
    interlock: Interlock, server: ScriptedServer, status: int, code: int
) -> None:
    server.on("GET", "/v1/images", Given(status, problem(status, "It went wrong.", remedy="Do this.")))
    ran = interlock("image", "list")
    assert (ran.code, ran.out, ran.err) == (code, "", "Error: It went wrong.\n  Do this.\n")


def test_an_error_page_that_is_no_problem_document_is_still_told(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/images", Given(502, b"<html>", "text/html"))
    ran = interlock("image", "list")
    assert ran.code == 8
    assert "502" in ran.err


def test_a_name_that_is_not_there_brings_the_nearest(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances/dmo", Given(404, problem(404, "There is no instance dmo.")))
    server.on("GET", "/v1/instances", Given(value={"items": [instance()], "next_cursor": None}))
    ran = interlock("vm", "show", "dmo")
    assert (ran.code, ran.err) == (4, "Error: There is no instance dmo.\n  Did you mean demo?\n")


def test_a_name_stays_one_part_of_the_path(interlock: Interlock, server: ScriptedServer) -> None:
    assert interlock("vm", "show", "../tokens?x=1").code == 4
    assert server.asked[0].target == "/v1/instances/..%2Ftokens%3Fx%3D1"


def test_text_from_elsewhere_cannot_move_the_cursor(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/images", Given(422, problem(422, "bad\x1b[2J name")))
    assert "\x1b" not in interlock("image", "list").err


def test_a_list_is_aligned_and_leads_through_all_pages(interlock: Interlock, server: ScriptedServer) -> None:
    first, second = instance(), instance(id="i-2", name="a-longer-name", vm_state=VmState.STOPPED)
    server.on(
        "GET",
        "/v1/instances",
        Given(value={"items": [first], "next_cursor": "c"}),
        Given(value={"items": [second], "next_cursor": None}),
    )
    ran = interlock("vm", "list", "--tag", "web")
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "demo", "a-longer-name"]
    assert {line.index(word) for line, word in zip(lines, ("STATE", "active", "stopped"), strict=True)} == {15}
    assert "19 s" in lines[1]
    assert [asked.target for asked in server.asked] == [
        "/v1/instances?tag=web&limit=500",
        "/v1/instances?tag=web&limit=500&cursor=c",
    ]


def test_a_list_of_vms_on_several_hosts_says_on_which(interlock: Interlock, server: ScriptedServer) -> None:
    here, there = instance(), instance(id="i-2", name="other", host="north")
    server.on(
        "GET",
        "/v1/instances",
        Given(value={"items": [here], "next_cursor": None}),
        Given(value={"items": [here, there], "next_cursor": None}),
    )
    assert "HOST" not in interlock("vm", "list").out
    titles, _, second = interlock("vm", "list").out.splitlines()
    assert second.index("north") == titles.index("HOST")


def test_why_says_what_would_be_answered_and_what_instead(interlock: Interlock, server: ScriptedServer) -> None:
    shared: dict[str, Any] = {
        "rule": "r",
        "foreseen": False,
        "vm_state": VmState.ACTIVE,
        "supersedes": (),
        "cancels": (),
    }
    nothing: dict[str, Any] = {"blocked_by": None, "allowed_at": None, "retry_after_s": None}
    no = schemas.AllowedOperation(
        operation=Operation.UNPAUSE, disposition="denied", reason="not_paused", because="It is not paused.", detail="",
        **shared, **nothing,
    )  # fmt: skip
    yes = schemas.AllowedOperation(
        operation=Operation.STOP, disposition="admitted", reason=None, because=None, detail="Yes.", **shared, **nothing
    )
    answers = schemas.AllowedOperations(
        instance="i-1",
        name="demo",
        generation=7,
        vm_state=VmState.ACTIVE,
        task_state="none",
        at=AT,
        operations=(no, yes),
    )
    server.on("GET", "/v1/instances/demo/allowed", Given(value=answers))
    ran = interlock("why", "demo", "unpause")
    assert ran.code == 0
    assert ran.out == (
        "Refused: unpause of demo (not_paused)\n  It is not paused.\n"
        "  Rule r decided, judging the VM as it is now (active).\n  Allowed now: stop\n"
    )
    assert json.loads(interlock("why", "demo", "stop", "--json").out)["disposition"] == "admitted"
    assert interlock("why", "demo").out.splitlines()[2].split()[:3] == ["unpause", "denied", "not_paused"]


def test_deleting_asks_first_on_a_terminal_only(
    interlock: Interlock, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("POST", REQUESTS, Given(202, admitted(request(operation=Operation.DELETE))))
    assert interlock("vm", "delete", "demo").code == 0
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "n")
    assert interlock("vm", "delete", "demo").code == 130
    assert interlock("vm", "delete", "demo", "--yes").code == 0
    assert len(server.asked) == 2
