"""What Interlock adds to a pause and an unpause of a real QEMU guest, over the same commands on its own monitor.

Both are measured in turn, pair by pair, on two guests of the same kind, so that a machine whose speed drifts does not
favour either.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path

from qemu.qmp import QMPClient

from benchmarks.nano_guest import nano_guest
from interlock.bench import run
from interlock.bench.fleet import scaled
from interlock.bench.guests import boot, carry_out
from interlock.config import Config
from interlock.core.operations import Operation
from interlock.server import Server

_PAIRS = 50


def measure(folder: Path, scale: float = 1.0) -> dict[str, float]:
    figures: dict[str, float] = run(_measure(folder, scale))
    return figures


async def _measure(folder: Path, scale: float) -> dict[str, float]:
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o111)  # QEMU runs as another user, and must get to its files
    image = nano_guest(folder)
    server = Server(Config(data_dir=str(folder / "data"), host="bench"))
    await server.open()
    instance_id = ""
    try:
        (instance_id,) = await boot(server, image, ["bench"])
        return await _beside_raw(server, instance_id, folder / "raw.sock", image.path, scaled(_PAIRS, scale))
    finally:
        if instance_id:
            await carry_out(server.instances, instance_id, Operation.DELETE)
        await server.close()


async def _beside_raw(server: Server, instance_id: str, socket: Path, kernel: str, pairs: int) -> dict[str, float]:
    """Run a second guest of the same kind, asked by nothing but its monitor."""
    qmp = QMPClient("raw")
    await qmp.start_server(str(socket))
    raw = await asyncio.create_subprocess_exec(
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"),
        *("-kernel", kernel, "-qmp", f"unix:{socket}"),
    )
    try:
        await qmp.accept()
        return await _compare(server, instance_id, qmp, pairs)
    finally:
        raw.kill()
        await raw.wait()


async def _compare(server: Server, instance_id: str, qmp: QMPClient, pairs: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"raw_pause": [], "raw_unpause": [], "pause": [], "unpause": []}
    for _ in range(pairs):
        await _timed(times["raw_pause"], qmp.execute("stop"))
        await _timed(times["raw_unpause"], qmp.execute("cont"))
        await _timed(times["pause"], carry_out(server.instances, instance_id, Operation.PAUSE))
        await _timed(times["unpause"], carry_out(server.instances, instance_id, Operation.UNPAUSE))
    await qmp.disconnect()
    median = {name: statistics.median(taken) * 1000 for name, taken in times.items()}
    return {
        "pairs": pairs,
        **{f"{name}_ms": round(value, 3) for name, value in median.items()},
        "extra_pause_ms": round(median["pause"] - median["raw_pause"], 3),
        "extra_unpause_ms": round(median["unpause"] - median["raw_unpause"], 3),
    }


async def _timed(times: list[float], doing: object) -> None:
    started = time.perf_counter()
    await doing  # type: ignore[misc]
    times.append(time.perf_counter() - started)
