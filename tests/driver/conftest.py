from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from in_process.embedded import Embedded
from in_process.in_memory_agent import Neighbour
from in_process.three_hosts import SMALL, Street
from in_process.virtual_time import VirtualTimeLoop
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import Limits

IMPATIENT = """
[policy]
name = "impatient"
extends = "standard"
description = "standard, with thresholds short enough to be waited for in a test."

[[rule]]
id = "test-takeover"
operations = ["stop", "reboot", "start"]
task_state = ["@reboot", "@pause", "@start", "@create", "@stop"]
silent_for = "150ms"
verdict = "after"
threshold = "600ms"
reason = "no_sign_of_life"
because = "The operation in progress has stalled."
"""


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], VirtualTimeLoop]]:
    """Everything here runs in virtual time: hosts are simulated, and nothing depends on how fast the machine is."""
    return {"virtual": VirtualTimeLoop}


@pytest.fixture
def host() -> SimulatedHost:
    return SimulatedHost()


@pytest.fixture
async def fleet(tmp_path: Path, host: SimulatedHost) -> AsyncIterator[Embedded]:
    policy = tmp_path / "impatient.toml"
    policy.write_text(IMPATIENT)
    embedded = Embedded(tmp_path / "data", host, str(policy), answer_timeout_s=0.05)
    await embedded.start()
    yield embedded
    await embedded.server.close()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    """A server under `standard`, whose host is called `here`."""
    embedded = Embedded(tmp_path / "data", SimulatedHost())
    await embedded.start()
    yield embedded
    await embedded.server.close()


@pytest.fixture
async def north(house: Embedded, tmp_path: Path) -> AsyncIterator[Neighbour]:
    """Another host of `house`."""
    neighbour = Neighbour("north", tmp_path / "north")
    await neighbour.open()
    await neighbour.connect(house)
    yield neighbour
    await neighbour.close()


@pytest.fixture
def limits() -> Limits:
    """What may be promised of the other hosts of `street`."""
    return SMALL


@pytest.fixture
async def street(tmp_path: Path, limits: Limits) -> AsyncIterator[Street]:
    one = Street(tmp_path, limits)
    for other in (one.north, one.south):
        await other.open()
    await one.start()
    yield one
    for other in (one.north, one.south):
        await other.close()
    await one.house.server.close()
