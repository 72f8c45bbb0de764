"""`/v1/projects`: create, list, read, limit and delete."""

from __future__ import annotations

import msgspec
from msgspec import UnsetType
from starlette.requests import Request
from starlette.responses import Response

from interlock.api.http import audit_entries, request_parsing
from interlock.api.http.route import ApiParts, Routes, json_response
from interlock.api.schemas import projects as schemas
from interlock.api.schemas.serializers import wire
from interlock.core.quotas import Quota
from interlock.ports import Project
from interlock.service.auth import Caller

routes = Routes("projects")


@routes.add("GET /v1/projects", "List the projects; those who are not admins see their own", {200: schemas.ProjectList})
async def projects(parts: ApiParts, caller: Caller, request: Request) -> schemas.ProjectList:
    return schemas.ProjectList(items=tuple(_view(parts, one) for one in parts.projects.list(caller)))


@routes.add(
    "POST /v1/projects",
    "Create a project",
    {201: schemas.Project},
    problems=(409,),
    body=schemas.NewProject,
    audited="project.create",
)
async def create_project(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, schemas.NewProject, parts.config.request_body_bytes_max)
    audit_entries.note(request, target=body.name, details=_named(body.quota))
    quota = Quota(**_named(body.quota))
    made = await parts.projects.create(caller, body.name, quota, with_history=body.with_history)
    return json_response(_view(parts, made), 201, {"Location": f"/v1/projects/{made.name}"})


@routes.add("GET /v1/projects/{name}", "Read a project, its quota and what it uses", {200: schemas.Project})
async def project(parts: ApiParts, caller: Caller, request: Request) -> schemas.Project:
    return _view(parts, parts.projects.find(caller, request.path_params["name"]))


@routes.add(
    "PATCH /v1/projects/{name}/quota",
    "Change limits of a project; what it uses already stays",
    {200: schemas.Project},
    body=schemas.QuotaChange,
    audited="quota.change",
)
async def change_quota(parts: ApiParts, caller: Caller, request: Request) -> schemas.Project:
    body = await request_parsing.body(request, schemas.QuotaChange, parts.config.request_body_bytes_max)
    audit_entries.note(request, details=_named(body))
    return _view(parts, await parts.projects.limit(caller, request.path_params["name"], _named(body)))


@routes.add(
    "DELETE /v1/projects/{name}", "Delete an empty project", {204: None}, problems=(409,), audited="project.delete"
)
async def delete_project(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.projects.delete(caller, request.path_params["name"])


def _named(change: schemas.QuotaChange) -> dict[str, int | None]:
    """Return the limits that a body names."""
    return {name: limit for name, limit in msgspec.structs.asdict(change).items() if not isinstance(limit, UnsetType)}


def _view(parts: ApiParts, project: Project) -> schemas.Project:
    used = schemas.Use(**parts.projects.used(project))
    return wire(schemas.Project, project, quota=wire(schemas.Quota, project.quota), used=used)
