from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from in_process.embedded import IMAGE, QUICK
from in_process.trusting_verifier import TrustingProver
from interlock.config import Config
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.policy_switches import PolicyBundle
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.verification import Proof
from interlock.server import DATABASE, Server
from interlock.service.auth import Caller
from interlock.service.configured_policy import ConfiguredPolicy
from interlock.service.policies import Policies
from interlock.service.policy_verifier import PolicyVerifier
from interlock.stores.schema import upgrade
from interlock.stores.sqlite import SqliteStore

BODY_BYTES_MAX = 4096
UPLOAD_BYTES_MAX = 3 * 1024 * 1024

POLICY = """
[policy]
name = "patient"
extends = "standard"
protected_tags = ["freeze"]
description = "standard, except that a pause is given up only after minutes and a reboot after seconds."

[[rule]]
id = "reboot-during-pause"
operations = ["reboot"]
task_state = ["@pause"]
verdict = "after"
threshold = "3m"
reason = "in_progress"
because = "The pause may still come to an end."
"""

OPERATOR = Caller(token_id="operator", name="operator", role=Role.ADMIN, project="default")


class ApiServer:
    """A whole server behind its HTTP api, in this process, and clients of several tokens."""

    def __init__(self, server: Server, host: SimulatedHost) -> None:
        self.server = server
        self.host = host
        self.app = server.app()
        self.clients: list[httpx.AsyncClient] = []

    def client(self, secret: str | None) -> httpx.AsyncClient:
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        made = httpx.AsyncClient(transport=transport, base_url="http://interlock.test", headers=headers)
        self.clients.append(made)
        return made

    async def token(
        self, name: str, role: Role = Role.MEMBER, project: str = "default", **more: Any
    ) -> httpx.AsyncClient:
        """A client with a new token."""
        _, secret = await self.server.tokens.make(OPERATOR, name, role, project, **more)
        return self.client(secret)

    async def close(self) -> None:
        for client in self.clients:
            await client.aclose()
        await self.server.close()


_PROVED: dict[tuple[bytes, int, int, int], Proof] = {}


@pytest.fixture(autouse=True)
def _each_policy_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the same prover found of the same policy in an earlier test is not found out again."""
    prove = PolicyVerifier.prove

    async def remembered(prover: PolicyVerifier, bundle: PolicyBundle, explore_ms: int) -> Proof:
        key = (msgspec.json.encode(bundle), explore_ms, prover._check_timeout_ms, prover._memory_mib_max)
        proof = _PROVED.get(key) or await prove(prover, bundle, explore_ms)
        if proof.policy is not None:  # the prover came to an end
            _PROVED[key] = proof
        return proof

    monkeypatch.setattr(PolicyVerifier, "prove", remembered)


@pytest.fixture
def host() -> SimulatedHost:
    return SimulatedHost()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that is up to date, to copy: bringing one up to date takes longer than most tests here."""
    path = tmp_path_factory.mktemp("empty") / DATABASE
    upgrade(path)
    return path


@pytest.fixture(scope="session")
def settled_database(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A database in which the policy of these tests is in force already, so that no start has it proved."""
    folder = tmp_path_factory.mktemp("settled")
    shutil.copy(empty_database, folder / DATABASE)
    (folder / "patient.toml").write_text(POLICY)

    async def settle() -> None:
        store = SqliteStore(folder / DATABASE)
        await store.open()
        policies = Policies(
            store,
            PolicyInForce(CompiledPolicy(Policy(name="none", rules=()))),
            ConfiguredPolicy(str(folder / "patient.toml")),
            TrustingProver(),
            performs=(),
            explore_ms=0,
            explore_ms_max=0,
            wake=lambda _: None,
            reachable=lambda _: True,
        )
        await policies.open()
        await store.close()

    asyncio.run(settle())
    return folder / DATABASE


@pytest.fixture
async def api(tmp_path: Path, host: SimulatedHost, settled_database: Path) -> AsyncIterator[ApiServer]:
    (tmp_path / "data").mkdir(mode=0o711)
    shutil.copy(settled_database, tmp_path / "data" / DATABASE)
    policy = tmp_path / "patient.toml"
    policy.write_text(POLICY)
    config = Config(
        data_dir=str(tmp_path / "data"),
        hypervisor="simulated",
        host="here",
        policy=str(policy),
        driver=QUICK,
        request_body_bytes_max=BODY_BYTES_MAX,
        upload_bytes_max=UPLOAD_BYTES_MAX,
    )
    server = Server(config, SimulatedHypervisor(host))
    await server.open()
    await server.store.images.put(IMAGE)
    api = ApiServer(server, host)
    yield api
    await api.close()


@pytest.fixture
async def admin(api: ApiServer) -> httpx.AsyncClient:
    return api.client((api.server.folder / "admin.token").read_text().strip())


async def make(client: httpx.AsyncClient, name: str, **fields: object) -> dict[str, Any]:
    """Create an instance, wait until it is up (unless it is not to be started), and give it as the wire has it."""
    wish = {"name": name, "image": IMAGE.name, **fields}
    answer = await client.post("/v1/instances", json=wish, headers={"Prefer": "wait=20"})
    assert answer.status_code == 201, answer.text
    instance: dict[str, Any] = answer.json()["instance"]
    assert instance["vm_state"] == (VmState.ACTIVE if fields.get("start", True) else VmState.STOPPED)
    return instance
