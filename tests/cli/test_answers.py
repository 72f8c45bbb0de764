"""What the gate and the server answer, in words, as JSON and as exit codes."""

from __future__ import annotations

import json
from typing import Any

import click
import msgspec
import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT, admitted, blocker, instance, problem, refusal, request
from interlock.api.schemas import inventory, responses
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import VmState
from interlock.service.request_models import NewForward

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
        "Denied: reboot of demo (halt_pending)\n"
        "  stop r-0 by alice is queued since 12:00:03.\n"
        "  A stop is on its way and goes first.\n"
        "  Rule no-reboot-before-stop decided, evaluating the VM in the foreseen state (stopped).\n"
        "  Evaluated again: as soon as that has ended\n"
        "  Allowed now: delete, attach volume\n"
    )


def test_a_held_request_that_blocks_is_not_in_flight(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("POST", REQUESTS, Given(409, refusal(blocked_by=blocker(status=Status.HELD))))
    assert "stop r-0 by alice is held since 12:00:03." in interlock("vm", "reboot", "demo").err


@pytest.mark.parametrize(
    ("changes", "decided"),
    [
        ({"status": Status.QUEUED}, "Admitted by:   rule reboot"),
        ({"status": Status.CANCELLED}, "Admitted by:   rule reboot"),
        ({"status": Status.HELD, "held_until_at": AT}, "Denied by:     rule reboot"),
        ({"status": Status.CANCELLED, "held_until_at": AT}, "Decided by:    rule reboot"),
        ({"status": Status.CANCELLED, "held_until_at": AT, "taken_at": AT}, "Admitted by:   rule reboot"),
    ],
)
def test_a_request_is_admitted_only_if_its_rule_did_that(
    interlock: Interlock, server: ScriptedServer, changes: dict[str, Any], decided: str
) -> None:
    server.on("GET", "/v1/requests/r-1", Given(value=request(**changes)))
    assert decided in interlock("request", "show", "r-1").out.splitlines()


def test_a_request_shows_its_parameters_as_they_are_typed(interlock: Interlock, server: ScriptedServer) -> None:
    parameters = {"host": "north", "hard": True}
    server.on("GET", "/v1/requests/r-1", Given(value=request(parameters=parameters)))
    assert "Operation:     reboot host=north hard=true" in interlock("request", "show", "r-1").out.splitlines()


def test_a_refusal_that_ends_by_itself_says_when(interlock: Interlock, server: ScriptedServer) -> None:
    timed = refusal(
        blocked_by=blocker(status=Status.IN_FLIGHT, phase="rebooting", last_sign_of_life=AT),
        allowed_at="2026-03-01T12:03:03.000Z",
        retry_after_s=161.0,
        allowed_if_silent=True,
        allowed_latest_at="2026-03-01T12:10:13.000Z",
    )
    server.on("POST", REQUESTS, Given(409, timed))
    ran = interlock("vm", "reboot", "demo")
    assert "is in flight (rebooting) since 12:00:03; last progress 12:00:03." in ran.err
    latest = "unless there is progress before; at the latest 12:10:13"
    assert f"Allowed again: 12:03:03 (in 2 min 41 s), {latest}" in ran.err


def test_with_json_a_refusal_is_one_problem_document_on_standard_error(
    interlock: Interlock, server: ScriptedServer
) -> None:
    server.on("POST", REQUESTS, Given(409, refusal()))
    ran = interlock("vm", "reboot", "demo", "--json")
    assert (ran.code, ran.out) == (3, "")
    assert json.loads(ran.err) == json.loads(msgspec.json.encode(refusal()))


def test_a_redundant_answer_is_no_failure(interlock: Interlock, server: ScriptedServer) -> None:
    earlier = request(operation=Operation.STOP)
    answer = responses.Redundant(
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
    assert ran.out == "Redundant: stop of demo (already)\n  It is on its way.\n  Outstanding: stop r-1\n"


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 7), (403, 6), (404, 4), (409, 3), (412, 3), (413, 7), (422, 7), (500, 8), (503, 8)],
)
def test_every_kind_of_problem_has_its_exit_code(
    interlock: Interlock, server: ScriptedServer, status: int, code: int
) -> None:
    server.on("GET", "/v1/images", Given(status, problem(status, "It went wrong.", remedy="Do this.")))
    ran = interlock("image", "list")
    assert (ran.code, ran.out, ran.err) == (code, "", "Error: It went wrong.\n  Do this.\n")


