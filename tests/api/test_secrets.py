"""Secrets are shown to nobody: not in answers, events or logs, and not where a record is printed."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import structlog

from api.conftest import ApiServer, make
from interlock.agent import Contact
from interlock.api.app import ROUTES
from interlock.api.schemas.inventory import MadeToken, Token
from interlock.core.operations import Operation
from interlock.core.records import Seed
from interlock.core.roles import Role
from interlock.ports.migration import MigrationEndpoint
from interlock.service.request_models import NewInstance, NewRequest

USER_DATA = "#cloud-config\npassword: hunter2-in-user-data\n"
NETWORK = "version: 2  # hunter2-in-network\n"
PASSWORD = "hunter2-as-password"


async def readable(client: httpx.AsyncClient, instance: str, request: str) -> list[str]:
    """The bodies of every GET route that is about one of these, or about nothing in particular."""
    found = []
    for route in ROUTES:
        if route.method == "GET" and "image" not in route.path and route.path != "/v1/events":
            path = route.path.replace("{reference}", instance).replace("{id}", request).replace("{name}", "here")
            got = await client.get(path.replace("{number}", "1"))
            found.append(got.text)
    return found


async def test_user_data_and_passwords_are_in_no_answer_event_or_log(api: ApiServer, admin: httpx.AsyncClient) -> None:
    with structlog.testing.capture_logs() as logs:
        vm = await make(admin, "vm", user_data=USER_DATA, network_config=NETWORK)
        wish = {"operation": "set_password", "parameters": {"user": "root", "password": PASSWORD}}
        asked = await admin.post("/v1/instances/vm/requests", json=wish, headers={"Idempotency-Key": "once"})
        repeated = await admin.post("/v1/instances/vm/requests", json=wish, headers={"Idempotency-Key": "once"})
        assert asked.status_code == 202, asked.text
        stop = (await admin.post("/v1/instances/vm/requests", json={"operation": "stop"})).json()["request"]["id"]
        bodies = [asked.text, repeated.text, str(vm)]
        for client in (admin, await api.token("reader", Role.READER)):
            bodies += await readable(client, vm["id"], stop)
        events = await api.server.store.events(0, 1_000)
    said = "\n".join([*bodies, *map(repr, events), *map(repr, logs)])
    assert "instance.created" in said
    assert "hunter2" not in said
    instance = await api.server.store.instance(vm["id"])
    assert instance is not None
    assert instance.spec is not None
    assert instance.spec.seed is not None
    assert "hunter2" in str(instance.spec.seed.user_data), "the guest gets it"
    assert "hunter2" not in repr(instance)


def test_what_has_a_secret_does_not_print_it() -> None:
    token = Token(id="t", name="ci", role=Role.MEMBER, project="p", host=None, created_at="2026-01-01T00:00:00Z")
    holders: tuple[Any, ...] = (
        Seed(hostname="vm", user_data="hunter2", user_data_bytes=b"hunter2", network_config="hunter2"),
        NewInstance(name="vm", image="i", user_data="hunter2", user_data_base64="hunter2", network_config="hunter2"),
        NewRequest(operation=Operation.SET_PASSWORD, parameters={"password": "hunter2"}),
        MadeToken(token=token, secret="hunter2"),
        Contact(server="http://s", token="hunter2", name="north"),
        MigrationEndpoint(host="h", port=1, secret="hunter2"),
    )
    for holder in holders:
        assert "hunter2" in str(msgspec.structs.asdict(holder)), "it is there"
        assert "hunter2" not in repr(holder)
        assert type(holder).__name__ in repr(holder)
        assert "..." in repr(holder)
    assert "user_data=None" in repr(Seed(hostname="vm"))
