"""`interlock vm clone`: a snapshot and a create, and nothing left where the create is refused."""

from __future__ import annotations

import msgspec
import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import admitted, instance, problem, request
from interlock.api.schemas import responses
from interlock.core.operations import Operation
from interlock.core.records import Status

SNAPSHOT = request(id="r-1", operation=Operation.SNAPSHOT)
DONE = msgspec.structs.replace(SNAPSHOT, status=Status.SUCCEEDED)


@pytest.fixture
def script(server: ScriptedServer) -> ScriptedServer:
    server.on("GET", "/v1/instances/web", Given(200, instance(name="web", vcpus=2, memory_mib=512, root_gib=3)))
    server.on("POST", "/v1/instances/web/requests", Given(202, admitted(SNAPSHOT)))
    server.on("GET", "/v1/requests/r-1", Given(200, DONE))
    made = responses.Created(instance=instance(name="web2"), request=request(id="r-2"), rule="r", because=None)
    server.on("POST", "/v1/instances", Given(202, made))
    return server


def test_it_is_a_snapshot_and_a_create_of_the_same_size(interlock: Interlock, script: ScriptedServer) -> None:
    ran = interlock("vm", "clone", "web", "web_2", "--memory", "1024")
    assert ran.code == 0, ran.err
    snapshot, create = (asked.json for asked in script.asked if asked.method == "POST")
    assert snapshot["operation"] == "snapshot"
    assert create["image"] == snapshot["parameters"]["name"]
    assert (create["name"], create["hostname"]) == ("web_2", "web-2")
    assert (create["vcpus"], create["memory_mib"], create["root_gib"]) == (2, 1024, 3)
    assert f"interlock image delete {create['image']}" in ran.out


def test_protected_tags_are_not_copied(interlock: Interlock, script: ScriptedServer) -> None:
    script.on("GET", "/v1/instances/web", Given(200, instance(name="web", tags=("freeze", "web"))))
    script.on("GET", "/v1/policy", Given(200, {"name": "site", "protected_tags": ["freeze"]}))
    ran = interlock("vm", "clone", "web", "web2")
    assert "Not copied: the protected tags freeze." in ran.out
    (create,) = (asked.json for asked in script.asked if (asked.method, asked.path) == ("POST", "/v1/instances"))
    assert create["tags"] == ["web"]


def test_with_json_one_document_is_printed(interlock: Interlock, script: ScriptedServer) -> None:
    ran = interlock("vm", "clone", "web", "web2", "--json")
    assert msgspec.json.decode(ran.out)["instance"]["name"] == "web2"


def test_a_create_that_is_refused_leaves_no_image(interlock: Interlock, script: ScriptedServer) -> None:
    script.on("POST", "/v1/instances", Given(409, problem(409, "There is one."), "application/problem+json"))
    script.on("DELETE", "/v1/images/copy", Given(204))
    ran = interlock("vm", "clone", "web", "web2", "--image-name", "copy")
    assert ran.code == 3
    assert "Deleted: snapshot image copy" in ran.err
    assert script.asked[-1].method == "DELETE"


def test_a_snapshot_that_fails_makes_no_vm(interlock: Interlock, script: ScriptedServer) -> None:
    script.on("GET", "/v1/requests/r-1", Given(200, msgspec.structs.replace(DONE, status=Status.FAILED)))
    for more in ((), ("--json",)):
        assert interlock("vm", "clone", "web", "web2", *more).code == 1
    assert all(asked.path != "/v1/instances" for asked in script.asked if asked.method == "POST")