def test_a_token_that_is_not_accepted_says_what_to_set(interlock: Interlock, server: ScriptedServer) -> None:
    server.on(
        "GET",
        "/v1/images",
        Given(401, problem(401, "Access token invalid.", remedy="Send `Authorization: Bearer <secret>`.")),
    )
    ran = interlock("image", "list")
    assert ran.code == 6
    assert ran.err.startswith(f"Error: Access token invalid.\n  Set INTERLOCK_TOKEN to a token of {server.url}; ")
    assert "header" not in ran.err


def test_an_error_page_that_is_no_problem_document_is_still_told(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/images", Given(502, b"<html>", "text/html"))
    ran = interlock("image", "list")
    assert ran.code == 8
    assert "502" in ran.err


def test_a_name_that_is_not_there_brings_the_nearest(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances/dmo", Given(404, problem(404, "VM not found: dmo.")))
    server.on("GET", "/v1/instances", Given(value={"items": [instance()], "next_cursor": None}))
    ran = interlock("vm", "show", "dmo")
    assert (ran.code, ran.err) == (4, "Error: VM not found: dmo.\n  Did you mean demo?\n")


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


def _two_vms(server: ScriptedServer) -> None:
    forwards = (NewForward(host_port=8080, guest_port=80),)
    rows = [
        instance(forwards=forwards),
        instance(id="i-2", name="other", host="north", project="lab", memory_mib=2048, root_gib=10, vcpus=4),
    ]
    server.on("GET", "/v1/instances", Given(value={"items": rows, "next_cursor": None}))


def test_a_list_shows_address_forwards_size_and_host(interlock: Interlock, server: ScriptedServer) -> None:
    _two_vms(server)
    titles, first, second = interlock("vm", "list").out.splitlines()
    for title, one, other in (
        ("ADDRESS", "10.0.2.15", "10.0.2.15"),
        ("FORWARDS", "127.0.0.1:8080 -> 80", "-"),
        ("SIZE", "1 x 128 MiB", "4 x 2 GiB, 10 GiB disk"),
        ("HOST", "here", "north"),
    ):
        at = titles.index(title)
        assert (first[at:].startswith(one), second[at:].startswith(other)) == (True, True), title
    assert "PROTECTED" not in titles, "no VM is protected"


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("name", "demo other"),
        ("-name", "other demo"),
        ("size", "demo other"),
        ("-host", "other demo"),
        ("id", "demo other"),
    ],
)
def test_a_list_is_sorted_by_a_column(interlock: Interlock, server: ScriptedServer, by: str, names: str) -> None:
    _two_vms(server)
    assert interlock("vm", "list", "--sort", by, "--columns", "name").out.split() == ["NAME", *names.split()]


def test_a_list_has_the_columns_that_are_named(interlock: Interlock, server: ScriptedServer) -> None:
    _two_vms(server)
    ran = interlock("vm", "list", "--columns", "id, project,name", "--all-projects")
    assert [line.split() for line in ran.out.splitlines()] == [
        ["ID", "PROJECT", "NAME"],
        ["i-1", "default", "demo"],
        ["i-2", "lab", "other"],
    ]
    assert server.asked[0].target == "/v1/instances?all_projects=true&limit=500"
    wrong = interlock("vm", "list", "--columns", "nmae")
    assert (wrong.code, "Unknown column 'nmae'. Columns: name, state," in wrong.err) == (2, True)
    assert interlock("vm", "list", "--sort", "color").code == 2


