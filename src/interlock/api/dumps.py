"""`/v1/instances/{reference}/dumps`: the memory dumps of an instance, listed, downloaded and deleted."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from interlock.api import asking, views
from interlock.api.doors import ApiParts, Door, answer
from interlock.api.dump_schemas import DumpList, MemoryDump
from interlock.service.callers import Caller


async def listing(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    found = await parts.dumps.of(caller, request.path_params["reference"])
    items = tuple(
        MemoryDump(id=dump.id, size_bytes=dump.size_bytes, made_at=views.timestamp(dump.made_at_ms)) for dump in found
    )
    return answer(DumpList(items=items))


async def download(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    dump = await parts.dumps.find(caller, request.path_params["reference"], request.path_params["id"])
    return FileResponse(dump.path, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


async def delete(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    await parts.dumps.delete(caller, request.path_params["reference"], request.path_params["id"])
    return Response(status_code=204)


DOORS: Final = (
    Door(
        method="GET",
        path="/v1/instances/{reference}/dumps",
        endpoint=listing,
        summary="List an instance's memory dumps, oldest first",
        answers={200: DumpList},
        problems=(404,),
        tag="instances",
    ),
    Door(
        method="GET",
        path="/v1/instances/{reference}/dumps/{id}",
        endpoint=download,
        summary="Download a memory dump",
        answers={200: "application/octet-stream"},
        problems=(404,),
        tag="instances",
    ),
    Door(
        method="DELETE",
        path="/v1/instances/{reference}/dumps/{id}",
        endpoint=delete,
        summary="Delete a memory dump",
        answers={204: None},
        problems=(404,),
        tag="instances",
    ),
)
