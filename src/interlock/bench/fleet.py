"""Instances to measure on, put straight into a store."""

from __future__ import annotations

import asyncio

from interlock.core.records import Change, Image, Instance, Spec
from interlock.core.states import PowerState, VmState
from interlock.ports import Store

_IMAGE = Image(id="image", name="image", kind="kernel", path="/nowhere", size_bytes=0, sha256="0" * 64)
_AT_ONCE = 500


def scaled(count: int, scale: float) -> int:
    """A count of a measure for a run of another size; at least one."""
    return max(1, round(count * scale))


async def fill(store: Store, count: int, vm_state: VmState, host: str = "bench") -> list[str]:
    """Keep `count` instances of the project `default`; their ids."""
    ids = [f"00000000-0000-7000-8000-{number:012d}" for number in range(count)]
    for first in range(0, count, _AT_ONCE):
        await asyncio.gather(*(_keep(store, id_, vm_state, host) for id_ in ids[first : first + _AT_ONCE]))
    return ids


async def _keep(store: Store, instance_id: str, vm_state: VmState, host: str) -> None:
    def decide(now_ms: int) -> Change[None]:
        instance = Instance(
            id=instance_id,
            name=f"vm-{int(instance_id[-12:])}",
            project="default",
            host=host,
            vm_state=vm_state,
            power_state=PowerState.RUNNING,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            spec=Spec(image=_IMAGE),
        )
        return Change(instance=instance, answer=None)

    await store.create(decide)
