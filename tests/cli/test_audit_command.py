"""`interlock audit`: as people read it, and as a log collector does."""

from __future__ import annotations

import json
from urllib.parse import parse_qsl, urlsplit

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT
from interlock.api.schemas.projects import AuditEntries, AuditEntry
from interlock.ports.audit import Outcome

CREATED = AuditEntry(
    sequence=7,
    at=AT,
    action="token.create",
    outcome=Outcome.SUCCEEDED,
    who="ada",
    role="admin",
    project="default",
    address="192.0.2.1",
    target="ci",
    details={"role": "member"},
)
GUESSED = AuditEntry(
    sequence=8,
    at=AT,
    action="authenticate",
    outcome=Outcome.REFUSED,
    who="",
    role="",
    project="",
    address="192.0.2.9",
    target="/v1/instances",
    details={"count": 10},
)
NEWEST_FIRST = AuditEntries(items=(GUESSED, CREATED), next_cursor=None, next_after=8)


def sent(server: ScriptedServer, at: int = -1) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(server.asked[at].target).query))


def test_the_newest_entry_is_the_last_line(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/audit", Given(value=NEWEST_FIRST))
    ran = interlock("audit", "--limit", "2")
    first, last = ran.out.splitlines()
    assert "succeeded  token.create  ci  by ada at 192.0.2.1  role=member" in first
    assert "refused  authenticate  /v1/instances  by unknown at 192.0.2.9  count=10" in last
    assert sent(server) == {"limit": "2"}


def test_filters_are_sent(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/audit", Given(value=AuditEntries(items=(), next_cursor=None, next_after=0)))
    ran = interlock("audit", "--action", "token", "--who", "ada", "--outcome", "refused", "--after", "3")
    assert (ran.code, ran.out, ran.err) == (0, "", "No entries.\n")
    filters = {"action": "token", "who": "ada", "outcome": "refused"}
    assert sent(server) == {**filters, "after": "3", "limit": "50"}


def test_followed_as_json_it_is_one_object_per_line(interlock: Interlock, server: ScriptedServer) -> None:
    later = AuditEntries(items=(GUESSED,), next_cursor=None, next_after=8)
    server.on(
        "GET",
        "/v1/audit",
        Given(value=AuditEntries(items=(CREATED,), next_cursor=None, next_after=7)),
        Given(value=later),
        Given(404, {"type": "urn:interlock:problem:not-found", "title": "Not found", "status": 404, "detail": "Gone."}),
    )
    ran = interlock("audit", "--follow", "--json", "--after", "6")
    assert [json.loads(line)["sequence"] for line in ran.out.splitlines()] == [7, 8]
    assert [sent(server, at)["after"] for at in range(3)] == ["6", "7", "8"]