def test_volumes_are_shown_by_name(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances/demo", Given(value=instance(volumes=("v-1", "v-2"))))
    volume = inventory.Volume(id="v-1", name="data", project="default", size_bytes=1, attached_to="i-1", created_at=AT)
    server.on("GET", "/v1/volumes", Given(value={"items": [volume]}))
    assert "Volumes:        data [v-1], v-2\n" in interlock("vm", "show", "demo").out


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_gets_the_columns_that_fit(
    interlock: Interlock, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    _two_vms(server)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = click.unstyle(interlock("vm", "list").out).splitlines()
    assert lines[0].startswith("NAME   STATE   POWER")
    assert max(map(len, lines)) <= columns
    assert ("FORWARDS" in lines[0].split(), "ID" in lines[0].split()) == (columns >= 80, columns >= 120)


def test_why_says_what_would_be_answered_and_what_instead(interlock: Interlock, server: ScriptedServer) -> None:
    shared: dict[str, Any] = {
        "rule": "r",
        "foreseen": False,
        "vm_state": VmState.ACTIVE,
        "supersedes": (),
        "cancels": (),
    }
    nothing: dict[str, Any] = {"blocked_by": None, "allowed_at": None, "retry_after_s": None, "remedy": None}
    no = responses.AllowedOperation(
        operation=Operation.UNPAUSE, disposition="denied", reason="not_paused", because="It is not paused.", detail="",
        **shared, **nothing,
    )  # fmt: skip
    yes = responses.AllowedOperation(
        operation=Operation.STOP, disposition="admitted", reason=None, because=None, detail="Yes.", **shared, **nothing
    )
    answers = responses.AllowedOperations(
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
        "Denied: unpause of demo (not_paused)\n  It is not paused.\n"
        "  Rule r decided, evaluating the VM as it is now (active).\n  Allowed now: stop\n"
    )
    assert json.loads(interlock("why", "demo", "stop", "--json").out)["disposition"] == "admitted"
    assert interlock("why", "demo").out.splitlines()[2].split()[:3] == ["unpause", "denied", "not_paused"]
    never = msgspec.structs.replace(no, operation=Operation.UNRESCUE, reason="not_in_this_state", because="Never now.")
    several = msgspec.structs.replace(answers, operations=(yes, never))
    server.on("GET", "/v1/instances/demo/allowed", Given(value=several))
    lines = interlock("why", "demo").out.splitlines()
    assert lines[0] == "demo is active."
    assert [line.split() for line in lines[1:3]] == [
        ["OPERATION", "ANSWER", "REASON", "RETRY", "AT", "WHY"],
        ["stop", "admitted", "-", "-", "-"],
    ]
    assert lines[3:] == ["Not possible while active (not_in_this_state): unrescue"]


def test_deleting_asks_first_on_a_terminal(
    interlock: Interlock, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("POST", REQUESTS, Given(202, admitted(request(operation=Operation.DELETE))))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "n")
    assert interlock("vm", "delete", "demo").code == 130
    assert interlock("vm", "delete", "demo", "--yes").code == 0
    assert len(server.asked) == 1


def test_nobodys_text_passes_for_a_line_of_the_program(interlock: Interlock, server: ScriptedServer) -> None:
    """Found with the metadata `k=v<newline>State: deleted`."""
    forged = "v\nState:          deleted\x1b[1A\u202e"
    one = instance(metadata={"k": forged, forged: "v"}, tags=(forged,), error=forged, locked_by=forged)
    server.on("GET", "/v1/instances/demo", Given(value=one))
    ran = interlock("vm", "show", "demo")
    assert ran.code == 0
    assert [line for line in ran.out.splitlines() if line.startswith("State:")] == ["State:          active"]
    assert set(ran.out) - {"\n"} == {one for one in ran.out if one.isprintable()}
    assert "v\\nState:          deleted\\x1b[1A\\u202e" in ran.out
    ran = interlock("vm", "show", "demo", "--json")
    assert msgspec.json.decode(ran.out, type=responses.Instance).metadata["k"] == forged, "a program gets it as it is"


def test_an_error_that_repeats_what_was_typed_stays_on_its_line(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances/a%0AState%3A%20gone", Given(404, problem(404, "VM not found: a\nState: gone.")))
    ran = interlock("vm", "show", "a\nState: gone")
    assert "VM not found: a\\nState: gone." in ran.err
