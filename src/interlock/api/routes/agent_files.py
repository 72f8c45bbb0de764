"""`/v1/hosts/{name}/files/{transfer}`: files that a host's agent downloads or uploads, beside its WebSocket.

Only for agents, and not in the OpenAPI document. The server creates a transfer for one file; no path is on the wire.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse

from interlock.api.http.problems import HttpProblem
from interlock.api.http.protocol import CERTIFIED_HOST
from interlock.api.http.route import ApiParts, Routes
from interlock.service.auth import Caller

routes = Routes("agents")

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(?:[0-9]{1,18}|\*)")
_WRITE_BYTES: Final = 1 << 20
"""How much is collected before it is written."""


@routes.add(
    "GET /v1/hosts/{name}/files/{transfer}", "Download a file, or a range of it", {200: "application/octet-stream"}
)
async def download(parts: ApiParts, caller: Caller, request: Request) -> FileResponse:
    name, transfer = _path(parts, request)
    return FileResponse(parts.hosts.outgoing_file(caller, name, transfer), media_type="application/octet-stream")


@routes.add("PUT /v1/hosts/{name}/files/{transfer}", "Upload a range of a file", {204: None})
async def upload(parts: ApiParts, caller: Caller, request: Request) -> None:
    found = _CONTENT_RANGE.fullmatch(request.headers.get("content-range", ""))
    first, last = (int(found[1]), int(found[2])) if found else (0, -1)
    if last < first:
        raise HttpProblem(
            "bad-header", "Invalid Content-Range: expected `bytes FIRST-LAST/*`.", remedy="Send the range of the body."
        )
    name, transfer = _path(parts, request)
    await parts.hosts.receive_range(caller, name, transfer, first, _body(request, last - first + 1))


def _path(parts: ApiParts, request: Request) -> tuple[str, str]:
    """Return the host and the transfer. Raises `Forbidden` if the agent lacks a required certificate."""
    name = request.path_params["name"]
    parts.enrolment.require(name, request.scope.get("state", {}).get(CERTIFIED_HOST))
    return name, request.path_params["transfer"]


async def _body(request: Request, length: int) -> AsyncIterator[bytes]:
    """Yield the body in pieces to be written. Raises `HttpProblem` unless it has that length, in bytes."""
    piece, received = bytearray(), 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > length:
            break
        piece += chunk
        if len(piece) >= _WRITE_BYTES:
            yield bytes(piece)
            piece.clear()
    if received != length:
        raise HttpProblem("bad-header", "Invalid Content-Range: the length of the body differs.")
    yield bytes(piece)
