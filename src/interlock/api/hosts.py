"""`/v1/hosts`: the hosts beside the server's own, and the connections that their agents make."""

from __future__ import annotations

from typing import Final

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from interlock.api import asking, problems
from interlock.api.doors import ApiParts, Door, answer
from interlock.api.host import amounts
from interlock.api.other_host_schemas import Fencing, OtherHost, OtherHostList
from interlock.api.problems import HTTP_KINDS
from interlock.api.views import timestamp
from interlock.core.errors import Forbidden, InterlockError, Invalid
from interlock.ports import Role
from interlock.service.callers import Caller
from interlock.service.hosts import SeenHost

_LOG = structlog.get_logger(__name__)


def _view(seen: SeenHost) -> OtherHost:
    host, room = seen.host, seen.room
    return OtherHost(
        name=host.name,
        state=host.state,
        linked=seen.linked,
        last_seen_at=timestamp(seen.last_seen_at_ms),
        fenced_by=host.fenced_by,
        address=host.address,
        shared=host.shared,
        instances=seen.instances,
        total=amounts(room.total),
        promised=amounts(room.promised),
        free=amounts(room.free),
        disk_free_mib=room.disk_free_mib,
    )


async def hosts(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    found = await parts.hosts.list(caller)
    return answer(OtherHostList(own=parts.hosts.own, items=tuple(_view(seen) for seen in found)))


async def host(parts: ApiParts, caller: Caller, request: Request) -> Response:
    return answer(_view(await parts.hosts.show(caller, request.path_params["name"])))


async def fence(parts: ApiParts, caller: Caller, request: Request) -> Response:
    word = await asking.body(request, Fencing, parts.config.request_body_bytes_max)
    if not word.guests_have_ended:
        raise Invalid("A host is fenced only once its guests have ended.", remedy="Switch it off first.")
    return answer(_view(await parts.hosts.fence(caller, request.path_params["name"])))


async def forget(parts: ApiParts, caller: Caller, request: Request) -> Response:
    await parts.hosts.forget(caller, request.path_params["name"])
    return Response(status_code=204)


# ------------------------------------------------------------------------------------------------------------ links


class _Link:
    """Satisfies `ports.Link`."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

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

    async def close(self) -> None:
        if self._websocket.application_state is WebSocketState.CONNECTED:
            try:
                await self._websocket.close()
            except (WebSocketDisconnect, RuntimeError) as gone:
                raise ConnectionError(str(gone)) from gone


def link_route(parts: ApiParts) -> WebSocketRoute:
    """Where an agent connects: a WebSocket under its host's name, with a bearer token."""

    async def link(websocket: WebSocket) -> None:
        name = websocket.path_params["name"]
        scheme, _, secret = websocket.headers.get("authorization", "").partition(" ")
        caller = parts.callers.authenticate(secret.strip()) if scheme.lower() == "bearer" else None
        if caller is None or caller.role not in {Role.AGENT, Role.ADMIN} or not parts.ready():
            kind = HTTP_KINDS["unauthorized"] if caller is None else problems.kind_of(Forbidden(""))
            detail = "An agent connects here, with a token of the role agent or admin."
            await websocket.send_denial_response(problems.response(kind, detail, websocket.url.path))
            return
        await websocket.accept()
        connection = _Link(websocket)
        _LOG.info("an agent calls", host=name)
        try:
            await parts.hosts.link(caller, name, connection)
        except InterlockError as error:
            _LOG.warning("an agent was turned away", host=name, why=error.message, remedy=error.remedy)
        except (ConnectionError, TimeoutError) as error:
            _LOG.info("an agent has gone", host=name, why=str(error) or type(error).__name__)
        finally:
            try:
                await connection.close()
            except ConnectionError:
                _LOG.debug("an agent has gone", host=name)

    return WebSocketRoute("/v1/hosts/{name}/link", link)


DOORS: Final = (
    Door(
        method="GET",
        path="/v1/hosts",
        endpoint=hosts,
        summary="List the hosts beside the server's own",
        answers={200: OtherHostList},
        tag="hosts",
    ),
    Door(
        method="GET",
        path="/v1/hosts/{name}",
        endpoint=host,
        summary="Read a host",
        answers={200: OtherHost},
        problems=(404,),
        tag="hosts",
    ),
    Door(
        method="POST",
        path="/v1/hosts/{name}/fence",
        endpoint=fence,
        summary="Say that the guests of a lost host have ended",
        body=Fencing,
        answers={200: OtherHost},
        problems=(404, 422),
        tag="hosts",
    ),
    Door(
        method="DELETE",
        path="/v1/hosts/{name}",
        endpoint=forget,
        summary="Forget a host that is fenced and has no instances",
        answers={204: None},
        problems=(404, 422),
        tag="hosts",
    ),
)
