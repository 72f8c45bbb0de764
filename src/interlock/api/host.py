"""`/v1/host`: what the server's own host has, what is promised of it, and what is free."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from interlock.api import asking
from interlock.api.doors import ApiParts, Door, answer
from interlock.api.host_schemas import HostAmounts, HostStands
from interlock.service.callers import Caller
from interlock.service.capacity import Amounts


async def read(parts: ApiParts, caller: Caller, request: Request) -> Response:  # noqa: ARG001 - everybody may look
    asking.only(request.query_params)
    stands = await parts.capacity.occupancy()
    return answer(
        HostStands(
            name=parts.capacity.host,
            hypervisor=parts.config.hypervisor,
            accelerator=parts.accelerator(),
            guests=stands.guests,
            total=amounts(stands.total),
            promised=amounts(stands.promised),
            free=amounts(stands.free),
            disk_free_mib=stands.disk_free_mib,
        )
    )


def amounts(of: Amounts) -> HostAmounts:
    """The amounts, as they go over the wire."""
    return HostAmounts(memory_mib=of.memory_mib, vcpus=of.vcpus, disk_mib=of.disk_mib)


DOORS: Final = (
    Door(
        method="GET",
        path="/v1/host",
        endpoint=read,
        summary="Read what this host has, what is promised of it and what is free",
        answers={200: HostStands},
        tag="host",
    ),
)
