"""Steps in threads: whoever is cancelled waits for their end."""

from __future__ import annotations

import asyncio
import threading

from interlock.hypervisors.qemu.files.sparse_copy import uninterrupted


async def test_who_is_cancelled_twice_waits_for_the_end_of_the_step() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def step() -> None:
        begun.set()
        assert may_end.wait(10)
        ended.set()

    worker = asyncio.create_task(uninterrupted(step))
    await asyncio.to_thread(begun.wait)
    for _ in range(2):
        worker.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not worker.done()
    may_end.set()
    await asyncio.wait({worker})
    assert worker.cancelled()
    assert ended.is_set()
