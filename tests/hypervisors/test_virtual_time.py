"""Time that a test moves, and time that moves by itself where nothing else is left to do."""

from __future__ import annotations

import asyncio
import threading

import pytest

from in_process.virtual_time import VirtualClock, VirtualTimeLoop, run_in_virtual_time


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


def test_virtual_time_stands_still_while_threads_work() -> None:
    told = threading.Event()

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        timer = loop.call_later(3_600, told.set)
        await asyncio.to_thread(told.wait, 0.05)
        in_executor = loop.time()
        ended = asyncio.Event()
        loop.thread_begins()
        thread = threading.Thread(target=lambda: (told.wait(0.05), loop.call_soon_threadsafe(ended.set)))
        thread.start()
        await ended.wait()
        loop.thread_ends()
        timer.cancel()
        thread.join()
        return in_executor, loop.time()

    assert run_in_virtual_time(main()) == (0, 0)
    assert not told.is_set()
