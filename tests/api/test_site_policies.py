"""Policies of a site over HTTP: who asks, as a token says it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from api.conftest import ApiServer, make
from api.test_gate_by_http import freeze_in_pause
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
    """Start a server with a policy, after the end of the one before on the same data."""
    started: list[ApiServer] = []

    async def begin(policy: str) -> ApiServer:
        while started:
            await started.pop().close()
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
        if not await server.store.images.all():
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


BANK = """
[policy]
extends = "standard"

[[rule]]
id = "two-persons"
operations = ["create", "suspend", "delete"]
roles = ["member"]
unless_approved_by = ["role:admin", "group:audit"]
verdict = "deny"
reason = "approval_required"
because = "Another person must approve it."
"""


async def test_a_request_is_held_until_another_person_approves_it(start: Start) -> None:
    api = await start(BANK)
    alice, bob = await with_token(api, "alice", groups=("audit",)), await with_token(api, "bob", groups=("audit",))
    carol = await with_token(api, "carol")
    one = await make(admin_of(api), "one")
    path = f"/v1/instances/{one['id']}"
    dry = (await alice.post(f"{path}/allowed", json={"operation": "delete"})).json()
    assert (dry["disposition"], dry["reason"]) == ("denied", "approval_required")
    answer = await alice.post(f"{path}/requests", json={"operation": "delete"})
    held = answer.json()
    assert (answer.status_code, held["disposition"], held["reason"]) == (202, "held", "approval_required")
    assert "another caller than alice" in held["remedy"]
    request = f"/v1/requests/{held['request']['id']}"
    for client, word in ((alice, "nobody approves their own request"), (carol, "no rule lets carol")):
        refused = await client.post(f"{request}/approve")
        assert (refused.status_code, word in refused.json()["detail"]) == (403, True)
    approved = (await bob.post(f"{request}/approve")).json()
    assert approved["outcome"] == "approved"
    assert [each["by"] for each in approved["request"]["approvals"]] == ["bob"]
    ended = (await alice.get(f"{request}?wait=20s")).json()
    assert (ended["status"], ended["approvals"][0]["belongs"]) == ("succeeded", ["role:member", "group:audit"])
    late = await bob.post(f"{request}/approve")
    assert (late.status_code, late.json()["detail"].endswith("does not wait for an approval.")) == (409, True)
    kinds = [event["kind"] for event in (await alice.get(f"{path}/events")).json()["items"]]
    assert kinds[kinds.index("request.held") :][:3] == ["request.held", "request.approved", "request.admitted"]


async def test_an_approval_survives_a_restart_and_a_creation_is_denied(start: Start) -> None:
    api = await start(BANK)
    alice = await with_token(api, "alice")
    one = await make(admin_of(api), "one")
    held = (await alice.post(f"/v1/instances/{one['id']}/requests", json={"operation": "suspend"})).json()
    await admin_of(api).post(f"/v1/instances/{one['id']}/requests", json={"operation": "lock"})
    approved = (await admin_of(api).post(f"/v1/requests/{held['request']['id']}/approve")).json()
    assert (approved["outcome"], approved["request"]["status"]) == ("approved", "held")  # it is locked
    again = (await admin_of(api).post(f"/v1/requests/{held['request']['id']}/approve")).json()
    assert again["outcome"] == "already"
    refused = await alice.post("/v1/instances", json={"name": "two", "image": IMAGE.name})
    assert (refused.status_code, refused.json()["reason"]) == (409, "approval_required")
    api = await start(BANK)
    await admin_of(api).post(f"/v1/instances/{one['id']}/requests", json={"operation": "unlock"})
    ended = (await admin_of(api).get(f"/v1/requests/{held['request']['id']}?wait=20s")).json()
    assert (ended["status"], [each["by"] for each in ended["approvals"]]) == ("succeeded", ["admin"])


CALM = """
[policy]
extends = "standard"

[[rule]]
id = "one-at-a-time"
operations = ["suspend"]
project_outstanding_min = 1
verdict = "deny"
reason = "crowded"
"""


async def test_a_policy_sees_what_is_outstanding_elsewhere_in_the_project(start: Start) -> None:
    api = await start(CALM)
    client = admin_of(api)
    two = await make(client, "two")
    path = f"/v1/instances/{two['id']}"
    await freeze_in_pause(api, client)
    refused = await client.post(f"{path}/requests", json={"operation": "suspend"})
    assert (refused.status_code, refused.json()["reason"], refused.json()["retry_after_s"]) == (409, "crowded", None)
    allowed = (await client.get(f"{path}/allowed")).json()["operations"]
    assert next(each["reason"] for each in allowed if each["operation"] == "suspend") == "crowded"
    reset = {"operation": "reset_state", "parameters": {"vm_state": "active", "reason": "it hangs"}}
    assert (await client.post("/v1/instances/vm/requests", json=reset)).is_success
    admitted = await client.post(f"{path}/requests", json={"operation": "suspend"})
    assert admitted.status_code == 202
