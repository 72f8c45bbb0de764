"""The OpenAPI document says what the server does, and a machine that believes it finds nothing to complain of."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import SkipTest

import apsw
import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as fixed_seed
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Err
from starlette.routing import Route

from api.conftest import ApiServer, make
from interlock import server as wiring
from interlock.api.app import ROUTES, _document
from interlock.api.http import problems
from interlock.api.schemas import responses
from interlock.config import HttpConfig
from interlock.core import errors
from interlock.core.operations import CATALOGUE, FIELDS
from interlock.service import readiness
from tiers import tier

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "http.md"
EXAMPLES = tier(4, 50)
"""How many requests are tried per method and path."""


async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get("/openapi.json")
    described: dict[str, Any] = answer.json()
    return described


async def test_every_route_is_described_and_every_field_has_its_sentence(api: ApiServer) -> None:
    described = await document(api.client(None))
    assert described["openapi"].startswith("3.1")
    routes = {route.path for route in api.app.routes if isinstance(route, Route) and route.path.startswith("/v1")}
    for_agents = {"/v1/hosts/{name}/files/{transfer}"}
    assert set(described["paths"]) == routes - for_agents
    generation = described["components"]["schemas"]["Instance"]["properties"]["generation"]
    assert generation["description"] == "Incremented by every change; the first part of the ETag."
    fenced_by = described["components"]["schemas"]["Host"]["properties"]["fenced_by"]
    assert fenced_by["description"] == "`lease`, or the admin who confirmed that its guests have ended."


async def test_every_operation_is_described_with_its_parameters(api: ApiServer) -> None:
    """They are those of the catalogue: a new one is described without a word here."""
    schemas = (await document(api.client(None)))["components"]["schemas"]
    for entry in CATALOGUE.values():
        assert f"* `{entry.operation.value}`: {entry.summary}" in schemas["Operation"]["description"]
        shape = schemas[entry.parameters.__name__]
        assert f"`{entry.operation.value}`" in shape["description"]
        assert set(shape["properties"]) == {field.name for field in FIELDS[entry.operation]}
        assert all(one["description"] for one in shape["properties"].values())
        assert {"$ref": f"#/components/schemas/{entry.parameters.__name__}"} in schemas["NewRequest"]["properties"][
            "parameters"
        ]["anyOf"]


async def test_the_documentation_needs_no_network(api: ApiServer) -> None:
    client = api.client(None)
    page = await client.get("/docs")
    assert page.status_code == 200
    addresses = re.findall(r'(?:src|href|url:)\s*[=:]?\s*"([^"]+)"', page.text)
    assert len(addresses) >= 3
    for address in addresses:
        assert address.startswith("/")
        assert (await client.get(address)).status_code == 200


async def test_metrics_are_for_an_admin_or_the_configured_secret(api: ApiServer, admin: httpx.AsyncClient) -> None:
    member = await api.token("member")
    secret = "s" * 16
    statuses = [
        (await one.get("/metrics")).status_code for one in (api.client(None), api.client(secret), member, admin)
    ]
    assert statuses == [401, 401, 403, 200]
    msgspec.structs.force_setattr(api.server.config, "http", HttpConfig(metrics_token=secret))
    statuses = [
        (await one.get("/metrics")).status_code for one in (api.client(None), api.client(secret), member, admin)
    ]
    assert statuses == [401, 200, 403, 200]
    assert (await api.client(secret).get("/v1/instances")).status_code == 401, "it reads nothing else"


async def test_health_and_readiness_need_no_token_and_figures_follow_events(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    client = api.client(None)
    await make(admin, "vm")
    await admin.post("/v1/instances/vm/requests", json={"operation": "start"})
    assert (await client.get("/healthz")).json()["status"] == "alive"
    assert (await client.get("/readyz")).json()["ready"] is True
    figures = (await admin.get("/metrics")).text
    for line in (
        'interlock_submissions_total{disposition="admitted",operation="create"} 1.0',
        'interlock_submissions_total{disposition="redundant",operation="start"} 1.0',
        'interlock_requests_ended_total{operation="create",status="succeeded"} 1.0',
        'interlock_request_service_seconds_count{operation="create"} 1.0',
        'interlock_instances{vm_state="active"} 1.0',
        "interlock_requests_outstanding 0.0",
        "interlock_instances_stuck 0.0",
    ):
        assert line in figures.splitlines()
    api.server.accepting = False
    assert (await client.get("/readyz")).status_code == 503


def test_every_error_has_its_kind_and_the_reference_names_it() -> None:
    text = REFERENCE.read_text()
    kinds = [*problems.PROBLEM_TYPES.values(), *problems.HTTP_PROBLEM_TYPES.values()]
    assert [kind.name for kind in kinds if f"`{kind.name}` | {kind.status}" not in text] == []
    raised = {errors.NotFound, errors.NameTaken, errors.KeyReused, errors.GenerationMismatch, errors.Invalid}
    raised |= {errors.Forbidden, errors.InUse, errors.StoreError, errors.StoreFull, errors.Unavailable}
    for error in raised:
        assert problems.problem_type_of(error("x")).status != 500
    assert problems.problem_type_of(errors.BrokenInvariant("x")).status == 500


def test_every_route_is_in_the_reference() -> None:
    text = REFERENCE.read_text()
    assert [route.path for route in ROUTES if f"`{route.method} {route.path}`" not in text] == []


async def test_a_machine_that_believes_the_description_meets_no_surprise(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    """Every answer to made-up requests is one that is described, in the shape described, and none is a 5xx."""
    await make(admin, "vm")
    described = await document(admin)
    schema = schemathesis.openapi.from_dict(described)
    statuses = Counter[int]()
    for result in schema.get_all_operations():
        if isinstance(result, Err):
            raise result.err()
        operation = result.ok()
        if operation.path in {"/v1/events", "/v1/images/small"}:
            # A stream does not end; and the small image is built from packages.
            continue
        # A wrong form cannot be written by this client; those are in test_bad_input.
        form = "multipart/form-data" in operation.definition.raw.get("requestBody", {}).get("content", {})
        for mode in (GenerationMode.POSITIVE,) if form else tuple(GenerationMode):
            for case in await asyncio.to_thread(_cases, operation, mode):
                statuses[await _send(admin, case, operation)] += 1
    assert {200, 202, 204, 404, 422} <= set(statuses)


def _cases(operation: Any, mode: GenerationMode) -> list[Any]:
    """Some requests that the description allows, or some that it does not."""
    found: list[Any] = []

    @fixed_seed(880)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), own=st.booleans())
    def collect(case: Any, own: bool) -> None:
        if own and "reference" in (case.path_parameters or {}):
            case.path_parameters["reference"] = "vm"
        if "wait" in (case.query or {}):
            case.query["wait"] = "1ms"
        found.append(case)

    # Where everything is allowed there is nothing wrong to send.
    with contextlib.suppress(SkipTest, Unsatisfiable):
        collect()
    return found


def _part(content: Any) -> Any:
    if isinstance(content, tuple):
        return (content[0], _part(content[1]), *content[2:])
    return content if isinstance(content, str | bytes) or content is None else str(content)


async def _send(client: httpx.AsyncClient, case: Any, operation: Any) -> int:
    arguments = case.as_transport_kwargs(base_url="http://interlock.test")
    names = ("method", "url", "params", "json", "data", "files")
    headers = {
        name: value
        for name, value in dict(arguments.get("headers") or {}).items()
        if name.lower() not in {"authorization", "prefer"} and value.isascii()
    }
    given_arguments = {name: arguments[name] for name in names if arguments.get(name) is not None}
    # What stands in a form for nobody to read may be a number; a client sends it as text.
    if files := given_arguments.get("files"):
        given_arguments["files"] = [(name, _part(content)) for name, content in files]
    body = given_arguments.pop("data", None)
    if isinstance(body, str | bytes):
        given_arguments["content"] = body
    elif body is not None:
        given_arguments["data"] = body
    answer = await client.request(headers=headers, **given_arguments)
    assert answer.status_code < 500, (answer.request, answer.text)
    described = operation.definition.raw["responses"]
    assert str(answer.status_code) in described, (answer.request, answer.text)
    if answer.status_code != 204:
        content = described[str(answer.status_code)]["content"]
        assert answer.headers["content-type"].partition(";")[0] in content
    if "json" in answer.headers.get("content-type", ""):
        await answer.request.aread()
        operation.validate_response(answer)
    return answer.status_code


def test_a_refusal_is_a_problem_with_more_to_say() -> None:
    assert issubclass(responses.Refusal, responses.Problem)
    assert {"reason", "rule", "blocked_by", "allowed_at", "allowed_instead"} <= set(responses.Refusal.__struct_fields__)


@pytest.mark.parametrize("policy", ["standard", "propolis", "take2"])
async def test_the_policy_can_be_read(api: ApiServer, admin: httpx.AsyncClient, policy: str) -> None:
    from interlock.api.routes.policy import policy_view
    from interlock.core.policy import CompiledPolicy
    from interlock.policies.language.loader import load

    shown = policy_view(CompiledPolicy(load(policy)))
    assert shown.name == policy
    assert len(shown.rules) == len(load(policy).rules)
    assert (await admin.get("/v1/policy")).json()["name"] == "patient"


async def test_a_server_whose_database_is_locked_is_not_ready(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_WRITABLE_S", 0.1)
    client = api.client(None)
    other = apsw.Connection(str(api.server.folder / wiring.DATABASE))
    other.execute("BEGIN IMMEDIATE")
    refused = await client.get("/readyz")
    assert refused.status_code == 503
    assert "another program has it open" in refused.json()["reasons"][0]
    other.execute("ROLLBACK")
    other.close()
    monkeypatch.setattr(readiness, "_WRITABLE_S", 20)
    assert (await client.get("/readyz")).status_code == 200


async def test_it_is_made_when_it_is_first_asked_for(api: ApiServer) -> None:
    """It takes as long as the rest of a start."""
    _document.cache_clear()
    api.server.app()
    assert _document.cache_info().currsize == 0
    await document(api.client(None))
    assert _document.cache_info().currsize == 1
