"""A whole server whose clock is wrong: nothing is hastened, what is shown is right again at once, and it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from in_process.embedded import IMAGE
from in_process.trusting_verifier import TrustingProver
from interlock.config import ClockConfig, Config, DriverConfig, UpkeepConfig
from interlock.core.states import VmState
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.server import Server
from interlock.service import clock_watch
from interlock.stores.clock import SystemClock
from processes import wrong_clock_server
from processes.real_server import RealServer
from waiting import PATIENCE_S

DAY_MS = 24 * 3_600_000
WRONG_MS = 9 * DAY_MS
GRACE_MS = 60_000


class WrongClock(SystemClock):
    """The machine's clocks, where people's is wrong, and which may have run on for longer than they did."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong_by_ms = 0
        self.ran_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.ran_ms + self.wrong_by_ms

    def running_ms(self) -> int:
        return super().running_ms() + self.ran_ms


class Place:
    """Servers on one folder, one after the other, with a clock that can be wrong."""

    def __init__(self, folder: Path) -> None:
        self.clock = WrongClock()
        self._host = SimulatedHost()
        self._config = Config(
            data_dir=str(folder),
            hypervisor="simulated",
            host="here",
            driver=DriverConfig(drain_ms=1, inspect_retry_ms=10),
            upkeep=UpkeepConfig(reclaim_after_ms=7 * DAY_MS, resize_confirm_window_ms=DAY_MS, retry_ms=10),
            clock=ClockConfig(grace_ms=GRACE_MS),
        )

    async def start(self) -> None:
        self.server = Server(self._config, SimulatedHypervisor(self._host), self.clock, TrustingProver())
        await self.server.open()
        token = (self.server.folder / "admin.token").read_text().strip()
        transport = httpx.ASGITransport(self.server.app())
        headers = {"Authorization": f"Bearer {token}", "Prefer": "wait=20"}
        self.client = httpx.AsyncClient(transport=transport, base_url="http://interlock.test", headers=headers)

    async def stop(self) -> None:
        await self.client.aclose()
        await self.server.close()

    async def ask(self, path: str, body: dict[str, object]) -> None:
        answer = await self.client.post(path, json=body)
        assert answer.json()["request"]["status"] == "succeeded", answer.text

    async def prepare(self) -> None:
        """One instance that is soft-deleted, and one that is resized."""
        await self.server.store.images.put(IMAGE)
        for name in ("gone", "larger"):
            await self.ask("/v1/instances", {"name": name, "image": IMAGE.name, "memory_mib": 64})
        await self.ask("/v1/instances/gone/requests", {"operation": "soft_delete"})
        resize: dict[str, object] = {"operation": "resize", "parameters": {"memory_mib": 128}}
        await self.ask("/v1/instances/larger/requests", resize)

    async def states(self) -> dict[str, VmState]:
        items = (await self.client.get("/v1/instances")).json()["items"]
        return {one["name"]: VmState(one["vm_state"]) for one in items}

    async def until_told(self, what: str) -> None:
        """Return once the clock was looked at, and /readyz says that."""
        async with asyncio.timeout(PATIENCE_S):
            while what not in " ".join(await self.reasons()):  # noqa: ASYNC110 - nothing announces it but what is asked
                await asyncio.sleep(0.01)

    async def reasons(self) -> list[str]:
        ready = await self.client.get("/readyz")
        assert ready.status_code == 200, ready.text
        reasons: list[str] = ready.json()["reasons"]
        return reasons

    async def figure(self, name: str) -> float:
        lines = (await self.client.get("/metrics")).text.splitlines()
        return float(next(line for line in lines if line.startswith(f"interlock_{name} ")).split(" ")[1])

    async def shown(self) -> dict[str, float]:
        """By how much the times of an instance, its request and its event lie behind the true time, in seconds."""
        instance = (await self.client.get("/v1/instances/larger")).json()
        event = (await self.client.get("/v1/instances/larger/events")).json()["items"][-1]
        asked = (await self.client.get("/v1/instances/larger/requests")).json()["items"][0]
        moments = {"updated": instance["updated_at"], "event": event["at"], "ended": asked["ended_at"]}
        now = SystemClock().wall_ms() / 1000 + self.clock.ran_ms / 1000
        return {name: now - datetime.fromisoformat(at).astimezone(UTC).timestamp() for name, at in moments.items()}


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.setattr(clock_watch, "_INTERVAL_S", 0.01)
    one = Place(tmp_path / "data")
    await one.start()
    await one.prepare()
    yield one
    await one.stop()


