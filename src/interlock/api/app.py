"""The ASGI application: authentication, error responses, ETags, and the health, metrics and documentation pages."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any, Final

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount
from starlette.routing import Route as PathRoute
from starlette.staticfiles import StaticFiles

from interlock.api.http import audit_entries, multipart_upload, openapi, problems, request_parsing, revocation
from interlock.api.http.authentication import authenticated, bearer
from interlock.api.http.problems import HTTP_PROBLEM_TYPES, HttpProblem
from interlock.api.http.protocol import respond_at_once
from interlock.api.http.route import ApiParts, Route, json_response
from interlock.api.metrics import CONTENT_TYPE
from interlock.api.routes import (
    agent_files,
    audit,
    console,
    events,
    host_moves,
    hosts,
    instances,
    inventory,
    networks,
    policy,
    projects,
    requests,
)
from interlock.api.schemas import serializers
from interlock.api.schemas.inventory import Health, Readiness
from interlock.core.errors import Forbidden, InterlockError
from interlock.core.roles import Role
from interlock.ports.system_errors import system_failure
from interlock.service.auth import Caller, Use
from interlock.service.load_limits import RequestSlot

__all__ = ["ROUTES", "ApiParts", "create_app"]

ROUTES: Final[tuple[Route, ...]] = (
    *instances.routes,
    *console.routes,
    *requests.routes,
    *events.routes,
    *inventory.images_routes,
    *inventory.volumes_routes,
    *inventory.tokens_routes,
    *networks.routes,
    *projects.routes,
    *audit.routes,
    *policy.routes,
    *hosts.own_routes,
    *hosts.routes,
    *host_moves.routes,
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


def create_app(parts: ApiParts) -> Application:
    """Return the application. Call it only with the data folder locked: it removes leftovers of uploads."""
    multipart_upload.remove_leftovers(parts.config.folder)
    by_path = _by_path(ROUTES)
    # A fixed path before one with a parameter in the same place.
    paths = sorted(by_path, key=lambda path: [part.startswith("{") for part in path.split("/")])
    endpoints = {path: _Path(parts, by_path[path]) for path in paths}
    for path, by_method in _by_path(agent_files.routes).items():
        endpoints[path] = _Path(parts, by_method, for_agents=True)
    routes = [PathRoute(path, endpoint, methods=list(endpoint.methods)) for path, endpoint in endpoints.items()]
    return Application(
        endpoints,
        routes=[*routes, hosts.link_route(parts), *console.socket_routes(parts), *_server_pages(parts)],
        exception_handlers={HTTPException: _http_exception, Exception: _internal_error},
    )


_Tree = dict[str, Any]
_PARAMETER: Final = "/parameter"
_ENDPOINT: Final = "/endpoint"
"""Keys of a node for any segment, and for the names of the parameters and the endpoint that ends there. No segment is
equal to one: they have a slash.
"""


class Application(Starlette):
    """Starlette, with the paths of the interface found in a tree of their segments.

    Starlette would try one pattern after the other, inside two layers that turn exceptions into responses, as `_Path`
    does. It gets whatever is not found: other methods, other paths and WebSockets.
    """

    def __init__(self, endpoints: Mapping[str, _Path], **options: Any) -> None:
        super().__init__(**options)
        # A redirect would lose the request body.
        self.router.redirect_slashes = False
        self._tree: _Tree = {}
        for path, endpoint in endpoints.items():
            node, names = self._tree, []
            for segment in path.split("/"):
                if segment.startswith("{"):
                    names.append(segment[1:-1])
                node = node.setdefault(_PARAMETER if segment.startswith("{") else segment, {})
            node[_ENDPOINT] = (names, endpoint)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        endpoint = self.find(scope) if scope["type"] == "http" else None
        await (super().__call__ if endpoint is None else endpoint)(scope, receive, send)

    def find(self, scope: Any) -> _Path | None:
        """Return the endpoint of a path and method, and put its parameters into the scope; None if there is none."""
        node = self._tree
        values: list[str] = []
        for segment in scope["path"].split("/"):
            found = node.get(segment)
            if found is None:
                found = node.get(_PARAMETER)
                if found is None or not segment:
                    return None
                values.append(segment)
            node = found
        names, endpoint = node.get(_ENDPOINT, ((), None))
        if endpoint is None or scope["method"] not in endpoint.methods:
            return None
        scope["path_params"] = dict(zip(names, values, strict=True))
        return endpoint  # type: ignore[no-any-return]


def _by_path(routes: Iterable[Route]) -> dict[str, dict[str, Route]]:
    """Return the routes by path and method."""
    found: dict[str, dict[str, Route]] = {}
    for route in routes:
        found.setdefault(route.path, {})[route.method] = route
    return found


class _Path:
    """ASGI application of one path: dispatches on the method, and turns exceptions into problem details."""

    def __init__(self, parts: ApiParts, routes: dict[str, Route], *, for_agents: bool = False) -> None:
        self._parts = parts
        self._routes = routes
        self._for_agents = for_agents
        self.methods: Final = {*routes, "HEAD"} if "GET" in routes else {*routes}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        connection = HTTPConnection(scope)
        serializers.WALL_CLOCK.set(self._parts.instances.shown_ms)
        try:
            caller = _authenticate(self._parts, connection, for_agents=self._for_agents)
        except InterlockError as error:
            self._count_refusal(error)
            await audit_entries.record_failure(self._parts.audit, connection, error)
            await problems.from_error(error, connection.url.path)(scope, receive, send)
            return
        try:
            slot = None if self._for_agents else _admit(self._parts, caller)
        except HttpProblem as error:
            self._count_refusal(error)
            await problems.from_error(error, connection.url.path)(scope, receive, send)
            return
        with self._parts.callers.using(caller) as use:
            receive = revocation.revocable_receive(use, scope, receive)
            request = Request(scope, receive)
            with slot or contextlib.nullcontext():
                route = self._routes["GET" if request.method == "HEAD" else request.method]
                response = await self._respond(caller, request, route, use)
                if audit_entries.is_audited(scope, route.audited):
                    await audit_entries.record(self._parts.audit, caller, request, route.audited, response.status_code)
            if not use.revoked and respond_at_once(scope, response):
                return
            revocable_send = revocation.RevocableSend(send, use)
            try:
                await response(scope, receive, revocable_send)
            except ClientDisconnect:
                _LOG.info("response aborted: token no longer valid", path=request.url.path)
            if use.revoked:
                await revocable_send.finish()

    def _count_refusal(self, error: InterlockError) -> None:
        if isinstance(error, HttpProblem) and error.kind.name in problems.LIMITS:
            self._parts.metrics.count_refusal(error.kind.name)

    async def _respond(self, caller: Caller, request: Request, route: Route, use: Use) -> Response:
        try:
            return await self._call_endpoint(caller, request, route)
        except InterlockError as error:
            if problems.problem_type_of(error) is HTTP_PROBLEM_TYPES["internal"]:
                return await _internal_error(request, error)
            self._count_refusal(error)
            return problems.from_error(error, request.url.path)
        except ClientDisconnect:
            if use.revoked:
                return problems.response(HTTP_PROBLEM_TYPES["unauthorized"], revocation.REVOKED, request.url.path)
            return Response(status_code=400)
        except OSError as error:
            failed = system_failure(error, "the server's host")
            if failed is None:
                return await _internal_error(request, error)
            _LOG.warning("request failed", path=request.url.path, why=failed.message)
            return problems.from_error(failed, request.url.path)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a request
            return await _internal_error(request, error)

    async def _call_endpoint(self, caller: Caller, request: Request, route: Route) -> Response:
        reads = route.method == "GET"
        if request.scope["query_string"]:
            request_parsing.check_parameters(request.query_params, *route.query_names)
        response = await route.endpoint(self._parts, caller, request)
        if not isinstance(response, Response):
            status = next(iter(route.responses))
            response = Response(status_code=status) if response is None else json_response(response, status)
        if not reads:
            return response
        if isinstance(response, (StreamingResponse, FileResponse)):
            # A streamed body cannot be hashed for an ETag.
            return Response(headers=response.headers) if request.method == "HEAD" else response
        return _with_etag(request, response)


def _with_etag(request: Request, response: Response) -> Response:
    """Return the response with an ETag that covers its body, or 304 if `If-None-Match` has that ETag."""
    if response.status_code != 200:  # noqa: PLR2004
        return response
    digest = blake2b(response.body, digest_size=8).hexdigest()
    own = next((value for name, value in response.raw_headers if name == b"etag"), None)
    etag = f'"{digest}"' if own is None else f'{own[:-1].decode()}-{digest}"'
    response.raw_headers = [one for one in response.raw_headers if one[0] != b"etag"]
    response.raw_headers.append((b"etag", etag.encode()))
    return (
        Response(status_code=304, headers={"etag": etag}) if request_parsing.matches_etag(request, etag) else response
    )


def _authenticate(parts: ApiParts, connection: HTTPConnection, *, for_agents: bool) -> Caller:
    """Return the caller; an agent only on the paths for agents, which check their callers further."""
    caller = authenticated(
        parts,
        connection,
        bearer(request_parsing.header(connection, "authorization", "")),
        remedy="Send `Authorization: Bearer <secret>`; the first start writes one to the file admin.token.",
    )
    if caller.role is Role.AGENT and not for_agents:
        raise Forbidden("Permission denied: a token with the role agent can only connect an agent.")
    return caller


def _admit(parts: ApiParts, caller: Caller) -> RequestSlot:
    """Return the slot of a request. Raises `HttpProblem` if the token asks too often, or too much at the same time."""
    limits = parts.config.http
    retry_after_s = parts.load.rates.take(caller.token_id)
    if retry_after_s:
        raise problems.too_many(
            f"This token has made more than {limits.token_requests_per_s:g} requests a second.",
            "Wait between requests; follow events instead of polling.",
            retry_after_s,
        )
    slot = parts.load.serve(caller.token_id)
    if slot is None:
        if parts.load.requests.full_for(caller.token_id):
            raise problems.too_many(
                f"{limits.token_requests_max} requests of this token are being served.", "Send fewer at the same time."
            )
        raise problems.overloaded("The server is serving as many requests as it can.")
    return slot


def _require_metrics_reader(parts: ApiParts, request: Request) -> None:
    """Raise unless the request has the token of the monitoring system, or an admin's: metrics are of all projects."""
    secret = bearer(request_parsing.header(request, "authorization", ""))
    configured = parts.config.http.metrics_token
    if configured and hmac.compare_digest(secret.encode(), configured.encode()):
        return
    _authenticate(parts, request, for_agents=False).require(Role.ADMIN, "read metrics")


