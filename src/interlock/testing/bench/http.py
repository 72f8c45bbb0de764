"""How many requests a second a server admits over HTTP, durably, asked by another process over 64 connections.

The server is whole but for its agent, so that admissions are measured and not what comes after them.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interlock.config import Config
from interlock.core.states import VmState
from interlock.testing.bench.fleet import fill, scaled

CONNECTIONS = 64
_REQUESTS = 10_000


def measure(folder: Path, scale: float = 1.0) -> dict[str, float]:
    """Run the server in this process's child, and the load from here."""
    from interlock.testing.bench import run

    starting = f"from interlock.testing.bench.http import main; main([{str(folder)!r}, '{scaled(_REQUESTS, scale)}'])"
    server = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-c", starting], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        figures: dict[str, float] = run(_load(told["port"], told["secret"], told["ids"]))
    finally:
        server.terminate()
        server.wait(30)
    return {"connections": CONNECTIONS, **figures}


async def _load(port: int, secret: str, ids: list[str]) -> dict[str, float]:
    work = iter(ids)
    took: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(*(_connection(port, secret, work, took) for _ in range(CONNECTIONS)))
    elapsed = time.perf_counter() - started
    took.sort()
    return {
        "admissions_per_s": round(len(took) / elapsed),
        "median_ms": round(took[len(took) // 2] * 1000, 3),
        "p99_ms": round(took[len(took) * 99 // 100] * 1000, 3),
    }


async def _connection(port: int, secret: str, work: Iterator[str], took: list[float]) -> None:
    """Ask one after the other over one connection, as plainly as can be, so that asking costs little."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"operation":"reboot"}'
    for instance_id in work:
        started = time.perf_counter()
        writer.write(
            f"POST /v1/instances/{instance_id}/requests HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {secret}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 202"):
            raise RuntimeError(f"The server answered {head.splitlines()[0].decode()}.")
        await reader.readexactly(_length(head))
        took.append(time.perf_counter() - started)
    writer.close()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise RuntimeError("The server's answer has no length.")


async def _serve(folder: Path, count: int) -> None:
    from interlock.service.server_log import configure_logging
    from interlock.wiring import ADMIN_TOKEN, Server

    config = Config(data_dir=str(folder), listen_port=0, hypervisor="simulated", host="bench")
    configure_logging(config)  # to standard error: standard output is for what the parent is told
    server = Server(config)
    server.agent = _NoAgent()  # type: ignore[assignment]
    started = asyncio.Event()
    serving = asyncio.create_task(server.serve(started))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
    ids = await fill(server.store, count, VmState.ACTIVE)
    secret = (folder / ADMIN_TOKEN).read_text().strip()
    print(json.dumps({"port": int(server.url.rsplit(":", 1)[1]), "secret": secret, "ids": ids}), flush=True)
    await serving


class _NoAgent:
    """Serves nothing."""

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


def main(arguments: list[str]) -> Any:
    from interlock.testing.bench import run

    return run(_serve(Path(arguments[0]), int(arguments[1])))
