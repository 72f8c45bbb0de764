"""Time that a test moves, and time that moves by itself where nothing else is left to do."""

from __future__ import annotations

import asyncio

import pytest

from interlock.testing.virtual_time import VirtualClock, run_in_virtual_time


async def test_sleepers_wake_in_order_and_at_their_moment() -> None:
    clock = VirtualClock(start_ms=0)
    woken: list[tuple[str, int]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.now_ms()))

    tasks = [asyncio.ensure_future(sleeper(name, seconds)) for name, seconds in (("b", 2), ("a", 1), ("c", 5))]
    await clock.advance(3)
    assert woken == [("a", 1_000), ("b", 2_000)]
    assert (clock.now_ms(), clock.sleepers) == (3_000, 1)
    await clock.advance(2)
    await asyncio.gather(*tasks)
    assert woken[-1] == ("c", 5_000)


def test_a_loop_in_virtual_time_jumps_over_waits() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3_600):
                await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(main()) == pytest.approx(3_600, abs=1)