def _configuration_warnings(parts: ApiParts) -> tuple[str, ...]:
    """Return what an operator should look into although the server is ready."""
    refused = parts.policies.refused
    if refused is None:
        return parts.clock.reasons()
    policy = f"The configured policy {refused.name} is rejected: {refused.why} {parts.policies.now.name} is in force."
    return (policy, *parts.clock.reasons())


@functools.cache
def _document(version: str) -> bytes:
    """Return the OpenAPI document, generated on first use because that takes as long as the rest of a start."""
    return msgspec.json.encode(openapi.document(ROUTES, version, console.WEBSOCKETS_DESCRIPTION))


def _server_pages(parts: ApiParts) -> list[BaseRoute]:
    async def health(_: Request) -> Response:
        return json_response(Health(status="alive", version=parts.version))

    async def readiness(_: Request) -> Response:
        unready = await parts.readiness.missing()
        reasons = unready or (*_configuration_warnings(parts), *await parts.disk_space.warnings())
        return json_response(Readiness(ready=not unready, reasons=reasons), 503 if unready else 200)

    async def metrics(request: Request) -> Response:
        try:
            _require_metrics_reader(parts, request)
        except InterlockError as error:
            return problems.from_error(error, request.url.path)
        parts.metrics.set_refused_policy(refused=parts.policies.refused is not None)
        parts.metrics.set_space(await parts.disk_space.look())
        parts.metrics.set_clock(parts.clock.offset_s, parts.clock.jumps, cautious=parts.clock.cautious)
        parts.metrics.set_stuck(len(await parts.instances.stuck(None)))
        parts.metrics.set_troubled(await parts.instances.troubled())
        occupancy = await parts.capacity.occupancy()
        parts.metrics.set_host({"total": occupancy.total, "promised": occupancy.claimed, "free": occupancy.free})
        parts.metrics.set_hosts(await parts.hosts.every(), parts.instances.now_ms())
        return Response(parts.metrics.exposition(), media_type=CONTENT_TYPE)

    async def openapi_document(_: Request) -> Response:
        document = await asyncio.to_thread(_document, parts.version)
        return Response(document, media_type="application/json")

    async def front(_: Request) -> Response:
        return RedirectResponse("/docs")

    async def docs(_: Request) -> Response:
        return HTMLResponse(_DOCS)

    pages: dict[str, _Handler] = {
        "/": front,
        "/healthz": health,
        "/readyz": readiness,
        "/metrics": metrics,
        "/openapi.json": openapi_document,
        "/docs": docs,
    }
    # By its name: importing it takes longer than everything else here.
    static = StaticFiles(packages=[("swagger_ui", "static")])
    return [*(PathRoute(path, handler) for path, handler in pages.items()), Mount("/docs/static", static)]


async def _http_exception(request: Request, error: Exception) -> Response:
    """Return the problem for a path or method that the router does not know."""
    assert isinstance(error, HTTPException)
    kind = HTTP_PROBLEM_TYPES["method-not-allowed" if error.status_code == 405 else "no-such-path"]  # noqa: PLR2004
    detail = f"{request.method} {request.url.path[:200]}: {kind.title.lower()}."
    headers = dict(error.headers or {})
    return problems.response(kind, detail, request.url.path, remedy="See /docs.", headers=headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    """Log an unexpected exception under a new id, and return a problem that names only the id."""
    occurrence = str(uuid.uuid1())
    _LOG.error("internal error", occurrence=occurrence, path=request.url.path, exc_info=error)
    kind = HTTP_PROBLEM_TYPES["internal"]
    detail = "Internal server error."
    remedy = f"Report it, with the server's log entry {occurrence}."
    return problems.response(kind, detail, request.url.path, remedy=remedy, occurrence=occurrence)
