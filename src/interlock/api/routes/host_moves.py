"""`/v1/hosts/{name}/evacuate`, `/drain` and `/v1/host-moves`: evacuate, drain and rebalance hosts."""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from interlock.api.http import request_parsing
from interlock.api.http.route import ApiParts, Parameter, Routes, json_response
from interlock.api.schemas import serializers
from interlock.api.schemas.hosts import (
    HostDrainRequest,
    HostEvacuationRequest,
    HostMove,
    HostMoveProgress,
    HostMoves,
    RebalanceRequest,
)
from interlock.core.errors import Invalid
from interlock.service.auth import Caller
from interlock.service.host_moves import Move

routes = Routes("hosts")

_IDS_MAX: Final = 100


def _view(move: Move) -> HostMove:
    return serializers.wire(
        HostMove,
        move.instance,
        instance=move.instance.id,
        operation=move.operation,
        target=move.target,
        request=None if move.request is None else move.request.id,
        reason=move.reason,
        losses=move.losses,
    )


def _views(moves: tuple[Move, ...], *, dry_run: bool) -> Response:
    return json_response(HostMoves(dry_run=dry_run, items=tuple(_view(move) for move in moves)))


@routes.add(
    "POST /v1/hosts/{name}/evacuate",
    "Evacuate all instances of a fenced host, or plan it",
    {200: HostMoves},
    body=HostEvacuationRequest,
    audited="host.evacuate",
)
async def evacuate(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, HostEvacuationRequest, parts.config.request_body_bytes_max)
    parameters: dict[str, Any] = {"host": body.host, **({"from_image": True} if body.from_image else {})}
    name = request.path_params["name"]
    return _views(await parts.moves.evacuate(caller, name, parameters, dry_run=body.dry_run), dry_run=body.dry_run)


@routes.add(
    "POST /v1/hosts/{name}/drain",
    "Drain a host, or plan it",
    {200: HostMoves},
    body=HostDrainRequest,
    audited="host.drain",
)
async def drain(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, HostDrainRequest, parts.config.request_body_bytes_max)
    name = request.path_params["name"]
    if body.dry_run:
        return _views(await parts.moves.drain_plan(caller, name, cold=body.cold), dry_run=True)
    await parts.moves.drain(caller, name, cold=body.cold)
    return _views(await parts.moves.left(caller, name), dry_run=False)


@routes.add("DELETE /v1/hosts/{name}/drain", "Stop draining a host", {204: None}, audited="host.undrain")
async def undrain(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.moves.undrain(caller, request.path_params["name"])


@routes.add(
    "GET /v1/hosts/{name}/drain", "List the instances still on a draining host, with why they stay", {200: HostMoves}
)
async def left(parts: ApiParts, caller: Caller, request: Request) -> Response:
    return _views(await parts.moves.left(caller, request.path_params["name"]), dry_run=False)


@routes.add(
    "POST /v1/host-moves",
    "Rebalance running instances over the hosts, or plan it",
    {200: HostMoves},
    body=RebalanceRequest,
)
async def rebalance(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, RebalanceRequest, parts.config.request_body_bytes_max)
    return _views(await parts.moves.rebalance(caller, dry_run=body.dry_run), dry_run=body.dry_run)


@routes.add(
    "GET /v1/host-moves",
    "Read requests of bulk moves, in every project",
    {200: HostMoveProgress},
    parameters=(Parameter("requests", f"Comma-separated ids, at most {_IDS_MAX}."),),
)
async def progress(parts: ApiParts, caller: Caller, request: Request) -> HostMoveProgress:
    ids = [one for one in request.query_params.get("requests", "").split(",") if one]
    if len(ids) > _IDS_MAX:
        raise Invalid(f"Too many requests: {len(ids)} ids; expected at most {_IDS_MAX}.")
    found = await parts.moves.progress(caller, ids)
    return HostMoveProgress(items=tuple(serializers.request(one) for one in found))
