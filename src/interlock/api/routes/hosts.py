"""`/v1/host` and `/v1/hosts`: the server's own host, the other hosts, and the WebSocket of their agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import structlog
from starlette.requests import Request
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from interlock.api.http import audit_entries, problems, request_parsing
from interlock.api.http.authentication import authenticated, bearer
from interlock.api.http.loop_relay import REPLY_AT_ONCE
from interlock.api.http.protocol import CERTIFIED_HOST
from interlock.api.http.revocation import REVOKED, revocable_receive
from interlock.api.http.route import ApiParts, Routes
from interlock.api.schemas.hosts import (
    FenceConfirmation,
    Host,
    HostCapacity,
    HostDrain,
    HostEnrolment,
    HostEvent,
    HostEventList,
    HostList,
    HostRenameRequest,
    NetworkAbility,
    Protection,
    Resources,
)
from interlock.api.schemas.serializers import optional_timestamp, timestamp, wire
from interlock.core.errors import InterlockError, Invalid, Unavailable
from interlock.ports import HostState
from interlock.service.auth import Caller, Use
from interlock.service.capacity import Amounts
from interlock.service.hosts import DrainView, HostView

routes = Routes("hosts")
own_routes = Routes("host")

_LOG = structlog.get_logger(__name__)
_UNAUTHORIZED: Final = 4401
"""WebSocket close code: 4000 plus the HTTP status."""
ENROLMENT_HEADER: Final = "interlock-enrolment"
"""Header with the secret of an enrolment."""
_NORMAL: Final = 1000
_TRY_AGAIN_LATER: Final = 1013


@own_routes.add(
    "GET /v1/host", "Read the total, claimed and free capacity of the server's own host", {200: HostCapacity}
)
async def own_capacity(parts: ApiParts, caller: Caller, request: Request) -> HostCapacity:
    """Any role may read it."""
    occupancy = await parts.capacity.occupancy()
    return HostCapacity(
        name=parts.capacity.host,
        hypervisor=parts.config.hypervisor,
        accelerator=parts.accelerator(),
        protections=tuple(wire(Protection, one) for one in parts.protections()),
        networks=tuple(wire(NetworkAbility, one) for one in parts.host_networks()),
        guests=occupancy.guests,
        total=resources(occupancy.total),
        promised=resources(occupancy.claimed),
        free=resources(occupancy.free),
        disk_free_mib=occupancy.disk_free_mib,
    )


def resources(amounts: Amounts) -> Resources:
    return wire(Resources, amounts)


def drain_view(seen: DrainView | None) -> HostDrain | None:
    if seen is None:
        return None
    return wire(HostDrain, seen.drain, left=seen.left)


def _view(seen: HostView) -> Host:
    host, capacity = seen.host, seen.room
    return wire(
        Host,
        host,
        identity=None if host.identity is None else host.identity.id,
        drain=drain_view(seen.drain),
        protections=tuple(wire(Protection, one) for one in host.protections),
        networks=tuple(wire(NetworkAbility, one) for one in host.networks),
        linked=seen.linked,
        certified=seen.certified,
        lost_since_at=None if seen.condition.state is HostState.UP else timestamp(seen.condition.since_ms),
        fenced_at=optional_timestamp(seen.fenced_at_ms),
        to_evacuate=seen.instances if host.state is HostState.FENCED else 0,
        last_seen_at=timestamp(seen.last_seen_at_ms),
        instances=seen.instances,
        total=resources(capacity.total),
        promised=resources(capacity.claimed),
        free=resources(capacity.free),
        disk_free_mib=capacity.disk_free_mib,
    )


@routes.add("GET /v1/hosts", "List the hosts other than the server's own", {200: HostList})
async def hosts(parts: ApiParts, caller: Caller, request: Request) -> HostList:
    found = await parts.hosts.list(caller)
    own_drain = drain_view(parts.hosts.drain_seen(parts.hosts.own))
    items = tuple(_view(seen) for seen in found)
    return HostList(own=parts.hosts.own, own_drain=own_drain, items=items)


@routes.add("GET /v1/hosts/{name}", "Read a host", {200: Host})
async def host(parts: ApiParts, caller: Caller, request: Request) -> Host:
    return _view(await parts.hosts.show(caller, request.path_params["name"]))


@routes.add(
    "GET /v1/hosts/{name}/events",
    "List a host's events: joined, lost, fenced, back; of the server's own: its clock and its disk",
    {200: HostEventList},
)
async def events(parts: ApiParts, caller: Caller, request: Request) -> HostEventList:
    history = parts.hosts.history(caller, request.path_params["name"])
    items = tuple(wire(HostEvent, one) for one in history)
    return HostEventList(items=items)


@routes.add(
    "POST /v1/hosts/{name}/fence",
    "Fence a lost host: confirm that its guests have ended",
    {200: Host},
    body=FenceConfirmation,
    audited="host.fence",
)
async def fence(parts: ApiParts, caller: Caller, request: Request) -> Host:
    confirmation = await request_parsing.body(request, FenceConfirmation, parts.config.request_body_bytes_max)
    if not confirmation.guests_have_ended:
        raise Invalid("Cannot fence: the host's guests must have ended.", remedy="Power the host off first.")
    return _view(await parts.hosts.fence(caller, request.path_params["name"]))


@routes.add(
    "POST /v1/hosts/{name}/replace",
    "Replace a host's data folder: confirm that the guests of the old one have ended",
    {200: Host},
    body=FenceConfirmation,
    audited="host.replace",
)
async def replace(parts: ApiParts, caller: Caller, request: Request) -> Host:
    confirmation = await request_parsing.body(request, FenceConfirmation, parts.config.request_body_bytes_max)
    if not confirmation.guests_have_ended:
        raise Invalid("Cannot replace: the old host's guests must have ended.", remedy="Power the old host off first.")
    return _view(await parts.hosts.replace(caller, request.path_params["name"]))


@routes.add(
    "POST /v1/hosts/{name}/rename",
    "Rename a host and everything recorded on it",
    {200: Host},
    body=HostRenameRequest,
    audited="host.rename",
)
async def rename(parts: ApiParts, caller: Caller, request: Request) -> Host:
    body = await request_parsing.body(request, HostRenameRequest, parts.config.request_body_bytes_max)
    audit_entries.note(request, details={"name": body.name})
    return _view(await parts.hosts.rename(caller, request.path_params["name"], body.name))


@routes.add(
    "POST /v1/hosts/{name}/enrolment",
    "Create a one-time secret with which a host's agent connects without a certificate, and gets one",
    {201: HostEnrolment},
    audited="host.enroll",
)
async def enrol(parts: ApiParts, caller: Caller, request: Request) -> HostEnrolment:
    made = parts.enrolment.create(caller, request.path_params["name"])
    return HostEnrolment(host=made.host, secret=made.secret, expires_at=timestamp(made.expires_at_ms))


@routes.add("DELETE /v1/hosts/{name}", "Delete a fenced host that has no instances", {204: None}, audited="host.delete")
async def forget(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.hosts.forget(caller, request.path_params["name"])


# ------------------------------------------------------------------------------------------------------------ links


class _Link:
    """WebSocket of an agent. Implements `ports.Link`."""

    def __init__(self, websocket: WebSocket, use: Use) -> None:
        self._websocket = websocket
        self._use = use

    @classmethod
    def of(cls, websocket: WebSocket, use: Use) -> _Link:
        """Return the link of a connection, which is a `ports.ThreadedLink` if a thread of its own has it."""
        return (_ThreadedLink if REPLY_AT_ONCE in websocket.scope else cls)(websocket, use)

    async def send(self, frame: bytes) -> None:
        try:
            await self._websocket.send_bytes(frame)
        except (WebSocketDisconnect, RuntimeError) as gone:
            raise ConnectionError(str(gone)) from gone

    async def receive(self) -> bytes:
        try:
            return await self._websocket.receive_bytes()
        except (WebSocketDisconnect, RuntimeError, KeyError) as gone:
            raise ConnectionError(str(gone)) from gone

    async def close(self, reason: str = "") -> None:
        if self._websocket.application_state is WebSocketState.CONNECTED:
            try:
                if self._use.revoked:
                    await self._websocket.close(_UNAUTHORIZED, REVOKED)
                else:
                    await self._websocket.close(_TRY_AGAIN_LATER if reason else _NORMAL, reason)
            except (WebSocketDisconnect, RuntimeError) as gone:
                raise ConnectionError(str(gone)) from gone


class _ThreadedLink(_Link):
    """Implements `ports.ThreadedLink`."""

    def reply_at_once(self, reply: Callable[[bytes], bytes | None]) -> None:
        self._websocket.scope[REPLY_AT_ONCE](reply)


class _AgentLink:
    """ASGI application of the WebSocket on which a host's agent connects, with a bearer token."""

    def __init__(self, parts: ApiParts) -> None:
        self._parts = parts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)
        name = websocket.path_params["name"]
        try:
            caller = self._authenticate(websocket, name)
        except InterlockError as error:
            if not isinstance(error, Unavailable):
                await audit_entries.record_failure(self._parts.audit, websocket, error)
            await websocket.send_denial_response(problems.from_error(error, websocket.url.path))
            return
        with self._parts.callers.using(caller) as use:
            websocket = WebSocket(scope, revocable_receive(use, scope, receive), send)
            await websocket.accept()
            await self._serve(caller, name, _Link.of(websocket, use))

    def _authenticate(self, websocket: WebSocket, name: str) -> Caller:
        """Return the caller. Raises `HttpProblem`, `Forbidden`, `Invalid` or, if not ready, `Unavailable`."""
        caller = authenticated(
            self._parts,
            websocket,
            bearer(websocket.headers.get("authorization", "")),
            remedy=f"Create one with `interlock token create NAME --role agent --host {name[:80]}`.",
        )
        self._parts.hosts.require_may_link(caller, name)
        certified = websocket.scope.get("state", {}).get(CERTIFIED_HOST)
        self._parts.enrolment.require(name, certified, websocket.headers.get(ENROLMENT_HEADER))
        if not self._parts.accepting():
            raise Unavailable("The server is starting or stopping.")
        return caller

    async def _serve(self, caller: Caller, name: str, connection: _Link) -> None:
        _LOG.info("agent connected", host=name)
        try:
            await self._parts.hosts.link(caller, name, connection)
        except InterlockError as error:
            _LOG.warning("agent rejected", host=name, why=error.message, remedy=error.remedy)
        except (ConnectionError, TimeoutError) as error:
            _LOG.info("agent disconnected", host=name, why=str(error) or type(error).__name__)
        finally:
            try:
                await connection.close()
            except ConnectionError:
                _LOG.debug("agent disconnected", host=name)


def link_route(parts: ApiParts) -> WebSocketRoute:
    """Return the WebSocket route for agents."""
    return WebSocketRoute("/v1/hosts/{name}/link", _AgentLink(parts))
