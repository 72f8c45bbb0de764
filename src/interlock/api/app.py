"""The ASGI application: every door with its caller, every error as a problem, and the pages about the server itself."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import structlog
import swagger_ui
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from interlock.api import (
    console,
    dumps,
    events,
    host,
    hosts,
    instances,
    inventory,
    openapi,
    policy,
    problems,
    requests,
    schemas,
    uploading,
)
from interlock.api.doors import ApiParts, Door, answer
from interlock.api.metrics import CONTENT_TYPE
from interlock.api.problems import HTTP_KINDS, Bad
from interlock.core.errors import Forbidden, InterlockError
from interlock.ports import Role
from interlock.service.callers import Caller

__all__ = ["DOORS", "ApiParts", "create_app"]

DOORS: Final[tuple[Door, ...]] = (
    *instances.DOORS,
    *console.DOORS,
    *dumps.DOORS,
    *requests.DOORS,
    *events.DOORS,
    *inventory.DOORS,
    *policy.DOORS,
    *host.DOORS,
    *hosts.DOORS,
)

_LOG = structlog.get_logger(__name__)
_Handler = Callable[[Request], Awaitable[Response]]

_DOCS = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><title>Interlock: the HTTP interface</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/docs/static/swagger-ui.css">
</head>
<body>
<div id="ui"></div>
<script src="/docs/static/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "/openapi.json", dom_id: "#ui", deepLinking: true, persistAuthorization: false});</script>
</body>
</html>
"""


def create_app(parts: ApiParts) -> Starlette:
    """The application that serves these parts, on a data folder that nobody else serves."""
    uploading.sweep(parts.config.folder)
    document = msgspec.json.encode(openapi.document(DOORS, parts.version, console.IN_WORDS))
    by_path: dict[str, dict[str, Door]] = {}
    for door in DOORS:
        by_path.setdefault(door.path, {})[door.method] = door
    # A fixed path before one with a parameter in the same place.
    paths = sorted(by_path, key=lambda path: [part.startswith("{") for part in path.split("/")])
    hottest = "/v1/instances/{reference}/requests"
    paths.sort(key=lambda path: path != hottest)
    routes = [Route(path, _Path(parts, by_path[path]), methods=list(by_path[path])) for path in paths]
    app = Starlette(
        routes=[*routes, hosts.link_route(parts), *console.routes(parts), *_about(parts, document)],
        exception_handlers={HTTPException: _http_exception, Exception: _bug},
    )
    # A path is known or it is not: a redirect would lose the body of what was asked for.
    app.router.redirect_slashes = False
    return app


class _Path:
    """One path, as an ASGI application: finds the door for the method, and turns errors into problems."""

    def __init__(self, parts: ApiParts, doors: dict[str, Door]) -> None:
        self._parts = parts
        self._endpoints = {method: door.endpoint for method, door in doors.items()}

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        request = Request(scope, receive)  # type: ignore[arg-type]
        response = await self._answer(request)
        await response(scope, receive, send)  # type: ignore[arg-type]

    async def _answer(self, request: Request) -> Response:
        try:
            caller = _authenticate(self._parts, request)
            return await self._serve(caller, request)
        except InterlockError as error:
            if problems.kind_of(error) is HTTP_KINDS["internal"]:
                return await _bug(request, error)
            return problems.of_error(error, request.url.path)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a request
            return await _bug(request, error)

    async def _serve(self, caller: Caller, request: Request) -> Response:
        if request.method != "HEAD":
            return await self._endpoints[request.method](self._parts, caller, request)
        response = await self._endpoints["GET"](self._parts, caller, request)
        # What streams has no end to wait for.
        return Response(headers=response.headers) if isinstance(response, StreamingResponse) else response


def _authenticate(parts: ApiParts, request: Request) -> Caller:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    caller = parts.callers.authenticate(secret.strip()) if scheme.lower() == "bearer" else None
    if caller is None:
        raise Bad(
            "unauthorized",
            "There is no valid bearer token in the Authorization header.",
            remedy="Send `Authorization: Bearer <secret>`; the first start wrote one into the file admin.token.",
            WWW_Authenticate='Bearer realm="interlock"',
        )
    if caller.role is Role.AGENT:
        raise Forbidden("A token with the role agent may only speak for a host.")
    return caller


def _not_as_configured(parts: ApiParts) -> tuple[str, ...]:
    """What people should look into although the server does its work."""
    refused = parts.policies.refused
    if refused is None:
        return ()
    return (f"The configured policy {refused.name} is refused: {refused.why} {parts.policies.now.name} is in force.",)


def _about(parts: ApiParts, document: bytes) -> list[Route | Mount]:
    async def health(_: Request) -> Response:
        return answer(schemas.Health(status="alive", version=parts.version))

    async def readiness(_: Request) -> Response:
        ready = parts.ready()
        reasons = _not_as_configured(parts) if ready else ("The server is starting or stopping.",)
        return answer(schemas.Readiness(ready=ready, reasons=reasons), 200 if ready else 503)

    async def metrics(_: Request) -> Response:
        parts.metrics.note_refused_policy(refused=parts.policies.refused is not None)
        parts.metrics.note_stuck(len(await parts.instances.stuck(None)))
        stands = await parts.capacity.occupancy()
        parts.metrics.note_host({"total": stands.total, "promised": stands.promised, "free": stands.free})
        return Response(parts.metrics.exposition(), media_type=CONTENT_TYPE)

    async def described(_: Request) -> Response:
        return Response(document, media_type="application/json")

    async def docs(_: Request) -> Response:
        return HTMLResponse(_DOCS)

    pages: dict[str, _Handler] = {
        "/healthz": health,
        "/readyz": readiness,
        "/metrics": metrics,
        "/openapi.json": described,
        "/docs": docs,
    }
    static = StaticFiles(directory=Path(swagger_ui.__file__).parent / "static")
    return [*(Route(path, handler) for path, handler in pages.items()), Mount("/docs/static", static)]


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses, as a problem."""
    assert isinstance(error, HTTPException)
    kind = HTTP_KINDS["method-not-allowed" if error.status_code == 405 else "no-such-path"]  # noqa: PLR2004
    what = f"{request.method} {request.url.path[:200]}"
    headers = dict(error.headers or {})
    return problems.response(kind, f"{what} is not known here.", request.url.path, remedy="See /docs.", headers=headers)


async def _bug(request: Request, error: Exception) -> Response:
    """An error that nobody meant: logged with an id, told without its insides."""
    occurrence = str(uuid.uuid1())
    _LOG.error("internal error", occurrence=occurrence, path=request.url.path, exc_info=error)
    kind = HTTP_KINDS["internal"]
    detail = "The server has met a defect of its own."
    remedy = f"Report it, with what the server's log says of {occurrence}."
    return problems.response(kind, detail, request.url.path, remedy=remedy, occurrence=occurrence)
