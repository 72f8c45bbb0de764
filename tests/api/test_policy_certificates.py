"""A policy is loaded on a certificate of a key that the server trusts, without another exploration."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from api.conftest import ApiServer
from interlock.__main__ import main  # noqa: F401 - registers every command
from interlock.cli.commands.policy.group import policy_commands
from interlock.core.errors import Invalid
from interlock.server import Server


def run(*arguments: str) -> str:
    result = CliRunner().invoke(policy_commands, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The certificate of propolis as `policy explore` writes it, and the public key under `key`."""
    folder = tmp_path_factory.mktemp("certificates")
    key, certificate = folder / "site.key", folder / "propolis.json"
    public = run("key", str(key)).strip()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    run("explore", "propolis", "--certificate", str(certificate), "--key", str(key))
    written: dict[str, Any] = json.loads(certificate.read_text())
    assert written["public_key"] == public
    return written


def trusting(api: ApiServer, *keys: str) -> None:
    api.server.policies._trusted_keys = frozenset(keys)


async def load(client: httpx.AsyncClient, certificate: object, name: str = "propolis") -> httpx.Response:
    return await client.put("/v1/policy", json={"name": name, "certificate": certificate})


async def test_a_certificate_of_a_trusted_key_stands_for_the_exploration(
    api: ApiServer, admin: httpx.AsyncClient, signed: dict[str, Any]
) -> None:
    trusting(api, signed["public_key"])
    answer = await load(admin, signed)
    assert answer.status_code == 200, answer.text
    walked = answer.json()["exploration"]
    assert walked["certified_by"] == signed["public_key"]
    assert walked["states"] == signed["certificate"]["states"]
    now = (await admin.get("/v1/policy")).json()
    assert (now["name"], now["exploration"]) == ("propolis", walked)
    assert now["exploration"]["assumptions"] == signed["certificate"]["assumptions"]


async def test_a_certificate_that_is_not_accepted_changes_nothing_and_says_why(
    api: ApiServer, admin: httpx.AsyncClient, signed: dict[str, Any]
) -> None:
    refused = await load(admin, signed)
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:interlock:problem:policy-refused")
    assert "which this server does not trust" in refused.json()["detail"]
    assert "policy_keys" in refused.json()["remedy"]
    trusting(api, signed["public_key"])
    changed = {**signed, "certificate": {**signed["certificate"], "states": 1}}
    assert "signature does not fit" in (await load(admin, changed)).json()["detail"]
    assert "is for the policy with the digest" in (await load(admin, signed, "take2")).json()["detail"]
    assert (await load(admin, {"certificate": {}})).json()["type"] == "urn:interlock:problem:invalid"
    assert (await admin.get("/v1/policy")).json()["name"] == "patient"


async def test_what_was_explored_is_shown_after_a_restart(
    api: ApiServer, admin: httpx.AsyncClient, signed: dict[str, Any]
) -> None:
    trusting(api, signed["public_key"])
    assert (await load(admin, signed)).status_code == 200
    before = api.server.policies.now
    await api.server.close()
    api.server = Server(api.server.config, api.server.hypervisor)
    await api.server.open()
    assert api.server.policies.now == before
    assert before.walk is not None


def test_a_server_does_not_start_with_a_key_that_is_none(api: ApiServer) -> None:
    from msgspec.structs import replace

    with pytest.raises(Invalid, match="Invalid public key 'ed25519:x'"):
        Server(replace(api.server.config, policy_keys=("ed25519:x",)), api.server.hypervisor)


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    key = tmp_path / "site.key"
    key.write_text("precious")
    result = CliRunner().invoke(policy_commands, ["key", str(key)])
    assert result.exit_code != 0
    assert key.read_text() == "precious"


def test_the_certificate_of_an_exploration_that_found_something_says_so(tmp_path: Path) -> None:
    policy = Path(__file__).parents[1] / "policies" / "broken" / "no-exit-from-error.toml"
    result = CliRunner().invoke(
        policy_commands, ["explore", str(policy), "--outstanding", "1", "--certificate", str(tmp_path / "c.json")]
    )
    assert result.exit_code == 1
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["certificate"]["violations"] > 0
    assert written["signature"] is None