MEANT = {"gone": VmState.SOFT_DELETED, "larger": VmState.RESIZED}


@pytest.mark.parametrize("restarted", [True, False])
async def test_a_clock_that_is_nine_days_ahead_does_nothing_and_is_told(place: Place, *, restarted: bool) -> None:
    if restarted:
        await place.stop()
    place.clock.wrong_by_ms = WRONG_MS
    if restarted:
        await place.start()
    await place.until_told("9 days")
    assert await place.states() == MEANT
    assert "Irreversible scheduled actions are delayed" in (await place.reasons())[0]
    assert await place.figure("clock_cautious") == 1
    assert abs(await place.figure("clock_offset_seconds") - WRONG_MS / 1000) < 5
    assert all(abs(behind + WRONG_MS / 1000) < 60 for behind in (await place.shown()).values())
    place.clock.wrong_by_ms = 0
    await place.until_told("back")
    assert all(0 <= behind < 60 for behind in (await place.shown()).values()), await place.shown()
    assert abs(await place.figure("clock_offset_seconds")) < 5
    assert await place.states() == MEANT


def test_a_clock_that_jumps_under_a_server_is_an_event_of_its_host(tmp_path: Path) -> None:
    """With a real process, which is killed in between."""
    wrong = tmp_path / "wrong_by_ms"
    wrong.write_text("0")
    server = RealServer(tmp_path / "data", {"INTERLOCK_HYPERVISOR": "simulated", "INTERLOCK_HOST": "here"})
    program = (wrong_clock_server.__file__, str(wrong))

    def told() -> list[str]:
        return [one["detail"] for one in server.get("/v1/hosts/here/events")["items"] if one["kind"] == "clock_jumped"]

    def until_told(times: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(told()) < times:
            assert time.monotonic() < deadline, told()
            time.sleep(0.02)

    try:
        server.start(program=program)
        assert told() == []
        wrong.write_text(str(WRONG_MS))
        until_told(1)
        assert "9 days" in server.get("/readyz")["reasons"][0]
        assert 'interlock_clock_jumps{way="forward"} 1.0' in server.client.get("/metrics").text
        server.kill()
        wrong.write_text("0")
        server.start(program=program)
        until_told(2)
        ahead, back = told()
        assert "ahead" in ahead
        assert "back" in back
    finally:
        server.kill()


async def test_what_was_due_is_done_after_the_grace_and_not_before(place: Place) -> None:
    await place.stop()
    place.clock.ran_ms = 8 * DAY_MS
    place.clock.wrong_by_ms = WRONG_MS
    await place.start()
    await place.until_told("9 days")
    store = place.server.store
    assert store.time.cautious_until_ms > store.now_ms()
    due = (await place.client.get("/v1/instances/gone")).json()["due"]
    assert abs(datetime.fromisoformat(due["at"]).timestamp() * 1000 - store.shown_ms(store.time.cautious_until_ms)) < 2
    assert await place.states() == MEANT
    await place.stop()
    place.clock.wrong_by_ms = 0
    await place.start()
    assert await place.states() == MEANT
    place.clock.ran_ms += GRACE_MS + 1
    await place.stop()  # nobody waits for the upkeep's own alarm, which is set for a minute
    await place.start()
    async with asyncio.timeout(PATIENCE_S):
        while await place.states() == MEANT:  # noqa: ASYNC110 - nothing announces it but what is asked
            await asyncio.sleep(0.01)
