"""A policy is loaded while the server runs: proved first, switched at once, told with each decision, brought back."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from api.conftest import ApiServer, make
from api.test_gate_by_http import ask, freeze_in_pause
from in_process.embedded import QUICK
from interlock.config import Config
from interlock.core.errors import PolicyError, StoreFull
from interlock.core.policy_switches import PolicyBundle, Walk
from interlock.core.roles import Role
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.policies.language import bundle as bundles
from interlock.policies.language.loader import load as read_policy
from interlock.policies.lint import check_file
from interlock.policies.verification import BrokenLaw, Proof
from interlock.server import DATABASE, Server
from interlock.service import policy_verifier
from interlock.service.policies import Policies
from interlock.service.policy_verifier import PolicyVerifier
from interlock.stores.policy_table import PolicyTable

NO_PAUSE = """
[policy]
name = "no-pause"
extends = "standard"

[[rule]]
id = "no-pause"
operations = ["pause", "unpause"]
verdict = "deny"
reason = "no_pause"
because = "Nobody pauses here."
"""
CONTRADICTION = """
[policy]
name = "contradiction"
extends = "standard"

[[rule]]
id = "everything-else"
operations = ["stop"]
vm_state = ["active"]
verdict = "deny"
reason = "never"

[[rule]]
id = "never-asked"
operations = ["stop"]
vm_state = ["active"]
verdict = "admit"
"""
WRONG = NO_PAUSE.replace('"unpause"', '"unpuase"')


def sent(text: str, **terms: object) -> dict[str, object]:
    """A body that loads one file, without walking it unless the terms say so."""
    return {"main": "site.toml", "files": {"site.toml": text}, "explore_seconds": 0, **terms}


async def put(client: httpx.AsyncClient, text: str, **terms: object) -> dict[str, Any]:
    """Load a policy, which must be accepted, and what was answered."""
    answer = await client.put("/v1/policy", json=sent(text, **terms))
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


async def in_force(client: httpx.AsyncClient) -> dict[str, Any]:
    said: dict[str, Any] = (await client.get("/v1/policy")).json()
    return said


class FixedProver(PolicyVerifier):
    """Finds what a test has laid out, when the test lets it."""

    def __init__(self, proof: Proof) -> None:
        self.proof = proof
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.explore_ms: int | None = None

    async def prove(self, bundle: PolicyBundle, explore_ms: int) -> Proof:
        self.explore_ms = explore_ms
        self.asked.set()
        await self.go.wait()
        return self.proof


def find(api: ApiServer, **proof: Any) -> FixedProver:
    """Have the server's prover find this of a policy that reads as `take2`."""
    prover = FixedProver(Proof(policy=read_policy("take2"), **proof))
    api.server.policies._prover = prover
    return prover


# -------------------------------------------------------------------------------------------------------- switching


