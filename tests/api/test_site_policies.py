"""Policies of a site over HTTP: who asks, as a token says it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from api.conftest import ApiServer, make
from in_process.embedded import IMAGE, QUICK
from in_process.trusting_verifier import TrustingProver
from interlock.config import Config
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.server import Server

Start = Callable[[str], Awaitable[ApiServer]]
GROUPS = """
[policy]
extends = "standard"

[[rule]]
id = "only-ops-stop"
operations = ["stop"]
groups = ["!ops"]
verdict = "deny"
reason = "not_ops"
"""


@pytest.fixture
async def start(tmp_path: Path, host: SimulatedHost) -> AsyncIterator[Start]:
    """Start a server with a policy."""
    started: list[ApiServer] = []

    async def begin(policy: str) -> ApiServer:
        (tmp_path / "site.toml").write_text(policy)
        config = Config(
            data_dir=str(tmp_path / "data"),
            hypervisor="simulated",
            host="here",
            policy=str(tmp_path / "site.toml"),
            driver=QUICK,
        )
        (tmp_path / "data").mkdir(mode=0o711, exist_ok=True)
        server = Server(config, SimulatedHypervisor(host), prover=TrustingProver())
        await server.open()
        await server.store.images.put(IMAGE)
        started.append(ApiServer(server, host))
        return started[-1]

    yield begin
    for one in started:
        await one.close()


def admin_of(api: ApiServer) -> httpx.AsyncClient:
    return api.client((api.server.folder / "admin.token").read_text().strip())


async def with_token(
    api: ApiServer, name: str, role: str = "member", groups: tuple[str, ...] = ()
) -> httpx.AsyncClient:
    wish = {"name": name, "role": role, "project": "default", "groups": groups}
    made = await admin_of(api).post("/v1/tokens", json=wish)
    assert made.status_code == 201, made.text
    return api.client(made.json()["secret"])


async def test_a_token_has_groups_and_a_policy_sees_them(start: Start) -> None:
    api = await start(GROUPS)
    ops, dev = await with_token(api, "olga", groups=("ops", "dba", "ops")), await with_token(api, "dave")
    assert [one["groups"] for one in (await admin_of(api).get("/v1/tokens")).json()["items"]][1:] == [
        ["ops", "dba"],
        [],
    ]
    one = await make(dev, "one")
    path = f"/v1/instances/{one['id']}/requests"
    refused = await dev.post(path, json={"operation": "stop"})
    assert (refused.status_code, refused.json()["reason"]) == (409, "not_ops")
    allowed = (await ops.get(f"/v1/instances/{one['id']}/allowed")).json()["operations"]
    assert [each["disposition"] for each in allowed if each["operation"] == "stop"] == ["admitted"]
    admitted = (await ops.post(path, json={"operation": "stop"})).json()["request"]
    assert (admitted["project"], admitted["groups"]) == ("default", ["ops", "dba"])


@pytest.mark.parametrize("groups", [["a b"], [f"g{number}" for number in range(33)], "ops"])
async def test_groups_that_cannot_be_are_refused(start: Start, groups: object) -> None:
    wish = {"name": "x", "role": "member", "project": "default", "groups": groups}
    refused = await admin_of(await start(GROUPS)).post("/v1/tokens", json=wish)
    assert refused.status_code == 422
    assert "groups" in refused.text


FREEZE = """
[policy]
extends = "standard"

[[rule]]
id = "freeze"
operations = ["stop"]
within = ["{window}"]
verdict = "deny"
reason = "freeze"
because = "Nothing is stopped during the freeze."
"""


async def test_a_refusal_in_a_time_window_names_its_end_and_a_held_request_waits_for_it(start: Start) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    begin, end = midnight - timedelta(days=1), midnight + timedelta(days=2)
    window = f"{begin:%a} 00:00-{end:%a} 00:00 UTC"
    api = await start(FREEZE.format(window=window))
    client = admin_of(api)
    one = await make(client, "one")
    path = f"/v1/instances/{one['id']}/requests"
    refused = (await client.post(path, json={"operation": "stop"})).json()
    assert refused["reason"] == "freeze"
    assert f"allowed at {end:%Y-%m-%dT%H:%M:%S}" in refused["detail"] or "23:59:59" in refused["detail"]
    allowed = (await client.get(f"/v1/instances/{one['id']}/allowed")).json()["operations"]
    stop = next(each for each in allowed if each["operation"] == "stop")
    assert abs(stop["retry_after_s"] - refused["retry_after_s"]) < 60
    held = (await client.post(path, json={"operation": "stop", "hold": "1h"})).json()
    assert (held["disposition"], held["reason"], held["request"]["windows"]) == ("held", "freeze", [window])
