from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from interlock.hypervisors.simulated import SimulatedHost
from interlock.testing.embedded import Embedded

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
because = "What is in flight has shown no life."
"""


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