async def test_a_rule_may_ask_for_the_name_of_the_token(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    robot, person = await api.token("ci-1"), await api.token("alice")
    await put(admin, NO_PAUSE.replace('verdict = "deny"', 'requested_by = ["ci-*"]\nverdict = "deny"'))
    rules = {rule["id"]: rule for rule in (await in_force(admin))["rules"]}
    assert rules["no-pause"]["requested_by"] == ["ci-*"]
    for client, allowed in ((robot, False), (person, True)):
        operations = (await client.get("/v1/instances/vm/allowed")).json()["operations"]
        pause = next(one for one in operations if one["operation"] == "pause")
        assert (pause["disposition"] == "admitted") is allowed
        assert (await ask(client, "pause", Prefer="wait=20")).status_code == (200 if allowed else 409)


async def test_a_policy_that_is_loaded_decides_from_then_on_and_is_told_with_each_decision(
    admin: httpx.AsyncClient,
) -> None:
    vm = await make(admin, "vm")
    assert (await ask(admin, "pause", Prefer="wait=20")).status_code == 200
    assert (await ask(admin, "unpause", Prefer="wait=20")).status_code == 200
    before = await in_force(admin)
    assert (before["name"], before["source"], before["loaded_by"]) == ("patient", "configured", "server")
    said = await put(admin, NO_PAUSE)
    assert (said["name"], said["changed"]) == ("no-pause", True)
    assert said["previous"] == {name: before[name] for name in ("name", "digest", "number")}
    refused = await ask(admin, "pause")
    assert (refused.status_code, refused.json()["reason"], refused.json()["rule"]) == (409, "no_pause", "no-pause")
    now = await in_force(admin)
    assert (now["name"], now["digest"], now["source"]) == ("no-pause", said["digest"], "loaded")
    assert (now["loaded_by"], now["main"], now["files"]) == ("admin", "site.toml", ["site.toml"])
    assert now["digest"] != before["digest"]
    events = (await admin.get(f"/v1/instances/{vm['id']}/events")).json()["items"]
    told = [event["data"]["policy"] for event in events if "policy" in event["data"]]
    assert told[-1] == {"name": "no-pause", "digest": now["digest"][:16]}
    assert {"name": "patient", "digest": before["digest"][:16]} in told


async def test_a_built_in_is_loaded_by_its_name(admin: httpx.AsyncClient) -> None:
    answer = await admin.put("/v1/policy", json={"name": "propolis", "explore_seconds": 0})
    assert (answer.status_code, answer.json()["name"]) == (200, "propolis")
    now = await in_force(admin)
    assert (now["name"], now["outstanding_max"]) == ("propolis", read_policy("propolis").outstanding_max)
    assert answer.headers["etag"] == f'"{now["digest"]}"'
    again = await admin.put("/v1/policy", json={"name": "propolis", "explore_seconds": 0})
    assert (again.json()["changed"], again.json()["number"]) == (False, answer.json()["number"])


async def test_a_policy_is_sent_with_what_it_extends_and_read_back_as_it_was_sent(admin: httpx.AsyncClient) -> None:
    main = '[policy]\nname = "upper"\nextends = "./lower.toml"\n# Größe\r\n'
    files = {"upper.toml": main, "lower.toml": NO_PAUSE}
    answer = await admin.put("/v1/policy", json={"main": "upper.toml", "files": files, "explore_seconds": 0})
    assert answer.status_code == 200, answer.text
    assert (await admin.get("/v1/policy/text")).content == main.encode()
    other = await admin.get("/v1/policy/text", params={"file": "lower.toml"})
    assert (other.text, other.headers["content-type"]) == (NO_PAUSE, "application/toml")
    assert (await admin.get("/v1/policy/text", params={"file": "none.toml"})).status_code == 404
    kept = (await admin.get(f"/v1/policy/history/{answer.json()['number']}")).json()
    assert kept == {"number": answer.json()["number"], "main": "upper.toml", "files": files}


async def test_a_text_may_be_sent_as_it_is_with_its_terms_in_the_query(admin: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/toml"}
    query = {"dry_run": "true", "explore_seconds": "0"}
    tried = await admin.put("/v1/policy", content=NO_PAUSE.encode(), headers=headers, params=query)
    assert (tried.status_code, tried.json()["name"], tried.json()["changed"]) == (200, "no-pause", False)
    assert (await in_force(admin))["name"] == "patient"
    wrong = await admin.put("/v1/policy", content=NO_PAUSE.encode(), headers=headers, params={"dry_run": "perhaps"})
    assert (wrong.status_code, wrong.json()["type"]) == (422, "urn:interlock:problem:invalid")
    for seconds in ("nan", "inf", "-1", "1e300"):
        absurd = await admin.put("/v1/policy", json={"name": "take2"}, params={"explore_seconds": seconds})
        assert absurd.status_code == 422, seconds
    binary = await admin.put("/v1/policy", content=b"\xff\xfe", headers=headers)
    assert binary.status_code == 422


async def test_only_an_admin_loads_a_policy_and_everybody_may_look(api: ApiServer, admin: httpx.AsyncClient) -> None:
    member = await api.token("member")
    reader = await api.token("reader", Role.READER)
    for client in (member, reader):
        assert (await client.put("/v1/policy", json=sent(NO_PAUSE))).status_code == 403
        assert (await client.post("/v1/policy/rollback", json={})).status_code == 403
    assert (await in_force(reader))["name"] == "patient"
    assert (await reader.get("/v1/policy/history")).status_code == 200
    assert len((await admin.get("/v1/policy/history")).json()["items"]) == 1


async def test_only_the_policy_that_was_looked_at_is_replaced(admin: httpx.AsyncClient) -> None:
    etag = (await admin.get("/v1/policy")).headers["etag"]
    first = await admin.put("/v1/policy", json=sent(NO_PAUSE), headers={"If-Match": etag})
    assert first.status_code == 200
    late = await admin.put("/v1/policy", json={"name": "propolis", "explore_seconds": 0}, headers={"If-Match": etag})
    assert (late.status_code, late.json()["type"]) == (412, "urn:interlock:problem:policy-mismatch")
    short = await admin.post("/v1/policy/rollback", json={"explore_seconds": 0}, headers={"If-Match": '""'})
    assert short.status_code == 412
    told = {"If-Match": first.json()["digest"][:16]}
    back = await admin.post("/v1/policy/rollback", json={"explore_seconds": 0}, headers=told)
    assert (back.status_code, back.json()["name"]) == (200, "patient")


async def test_the_policy_in_force_is_among_the_figures(admin: httpx.AsyncClient) -> None:
    said = await put(admin, NO_PAUSE)
    lines = [line for line in (await admin.get("/metrics")).text.splitlines() if "policy_info{" in line]
    assert lines == [f'interlock_policy_info{{digest="{said["digest"]}",name="no-pause"}} 1.0']


async def test_a_disk_that_is_full_changes_nothing(
    api: ApiServer, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> int:
        raise StoreFull("There is no room.")

    monkeypatch.setattr(PolicyTable, "switch", fail)
    answer = await admin.put("/v1/policy", json=sent(NO_PAUSE))
    assert answer.status_code == 507
    assert (await in_force(admin))["name"] == "patient"
    assert api.server.policy.policy.name == "patient"


# ----------------------------------------------------------------------------------------------------------- proving


async def stays(client: httpx.AsyncClient) -> bool:
    """Whether nothing was changed at all."""
    items = (await client.get("/v1/policy/history")).json()["items"]
    return (await in_force(client))["name"] == "patient" and len(items) == 1


async def test_a_text_that_is_no_policy_is_refused_with_its_place(admin: httpx.AsyncClient) -> None:
    answer = await admin.put("/v1/policy", json=sent(WRONG))
    said = answer.json()
    assert (answer.status_code, said["type"]) == (422, "urn:interlock:problem:policy")
    assert said["detail"].startswith("site.toml:8:")
    assert "unpuase" in said["detail"]
    assert await stays(admin)


async def test_a_policy_that_fails_its_check_is_refused_whole_with_what_was_found(admin: httpx.AsyncClient) -> None:
    answer = await admin.put("/v1/policy", json=sent(CONTRADICTION))
    said = answer.json()
    assert (answer.status_code, said["type"]) == (422, "urn:interlock:problem:policy-refused")
    (error,) = (finding for finding in said["findings"] if finding["severity"] == "error")
    assert (error["rule"], error["place"].rpartition("/")[2].split(":")[:2]) == ("never-asked", ["site.toml", "13"])
    assert said["detail"] == "Policy rejected: its check found 1 error. patient stays in force."
    assert await stays(admin)


async def test_a_policy_is_walked_and_told_how_far(admin: httpx.AsyncClient) -> None:
    said = await put(admin, '[policy]\nname = "small"\nextends = "propolis"\n', explore_seconds=20)
    assert said["exploration"]["complete"]
    assert said["exploration"]["states"] > 500
    assert (await put(admin, NO_PAUSE, explore_seconds=0.001))["exploration"]["complete"] is False
    assert (await put(admin, NO_PAUSE, dry_run=True))["exploration"] is None


async def test_a_policy_that_lets_a_law_be_broken_is_refused_with_the_story(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    story = ('{"instance":{"vm_state":"active"}}', '{"submit":"stop"}')
    walk = Walk(states=7, transitions=9, complete=False, seconds=0.1)
    find(api, walk=walk, violations=(BrokenLaw(law=5, what="stuck", story=story),))
    answer = await admin.put("/v1/policy", json=sent(NO_PAUSE))
    said = answer.json()
    assert (answer.status_code, said["type"]) == (422, "urn:interlock:problem:policy-refused")
    assert said["violations"] == [{"law": 5, "what": "stuck", "story": list(story)}]
    assert said["exploration"]["states"] == 7
    assert "law 5" in said["detail"]
    assert await stays(admin)


@pytest.mark.parametrize(("asked", "walked_ms"), [({}, Config().policy_explore_ms), ({"explore_seconds": 1.5}, 1_500)])
async def test_who_loads_says_for_how_long_it_is_walked(
    api: ApiServer, admin: httpx.AsyncClient, asked: dict[str, float], walked_ms: int
) -> None:
    prover = find(api)
    await admin.put("/v1/policy", json={"name": "take2", **asked})
    assert prover.explore_ms == walked_ms
    too_long = await admin.put("/v1/policy", json={"name": "take2", "explore_seconds": 60.5})
    assert (too_long.status_code, "60" in too_long.json()["detail"]) == (422, True)


@pytest.mark.parametrize(
    ("timeout_ms", "code", "told"),
    [
        (1, "", "timed out after"),
        (60_000, "import os; os.abort()", "signal "),
        (60_000, "print('nonsense')", "exit code 0"),
        (60_000, "raise RuntimeError('as it were')", "exit code 1"),
    ],
)
async def test_a_prover_that_dies_or_does_not_end_is_told_and_changes_nothing(
    admin: httpx.AsyncClient, api: ApiServer, monkeypatch: pytest.MonkeyPatch, timeout_ms: int, code: str, told: str
) -> None:
    api.server.policies._prover = PolicyVerifier((), timeout_ms, 4096)
    if code:
        command = policy_verifier._command

        def other(*given: Any) -> list[str]:
            words = command(*given)
            return [*words[: words.index("-P")], "-c", code]

        monkeypatch.setattr(policy_verifier, "_command", other)
    answer = await admin.put("/v1/policy", json=sent(NO_PAUSE))
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert "as it were" not in answer.text
    assert await stays(admin)


async def test_a_prover_that_wants_too_much_memory_is_stopped(admin: httpx.AsyncClient, api: ApiServer) -> None:
    api.server.policies._prover = PolicyVerifier((), 60_000, 1)
    answer = await admin.put("/v1/policy", json=sent(NO_PAUSE))
    assert (answer.status_code, await stays(admin)) == (422, True)


async def test_the_gate_goes_on_while_a_policy_is_proved_and_a_second_one_is_turned_away(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    await make(admin, "vm")
    prover = find(api)
    prover.go.clear()
    first = asyncio.create_task(admin.put("/v1/policy", json={"name": "take2"}))
    await prover.asked.wait()
    assert (await ask(admin, "pause", Prefer="wait=20")).status_code == 200
    second = await admin.put("/v1/policy", json=sent(NO_PAUSE))
    assert (second.status_code, second.json()["type"]) == (409, "urn:interlock:problem:in-use")
    prover.go.set()
    assert (await first).json()["name"] == "take2"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "take2", "main": "a.toml", "files": {"a.toml": ""}},
        {"main": "a.toml"},
        {"files": {"a.toml": NO_PAUSE}},
        {"main": "b.toml", "files": {"a.toml": NO_PAUSE}},
        {"name": "/etc/passwd"},
        {"name": "../builtin/standard.toml"},
        {"name": "standrad"},
        {"main": "\n.toml", "files": {"\n.toml": NO_PAUSE}},
        {"main": "a.toml", "files": {"a.toml": '[policy]\nextends = "/etc/passwd.toml"\n'}},
        {"main": "a.toml", "files": {"a.toml": '[policy]\nextends = "./a.toml"\n'}},
        {"name": "take2", "explore_seconds": -1},
        {"name": "take2", "outstanding": "drop"},
        {"name": "take2", "explor_seconds": 1},
    ],
)
async def test_what_makes_no_sense_is_refused(admin: httpx.AsyncClient, body: dict[str, object]) -> None:
    answer = await admin.put("/v1/policy", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert await stays(admin)


async def test_a_text_that_is_too_long_is_refused(admin: httpx.AsyncClient) -> None:
    longest = Config().policy_body_bytes_max
    answer = await admin.put("/v1/policy", json=sent("#" * longest))
    assert (answer.status_code, await stays(admin)) == (413, True)


# ----------------------------------------------------------------------------------------------------------- history


async def test_the_policy_before_is_one_command_away(admin: httpx.AsyncClient) -> None:
    nothing = await admin.post("/v1/policy/rollback", json={})
    assert (nothing.status_code, nothing.json()["type"]) == (404, "urn:interlock:problem:not-found")
    await put(admin, NO_PAUSE)
    back = (await admin.post("/v1/policy/rollback", json={"explore_seconds": 0})).json()
    assert (back["name"], back["previous"]["name"], (await in_force(admin))["source"]) == (
        *("patient", "no-pause"),
        "rolled_back",
    )
    forth = (await admin.post("/v1/policy/rollback", json={"explore_seconds": 0})).json()
    assert forth["name"] == "no-pause"
    first = (await admin.post("/v1/policy/rollback", json={"to": 1, "explore_seconds": 0})).json()
    assert first["name"] == "patient"
    assert (await admin.post("/v1/policy/rollback", json={"to": 99})).status_code == 404


async def test_the_history_tells_every_switch_newest_first(admin: httpx.AsyncClient) -> None:
    await put(admin, NO_PAUSE, outstanding="rejudge")
    await admin.post("/v1/policy/rollback", json={"explore_seconds": 0})
    items = (await admin.get("/v1/policy/history")).json()["items"]
    facts = [(one["number"], one["name"], one["source"], one["by"], one["cancelled"]) for one in items]
    assert facts == [
        (3, "patient", "rolled_back", "admin", None),
        (2, "no-pause", "loaded", "admin", 0),
        (1, "patient", "configured", "server", None),
    ]
    page = (await admin.get("/v1/policy/history", params={"limit": 2})).json()
    rest = (await admin.get("/v1/policy/history", params={"cursor": page["next_cursor"]})).json()
    assert [*page["items"], *rest["items"]] == items
    assert rest["next_cursor"] is None
    for wrong in ("0", "x", "9" * 30):
        assert (await admin.get(f"/v1/policy/history/{wrong}")).status_code == 404


# ------------------------------------------------------------------------------------------------- what is outstanding


async def wait_in_line(api: ApiServer, client: httpx.AsyncClient) -> tuple[str, str]:
    """A pause that hangs and an unpause behind it: the ids of the instance and of the second."""
    await freeze_in_pause(api, client)
    behind = await ask(client, "unpause")
    assert behind.status_code == 202, behind.text
    vm = (await client.get("/v1/instances/vm")).json()["id"]
    return vm, behind.json()["request"]["id"]


async def ended(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    said: dict[str, Any] = (await client.get(f"/v1/requests/{request_id}", params={"wait": "20s"})).json()
    return said


async def test_what_is_admitted_keeps_its_promise(api: ApiServer, admin: httpx.AsyncClient) -> None:
    vm, behind = await wait_in_line(api, admin)
    await put(admin, NO_PAUSE)
    api.host.thaw(vm)
    assert (await ended(admin, behind))["status"] == "succeeded"
    assert (await admin.get("/v1/instances/vm")).json()["vm_state"] == "active"
    assert (await ask(admin, "pause")).json()["reason"] == "no_pause"


async def test_what_is_admitted_is_judged_again_where_that_is_wished(api: ApiServer, admin: httpx.AsyncClient) -> None:
    vm, behind = await wait_in_line(api, admin)
    said = await put(admin, NO_PAUSE, outstanding="rejudge")
    assert said["cancelled"] == 1
    request = await ended(admin, behind)
    assert (request["status"], request["reason"]) == ("cancelled", "no_pause")
    api.host.thaw(vm)
    while (await admin.get("/v1/instances/vm")).json()["vm_state"] != "paused":
        await admin.get("/v1/instances/vm", params={"after_generation": 10**6, "wait": "10ms"})


async def test_a_promise_holds_over_a_restart(api: ApiServer, admin: httpx.AsyncClient) -> None:
    vm, behind = await wait_in_line(api, admin)
    await put(admin, NO_PAUSE)
    await api.server.close()
    again = Server(api.server.config, SimulatedHypervisor(api.host))
    await again.open()
    api.server = again
    assert again.policy.policy.name == "no-pause"
    api.host.thaw(vm)
    client = ApiServer(again, api.host).client((again.folder / "admin.token").read_text().strip())
    assert (await ended(client, behind))["status"] == "succeeded"
    assert again.in_force.earlier != ()
    await put(client, NO_PAUSE + "# again\n")
    assert again.in_force.earlier == ()


async def test_what_was_to_be_judged_again_is_judged_at_the_next_start_if_the_server_ends_before(
    api: ApiServer, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, behind = await wait_in_line(api, admin)

    async def fail(*_: object) -> None:
        raise StoreFull("There is no room.")

    with monkeypatch.context() as broken:
        broken.setattr(Policies, "_judge_one", fail)
        assert (await put(admin, NO_PAUSE, outstanding="rejudge"))["cancelled"] is None
    await api.server.close()
    again = Server(api.server.config, SimulatedHypervisor(api.host))
    await again.open()
    api.server = again
    request = await again.store.request(behind)
    assert request is not None
    assert (request.status.value, request.reason) == ("cancelled", "no_pause")
    assert again.policies.now.cancelled == 1


async def test_what_is_held_is_judged_by_the_new_policy_at_once(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await put(admin, NO_PAUSE)
    await make(admin, "vm")
    held = await admin.post("/v1/instances/vm/requests", json={"operation": "pause", "hold": "10m"})
    assert held.status_code == 202, held.text
    assert held.json()["request"]["status"] == "held"
    await admin.post("/v1/policy/rollback", json={"explore_seconds": 0})
    assert (await ended(admin, held.json()["request"]["id"]))["status"] == "succeeded"
    assert api.server.policy.policy.name == "patient"


# ---------------------------------------------------------------------------------------------------------- starting


class House:
    """One data folder and policy file, and one server after the other on them."""

    def __init__(self, folder: Path, database: Path) -> None:
        folder.mkdir(mode=0o711)
        shutil.copy(database, folder / DATABASE)
        self.file = folder.parent / "site.toml"
        self.file.write_text('[policy]\nname = "first"\nextends = "standard"\n')
        self.config = Config(
            data_dir=str(folder),
            hypervisor="simulated",
            host="here",
            policy=str(self.file),
            policy_explore_ms=0,
            driver=QUICK,
        )
        self.prover: PolicyVerifier | None = None
        self.server: Server

    async def start(self) -> str:
        """Start a server, and the name of the policy that is then in force."""
        self.server = Server(self.config, SimulatedHypervisor(SimulatedHost()), prover=self.prover)
        await self.server.open()
        return self.server.policy.policy.name

    async def load(self, body: dict[str, object]) -> None:
        api = ApiServer(self.server, SimulatedHost())
        client = api.client((self.server.folder / "admin.token").read_text().strip())
        answer = await client.put("/v1/policy", json={"explore_seconds": 0, **body})
        assert answer.status_code == 200, answer.text


@pytest.fixture
def house(tmp_path: Path, empty_database: Path) -> House:
    return House(tmp_path / "data", empty_database)


async def test_a_policy_that_was_loaded_live_outlives_the_server(house: House) -> None:
    assert await house.start() == "first"
    await house.load(sent(NO_PAUSE))
    await house.server.close()
    house.file.write_text("# The same, with a comment.\n" + house.file.read_text())
    assert await house.start() == "no-pause"
    assert house.server.policies.now.source.value == "loaded"
    assert house.server.policies.bundle.files == {"site.toml": NO_PAUSE}
    await house.server.close()


async def test_a_configured_policy_that_has_changed_replaces_the_one_loaded_live(house: House) -> None:
    await house.start()
    await house.load({"name": "propolis"})
    await house.server.close()
    house.file.write_text(NO_PAUSE.replace("no-pause", "second"))
    assert await house.start() == "second"
    await house.server.close()
    assert await house.start() == "second"
    assert [one.name for one in await house.server.policies.history(10)] == ["second", "propolis", "first"]
    await house.server.close()


async def test_a_start_that_changes_nothing_adds_nothing_to_the_history(house: House) -> None:
    for _ in range(3):
        await house.start()
        assert len(await house.server.policies.history(10)) == 1
        await house.server.close()


async def test_a_loaded_policy_that_cannot_be_read_any_more_makes_way_for_the_configured_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.start()
    await house.load(sent(NO_PAUSE))
    await house.server.close()

    def fail(_: PolicyBundle) -> None:
        raise PolicyError("site.toml:1:1: The language has no such word any more.")

    monkeypatch.setattr(bundles, "read", fail)
    assert await house.start() == "first"
    await house.server.close()


async def test_a_text_that_means_something_else_to_a_later_version_is_kept_with_its_new_digest(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.start()
    await house.load(sent(NO_PAUSE))
    await house.server.close()
    read = bundles.read
    monkeypatch.setattr(bundles, "read", lambda bundle: replace(read(bundle), digest="e" * 64))
    assert await house.start() == "no-pause"
    now, loaded, _ = await house.server.policies.history(10)
    assert (now.digest, now.name, now.by, now.source) == ("e" * 64, "no-pause", "server", loaded.source)
    assert await house.server.policies.text(now.number) == await house.server.policies.text(loaded.number)
    await house.server.close()


async def test_the_configured_policy_is_read_again_when_the_server_is_told_to(house: House) -> None:
    await house.start()
    policies = house.server.policies
    await policies.reload()
    assert policies.now.number == 1
    house.file.write_text(NO_PAUSE)
    await policies.reload()
    assert (policies.now.name, policies.now.source.value, house.server.policy.policy.name) == (
        *("no-pause", "reloaded"),
        "no-pause",
    )
    for wrong in (WRONG, CONTRADICTION):
        house.file.write_text(wrong)
        await policies.reload()
        assert policies.now.name == "no-pause"
    house.file.unlink()
    await policies.reload()
    assert policies.now.name == "no-pause"
    await house.server.close()


async def test_a_reload_brings_the_configured_policy_back_after_another_was_loaded(house: House) -> None:
    await house.start()
    await house.load({"name": "propolis"})
    await house.server.policies.reload()
    assert house.server.policy.policy.name == "first"
    await house.server.close()


# --------------------------------------------------------------------------------------- what is configured is broken


async def seen(house: House) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What the server says of its policy: `/v1/policy`, `/readyz`, and the lines about it in `/metrics`."""
    api = ApiServer(house.server, SimulatedHost())
    client = api.client((house.server.folder / "admin.token").read_text().strip())
    policy, ready = (await client.get("/v1/policy")).json(), await client.get("/readyz")
    assert ready.status_code == 200
    figures = (await client.get("/metrics")).text.splitlines()
    return policy, ready.json(), [line for line in figures if line.startswith("interlock_policy_configured")]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (WRONG, ":8:"),
        ("[policy", "TOML"),
        (CONTRADICTION, "site.toml:13"),
        (None, "File not found"),
    ],
)
async def test_a_configured_policy_that_is_broken_at_the_start_leaves_the_last_one_in_force(
    house: House, wrong: str | None, said: str
) -> None:
    await house.start()
    await house.server.close()
    good = house.file.read_text()
    if wrong is None:
        house.file.unlink()
    else:
        house.file.write_text(wrong)
    for _ in range(2):  # it is told at every start
        assert await house.start() == "first"
        policy, ready, figures = await seen(house)
        refused = policy["configured_refused"]
        assert (policy["name"], policy["number"], refused["name"]) == ("first", 1, str(house.file))
        assert said in refused["why"], refused
        assert ready["ready"] is True
        assert refused["why"] in ready["reasons"][0]
        assert ready["reasons"][0].endswith("first is in force.")
        assert figures == ["interlock_policy_configured_refused 1.0"]
        if _ == 0:
            await house.server.close()
    house.file.write_text(good.replace("first", "mended"))
    await house.server.policies.reload()
    policy, ready, figures = await seen(house)
    assert (policy["name"], policy["source"], policy["configured_refused"]) == ("mended", "reloaded", None)
    assert (ready["reasons"], figures) == ([], ["interlock_policy_configured_refused 0.0"])
    await house.server.close()
    assert await house.start() == "mended"
    await house.server.close()


async def test_one_that_is_mended_to_what_it_was_is_taken_as_that(house: House) -> None:
    await house.start()
    await house.server.close()
    good = house.file.read_text()
    house.file.write_text(WRONG)
    await house.start()
    house.file.write_text(good)
    await house.server.policies.reload()
    assert house.server.policies.refused is None
    await house.server.close()
    house.file.write_text(WRONG)
    await house.start()
    await house.server.close()
    house.file.write_text(good)
    assert await house.start() == "first"
    assert house.server.policies.refused is None
    await house.server.close()


async def test_what_was_loaded_live_stays_too_where_the_configured_one_is_broken(house: House) -> None:
    await house.start()
    await house.load(sent(NO_PAUSE))
    await house.server.close()
    house.file.write_text(WRONG)
    assert await house.start() == "no-pause"
    assert house.server.policies.refused is not None
    await house.load({"name": "propolis"})
    assert house.server.policies.refused is not None, "that another was loaded does not mend the configured one"
    await house.server.close()
    assert await house.start() == "propolis"
    await house.server.close()


@pytest.mark.parametrize(("wrong", "said"), [(WRONG, "site.toml:8:"), (CONTRADICTION, "site.toml:13")])
async def test_where_nothing_was_ever_in_force_a_broken_policy_keeps_the_server_from_starting(
    house: House, wrong: str, said: str
) -> None:
    house.file.write_text(wrong)
    for _ in range(2):
        with pytest.raises(PolicyError, match=said):
            await house.start()
    house.file.write_text(NO_PAUSE)
    assert await house.start() == "no-pause"
    await house.server.close()


async def test_where_the_last_one_cannot_be_read_any_more_either_both_are_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.start()
    await house.server.close()
    house.file.write_text(WRONG)

    def fail(_: PolicyBundle) -> None:
        raise PolicyError("site.toml:1:1: The language has no such word any more.")

    monkeypatch.setattr(bundles, "read", fail)
    told = "last active policy first cannot be read either"
    with pytest.raises(PolicyError, match=rf"site\.toml:8.*{told}"):
        await house.start()


async def test_a_hangup_that_finds_the_file_broken_is_told_until_it_is_mended(house: House) -> None:
    await house.start()
    good = house.file.read_text()
    house.file.write_text(CONTRADICTION)
    await house.server.policies.reload()
    policy, _, _ = await seen(house)
    assert "site.toml:13" in policy["configured_refused"]["why"]
    house.file.write_text(good)
    await house.server.policies.reload()
    policy, _, _ = await seen(house)
    assert (policy["configured_refused"], policy["number"]) == (None, 1)
    await house.server.close()


async def test_one_that_cannot_be_checked_is_taken_only_where_there_is_no_other(house: House) -> None:
    house.prover = FixedProver(Proof(wrong="Checking the policy timed out after 30 seconds."))
    assert await house.start() == "first"
    await house.server.close()
    house.file.write_text(NO_PAUSE)
    assert await house.start() == "first"
    assert house.server.policies.refused is not None
    assert "timed out" in house.server.policies.refused.why
    await house.server.close()


# ---------------------------------------------------------------------------------------------------- under many askers


async def test_each_of_many_decisions_is_made_wholly_by_one_policy(admin: httpx.AsyncClient) -> None:
    vm = await make(admin, "vm", start=False)
    switching = True

    async def keep_asking() -> int:
        asked = 0
        while switching:
            assert (await ask(admin, "pause")).status_code == 409
            asked += 1
        return asked

    asking = [asyncio.create_task(keep_asking()) for _ in range(8)]
    for place in range(3):
        await put(admin, NO_PAUSE, outstanding=("keep", "rejudge")[place % 2])
        await admin.post("/v1/policy/rollback", json={"explore_seconds": 0})
    switching = False
    asked = sum(await asyncio.gather(*asking))
    events: list[dict[str, Any]] = []
    while page := (await admin.get(f"/v1/instances/{vm['id']}/events", params=_after(events))).json()["items"]:
        events += page
    denied = [event["data"] for event in events if event["kind"] == "request.denied"]
    assert len(denied) == asked
    assert all((one["policy"]["name"] == "no-pause") == (one["rule"] == "no-pause") for one in denied)
    names = [one["policy"]["name"] for one in denied]
    turns = [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]
    assert set(turns) == {"patient", "no-pause"}
    assert len(turns) <= 7


def _after(events: list[dict[str, Any]]) -> dict[str, int]:
    return {"after": events[-1]["sequence"] if events else 0, "limit": 500}


async def test_a_rollback_needs_no_body(api: ApiServer, admin: httpx.AsyncClient) -> None:
    api.server.policies._explore_ms = 100  # what is walked then is another test's
    await admin.put("/v1/policy", json={"name": "take2", "explore_seconds": 0})
    answer = await admin.post("/v1/policy/rollback")
    assert (answer.status_code, answer.json()["name"]) == (200, "patient")


FREEZE = """
[policy]
name = "freeze"
extends = "standard"
protected_tags = ["freeze"]

[[rule]]
id = "frozen"
operations = ["stop", "reboot"]
roles = ["*", "!admin"]
tags = ["freeze"]
verdict = "deny"
reason = "frozen"
because = "The VM is frozen."
"""


async def test_a_member_does_not_get_around_a_freeze(api: ApiServer, admin: httpx.AsyncClient, tmp_path: Path) -> None:
    """By taking the tag off, or another one on, or the lock off: who is bound by a rule cannot lift it."""
    file = tmp_path / "site.toml"
    file.write_text(FREEZE)
    assert check_file(file) == ()
    await put(admin, FREEZE)
    await make(admin, "vm", tags=["freeze", "web"])
    for role in (Role.MEMBER, Role.PROJECT_ADMIN):
        user = await api.token(f"user-{role}", role)
        refused = (await ask(user, "stop")).json()
        assert (refused["reason"], refused["detail"].endswith("The VM is frozen.")) == ("frozen", True)
        for tags in ([], ["web"], ["thaw"]):
            assert (await user.patch("/v1/instances/vm", json={"tags": tags})).status_code == 403
        assert (await user.patch("/v1/instances/vm", json={"tags": ["freeze"]})).status_code == 200
        assert (await ask(admin, "lock")).status_code == 200
        assert (await ask(user, "unlock")).json()["reason"] == "locked"
        assert (await user.patch("/v1/instances/vm", json={"tags": ["freeze", "web"]})).status_code == 403
        assert (await ask(admin, "unlock")).status_code == 200
        assert (await ask(user, "stop")).json()["reason"] == "frozen"
    assert (await admin.patch("/v1/instances/vm", json={"tags": []})).status_code == 200
    assert (await ask(user, "stop")).status_code == 202
