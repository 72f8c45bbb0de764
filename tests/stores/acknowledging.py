"""A process of its own for the tests: it changes things by sixteen tasks and says what was answered, until killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from pathlib import Path

from conformance.store.harness import admitting, creating, ending
from interlock.ports import IdempotencyKey
from interlock.stores.sqlite import SqliteStore

TASKS = 16


async def main(path: Path, life: str) -> None:
    store = SqliteStore(path)
    await store.open()
    await asyncio.gather(*(change(store, f"{life}-{task}") for task in range(TASKS)))


async def change(store: SqliteStore, name: str) -> None:
    await store.create(creating(name))
    say(f"instance {name}")
    for number in itertools.count():
        request_id = f"{name}-{number}"
        key = IdempotencyKey(scope="t", key=request_id, fingerprint="f")
        await store.change(name, admitting(request_id), key)
        say(f"queued {request_id}")
        await store.change(name, ending(request_id))
        say(f"succeeded {request_id}")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
