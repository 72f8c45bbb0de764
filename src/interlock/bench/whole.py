"""How many whole operations a second are carried out, submitted to ended, on simulated guests that take no time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from interlock.bench.fleet import scaled
from interlock.bench.guests import boot, carry_out
from interlock.config import Config
from interlock.core.operations import Operation
from interlock.core.records import Image
from interlock.hypervisors.simulated import SimulatedHypervisor
from interlock.server import Server
from interlock.service.instances import Instances

CALLERS = 64
_PAIRS_EACH = 40


def measure(folder: Path, scale: float = 1.0) -> dict[str, float]:
    from interlock.bench import run

    rate: float = run(_measure(folder, scale))
    return {"callers": CALLERS, "operations_per_s": round(rate)}


async def _measure(folder: Path, scale: float) -> float:
    server = Server(Config(data_dir=str(folder), hypervisor="simulated", host="bench"), SimulatedHypervisor())
    await server.open()
    try:
        image = Image(id="nothing", name="nothing", kind="kernel", path="/nowhere", size_bytes=0, sha256="0" * 64)
        ids = await boot(server, image, [f"vm-{number}" for number in range(CALLERS)])
        pairs = scaled(_PAIRS_EACH, scale)
        started = time.perf_counter()
        await asyncio.gather(*(_call(server.instances, instance_id, pairs) for instance_id in ids))
        return CALLERS * pairs * 2 / (time.perf_counter() - started)
    finally:
        await server.close()


async def _call(instances: Instances, instance_id: str, pairs: int) -> None:
    for _ in range(pairs):
        await carry_out(instances, instance_id, Operation.PAUSE)
        await carry_out(instances, instance_id, Operation.UNPAUSE)
