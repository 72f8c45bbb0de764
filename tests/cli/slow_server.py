"""A server whose simulated guests take some seconds to have their memory saved: `python slow_server.py FOLDER`."""

from __future__ import annotations

import asyncio
import sys

from interlock.config import Config, DriverConfig
from interlock.hypervisors.simulated import SimulatedHypervisor
from interlock.hypervisors.simulated.faults import Method
from interlock.server import Server

SAVING_MS = 8000


async def main(folder: str) -> None:
    """Serve until a signal; says on standard output when it listens."""
    driver = DriverConfig(progress_interval_ms=100, drain_ms=1)
    config = Config(data_dir=folder, hypervisor="simulated", listen_port=0, host="here", driver=driver)
    server = Server(config, SimulatedHypervisor(delays_ms={Method.SAVE_MEMORY: SAVING_MS}))
    started = asyncio.Event()
    serving = asyncio.create_task(server.serve(started))
    await started.wait()
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await serving


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
