"""`interlock token`: secrets on standard output only, and what the list says."""

from __future__ import annotations

from msgspec.structs import replace

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT
from interlock.api.schemas.inventory import MadeToken, Token, TokenList
from interlock.core.roles import Role

CI = Token(id="t-1", name="ci", role=Role.MEMBER, project="research", host=None, created_at=AT)
EXPIRY = "2026-03-01T13:00:03.000Z"


def test_a_new_token_expires_when_asked_and_only_its_secret_is_on_standard_output(
    interlock: Interlock, server: ScriptedServer
) -> None:
    made = MadeToken(token=replace(CI, expires_at=EXPIRY), secret="ilk_new")
    server.on("POST", "/v1/tokens", Given(201, made))
    ran = interlock("token", "create", "ci", "--role", "member", "--project", "research", "--expires-in", "1h")
    assert (ran.code, ran.out) == (0, "ilk_new\n")
    assert server.asked[-1].json["expires_in"] == "1h"
    assert "member of research" in ran.err
    assert "expires at 13:00:03" in ran.err


def test_a_rotation_says_until_when_the_former_secret_is_valid(interlock: Interlock, server: ScriptedServer) -> None:
    made = MadeToken(token=replace(CI, former_until_at=EXPIRY), secret="ilk_new")
    server.on("POST", "/v1/tokens/ci/rotate", Given(200, made))
    ran = interlock("token", "rotate", "ci", "--overlap", "60m")
    assert (ran.code, ran.out) == (0, "ilk_new\n")
    assert server.asked[-1].json == {"overlap": "1h", "expires_in": None}
    assert "The former secret is valid until 13:00:03." in ran.err


def test_a_new_admin_is_said_to_administer_the_whole_server(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("POST", "/v1/tokens", Given(201, MadeToken(token=replace(CI, role=Role.ADMIN), secret="ilk_new")))
    ran = interlock("token", "create", "ci", "--role", "admin", "--project", "research", "--server-admin")
    assert server.asked[-1].json["server_admin"] is True
    assert "admin of the whole server, in the project research" in ran.err


def test_the_list_has_expiry_and_last_use(interlock: Interlock, server: ScriptedServer) -> None:
    gone = replace(CI, name="gone", expires_at=AT, expired=True)
    used = replace(CI, name="used", expires_at=EXPIRY, last_used_at=AT)
    rotated = replace(CI, name="rotated", former_until_at=EXPIRY)
    server.on("GET", "/v1/tokens", Given(value=TokenList(items=(CI, gone, used, rotated))))
    ran = interlock("token", "list")
    lines = {line.split()[0]: line for line in ran.out.splitlines()[1:]}
    assert lines["ci"].count("never") == 2
    assert "expired" in lines["gone"]
    assert "never, the former secret 13:00:03" in lines["rotated"]
    assert "13:00:03" in lines["used"]
    assert "19 s ago" in lines["used"]
