"""`/v1/networks` and `/v1/security-groups`: create, list, read, change and delete."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from interlock.api.http import audit_entries, request_parsing
from interlock.api.http.route import ApiParts, Routes, json_response
from interlock.api.schemas import networks as schemas
from interlock.api.schemas.serializers import wire
from interlock.core.networks import Network, SecurityGroup, rule_text
from interlock.core.roles import Role
from interlock.service.auth import Caller
from interlock.service.request_models import NewNetwork, NewSecurityGroup, SecurityGroupChange

routes = Routes("networks")


@routes.add("GET /v1/networks", "List the project's networks and the shared ones", {200: schemas.NetworkList})
async def networks(parts: ApiParts, caller: Caller, request: Request) -> schemas.NetworkList:
    return schemas.NetworkList(items=tuple(_view(parts, caller, one) for one in parts.networks.list(caller)))


@routes.add(
    "POST /v1/networks",
    "Create a network",
    {201: schemas.Network},
    problems=(409, 507),
    body=NewNetwork,
    audited="network.create",
)
async def create_network(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, NewNetwork, parts.config.request_body_bytes_max)
    audit_entries.note(request, target=body.name, details={"kind": body.kind.value, "shared": body.shared})
    made = await parts.networks.create(caller, body)
    return json_response(_view(parts, caller, made), 201, {"Location": f"/v1/networks/{made.id}"})


@routes.add("GET /v1/networks/{reference}", "Read a network", {200: schemas.Network})
async def network(parts: ApiParts, caller: Caller, request: Request) -> schemas.Network:
    return _view(parts, caller, parts.networks.find(caller, request.path_params["reference"]))


@routes.add(
    "DELETE /v1/networks/{reference}",
    "Delete a network that no instance uses",
    {204: None},
    problems=(409,),
    audited="network.delete",
)
async def delete_network(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.networks.delete(caller, request.path_params["reference"])


def _view(parts: ApiParts, caller: Caller, network: Network) -> schemas.Network:
    counted = network.project is not None or caller.role is Role.ADMIN
    return wire(
        schemas.Network,
        network,
        subnets=tuple(wire(schemas.Subnet, one) for one in network.subnets),
        instances=parts.networks.users(network) if counted else None,
    )


@routes.add("GET /v1/security-groups", "List the project's security groups", {200: schemas.SecurityGroupList})
async def security_groups(parts: ApiParts, caller: Caller, request: Request) -> schemas.SecurityGroupList:
    found = parts.networks.security_groups.list(caller)
    return schemas.SecurityGroupList(items=tuple(_group_view(parts, one) for one in found))


@routes.add(
    "POST /v1/security-groups",
    "Create a security group",
    {201: schemas.SecurityGroup},
    problems=(409, 507),
    body=NewSecurityGroup,
    audited="security_group.create",
)
async def create_security_group(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, NewSecurityGroup, parts.config.request_body_bytes_max)
    audit_entries.note(request, target=body.name, details={"allow": body.allow})
    made = await parts.networks.security_groups.create(caller, body.name, body.allow)
    return json_response(_group_view(parts, made), 201, {"Location": f"/v1/security-groups/{made.id}"})


@routes.add("GET /v1/security-groups/{reference}", "Read a security group", {200: schemas.SecurityGroup})
async def security_group(parts: ApiParts, caller: Caller, request: Request) -> schemas.SecurityGroup:
    return _group_view(parts, parts.networks.security_groups.find(caller, request.path_params["reference"]))


@routes.add(
    "PATCH /v1/security-groups/{reference}",
    "Replace the rules of a security group; the instances that have it follow",
    {200: schemas.SecurityGroup},
    problems=(507,),
    body=SecurityGroupChange,
    audited="security_group.change",
)
async def change_security_group(parts: ApiParts, caller: Caller, request: Request) -> schemas.SecurityGroup:
    body = await request_parsing.body(request, SecurityGroupChange, parts.config.request_body_bytes_max)
    audit_entries.note(request, details={"allow": body.allow})
    reference = request.path_params["reference"]
    return _group_view(parts, await parts.networks.security_groups.set(caller, reference, body.allow))


@routes.add(
    "DELETE /v1/security-groups/{reference}",
    "Delete a security group that no instance has",
    {204: None},
    problems=(409,),
    audited="security_group.delete",
)
async def delete_security_group(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.networks.security_groups.delete(caller, request.path_params["reference"])


def _group_view(parts: ApiParts, group: SecurityGroup) -> schemas.SecurityGroup:
    return wire(
        schemas.SecurityGroup,
        group,
        allow=tuple(map(rule_text, group.ingress)),
        instances=parts.networks.security_groups.users(group),
    )
