"""Steps in threads: whoever is cancelled waits for their end, and leaves no file open."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from conformance.hypervisor import GivenPermit
from interlock.hypervisors.qemu.files.sparse_copy import copy_sparse, uninterrupted
from waiting import PATIENCE_S


async def test_who_is_cancelled_twice_waits_for_the_end_of_the_step() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def step() -> None:
        begun.set()
        assert may_end.wait(PATIENCE_S)
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


def opened_files() -> set[str]:
    return {os.path.realpath(one) for one in Path("/proc/self/fd").iterdir()}


async def test_who_is_cancelled_while_a_file_is_opened_leaves_it_closed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    os.mkfifo(source)  # whose opening lasts until somebody writes
    worker = asyncio.create_task(copy_sparse(GivenPermit(), source, tmp_path / "target", lambda *_: None))
    await asyncio.sleep(0)
    worker.cancel()
    await asyncio.to_thread(lambda: os.close(os.open(source, os.O_WRONLY)))
    await asyncio.wait({worker})
    assert worker.cancelled()
    assert str(source) not in opened_files()
