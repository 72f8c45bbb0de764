"""Guests to measure on, made and asked as a caller would."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from interlock.core.operations import Operation
from interlock.core.records import Admitted, Image, Status
from interlock.core.roles import Role
from interlock.server import Server
from interlock.service.auth import Caller
from interlock.service.instances import Instances
from interlock.service.request_models import NewInstance, NewRequest
from interlock.service.submission_results import SubmissionResult

CALLER: Final = Caller(token_id="bench", name="bench", role=Role.ADMIN, project="default")  # noqa: S106 - an id
_WAIT_MS = 60_000


async def boot(server: Server, image: Image, names: Sequence[str]) -> list[str]:
    """Create and boot an instance of each name from `image`; their ids."""
    await server.store.images.put(image)
    return await asyncio.gather(*(_boot(server.instances, image, name) for name in names))


async def _boot(instances: Instances, image: Image, name: str) -> str:
    answer = await instances.create(CALLER, NewInstance(name=name, image=image.name, memory_mib=64))
    await _ended(instances, answer)
    return answer.instance.id


async def carry_out(instances: Instances, instance_id: str, operation: Operation) -> None:
    """Submit an operation, and wait until it has succeeded."""
    await _ended(instances, await instances.submit(CALLER, instance_id, NewRequest(operation=operation)))


async def _ended(instances: Instances, answer: SubmissionResult) -> None:
    if not isinstance(answer.disposition, Admitted):
        raise RuntimeError(f"Not admitted: {answer.disposition}")  # noqa: TRY004 - a refusal is a value
    request = await instances.request(CALLER, answer.disposition.request.id, _WAIT_MS)
    if request.status is not Status.SUCCEEDED:
        raise RuntimeError(f"Not done: {request}")
