"""`vm protect`, `vm unprotect` and `--hold`, as they are typed."""

from __future__ import annotations

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT, instance, problem, request
from interlock.api.schemas import responses
from interlock.core.holds import ApprovalOutcome
from interlock.core.operations import Operation
from interlock.core.records import Status

APPROVED = ApprovalOutcome.APPROVED
VM = "/v1/instances/demo"
BY_ID = "/v1/instances/i-1"
REQUESTS = "/v1/instances/demo/requests"


def test_protecting_adds_to_what_is_protected_already(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", VM, Given(value=instance(blocked_operations=(Operation.STOP,))))
    after = (Operation.STOP, Operation.DELETE, Operation.REBUILD)
    server.on("PATCH", BY_ID, Given(value=instance(blocked_operations=after)))
    ran = interlock("vm", "protect", "demo", "--from", "delete,rebuild", "--from", "stop")
    assert ran.code == 0
    assert ran.out == (
        "demo is protected from: stop, delete, rebuild\n  Not from: soft delete, force delete, which also delete it.\n"
    )
    patch = server.asked[-1]
    assert patch.json == {"blocked_operations": ["stop", "delete", "rebuild"]}
    assert patch.headers["if-match"] == '"7"'


def test_what_somebody_else_changes_meanwhile_is_kept(interlock: Interlock, server: ScriptedServer) -> None:
    server.on(
        "GET", VM, Given(value=instance()), Given(value=instance(generation=8, blocked_operations=(Operation.PAUSE,)))
    )
    both = (Operation.PAUSE, Operation.STOP)
    server.on("PATCH", BY_ID, Given(412, problem(412, "changed")), Given(value=instance(blocked_operations=both)))
    assert interlock("vm", "protect", "demo", "--from", "stop").out == "demo is protected from: pause, stop\n"
    assert server.asked[-1].json == {"blocked_operations": ["pause", "stop"]}


def test_unprotecting_takes_all_away_or_what_is_named(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", VM, Given(value=instance(blocked_operations=(Operation.STOP, Operation.PAUSE))))
    server.on("PATCH", BY_ID, Given(value=instance()))
    assert interlock("vm", "unprotect", "demo").out == "demo is protected from: nothing\n"
    assert server.asked[-1].json == {"blocked_operations": []}
    interlock("vm", "unprotect", "demo", "--from", "stop")
    assert server.asked[-1].json == {"blocked_operations": ["pause"]}


def test_a_misspelt_operation_is_refused_before_anything_is_asked(interlock: Interlock, server: ScriptedServer) -> None:
    ran = interlock("vm", "protect", "demo", "--from", "delet")
    assert ran.code == 2
    assert "Did you mean delete" in ran.err
    assert server.asked == []


def test_a_held_request_says_why_it_waits_and_until_when(interlock: Interlock, server: ScriptedServer) -> None:
    held = responses.Held(
        request=request(status=Status.HELD, held_until_at="2026-03-01T12:10:22.000Z"),
        rule="silent-power",
        reason="no_sign_of_life",
        because="The operation in progress has stalled.",
        detail="",
        blocked_by=None,
        allowed_at="2026-03-01T12:03:03.000Z",
        retry_after_s=161.0,
        until_at="2026-03-01T12:10:22.000Z",
    )
    server.on("POST", REQUESTS, Given(202, held))
    ran = interlock("vm", "reboot", "demo", "--hold", "10m")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (
        "Held: reboot of demo (no_sign_of_life), request r-1\n"
        "  The operation in progress has stalled.\n"
        "  It will be admitted at 12:03:03, unless something changes before.\n"
        "  Held until 12:10:22; `interlock request cancel r-1` cancels it.\n"
    )
    assert server.asked[-1].json == {"operation": "reboot", "parameters": {}, "hold": "10m"}


def test_a_vm_shows_what_is_held_for_it(interlock: Interlock, server: ScriptedServer) -> None:
    held = request(status=Status.HELD, held_until_at=AT)
    server.on("GET", VM, Given(value=instance(held=(held,), metadata={"owner": "ada"})))
    shown = interlock("vm", "show", "demo").out
    assert "Held:           reboot of demo: held until" in shown
    assert "Metadata:       owner=ada" in shown


def test_a_request_that_waits_for_an_approval_says_whose_and_how(interlock: Interlock, server: ScriptedServer) -> None:
    held = responses.Held(
        request=request(status=Status.HELD, held_until_at="2026-03-02T12:00:22.000Z"),
        rule="two-persons",
        reason="approval_required",
        because="Another person must approve it.",
        detail="",
        blocked_by=None,
        allowed_at=None,
        retry_after_s=None,
        remedy="It needs the approval of another caller than alice, with the role admin.",
        until_at="2026-03-02T12:00:22.000Z",
    )
    server.on("POST", REQUESTS, Given(202, held))
    assert interlock("vm", "reboot", "demo").out.splitlines()[2:4] == [
        "  It needs the approval of another caller than alice, with the role admin.",
        "  They approve it with `interlock request approve r-1`.",
    ]


def test_an_approval_says_what_became_of_the_request_which_shows_the_approver(
    interlock: Interlock, server: ScriptedServer
) -> None:
    approval = responses.Approval(by="bob", belongs=("role:admin",), at=AT)
    one = request(status=Status.QUEUED, approvals=(approval,))
    server.on("POST", "/v1/requests/r-1/approve", Given(value=responses.Approved(outcome=APPROVED, request=one)))
    assert interlock("request", "approve", "r-1").out == "Approved: reboot r-1 of alice, now queued\n"
    server.on("GET", "/v1/requests/r-1", Given(value=one))
    assert "Approved by:   bob at " in interlock("request", "show", "r-1").out
