"""How many requests a second a server admits over HTTP, durably, asked by another process over 64 connections.

The server is whole but for its agent, so that admissions are measured and not what comes after them. Beside it the same
HTTP server with an application that does nothing: what no application on it can exceed.
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

from interlock.api.http.listener import bind
from interlock.api.http.protocol import HttpProtocol
from interlock.bench.fleet import fill, scaled
from interlock.config import Config, HttpConfig
from interlock.core.states import VmState

CONNECTIONS = 64
_REQUESTS = 10_000
_ANSWER_BYTES = 700
"""About as many as an admission is answered with."""


def measure(folder: Path, scale: float = 1.0) -> dict[str, float]:
    """Run each server in a child process of this one, and the load from here."""
    requests = scaled(_REQUESTS, scale)
    figures = _load_child("main", folder, requests)
    floor = _load_child("main_bare", folder, requests)["admissions_per_s"]
    rates = {"bare_server_per_s": floor, "of_bare_server": round(figures["admissions_per_s"] / floor, 3)}
    return {"connections": CONNECTIONS, **figures, **rates}


def _load_child(program: str, folder: Path, requests: int) -> dict[str, float]:
    from interlock.bench import run

    starting = f"from interlock.bench import http; http.{program}({str(folder)!r}, {requests})"
    with subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-c", starting], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            target = json.loads(server.stdout.readline())
            figures: dict[str, float] = run(_load(target["port"], target["secret"], target["ids"]))
        finally:
            server.terminate()
    return figures


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
    """Ask one after the other over one connection, as plainly as can be, so that the client costs little."""
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
    from interlock.driver.dispatcher import Dispatcher
    from interlock.server import ADMIN_TOKEN, Server
    from interlock.service.server_log import configure_logging

    class IdleAgent(Dispatcher):
        """An agent that opens nothing, and so serves nothing: everything else of it is the real one's."""

        async def open(self) -> None:
            """Do nothing."""

    # One token makes all requests, as many as are served.
    http = HttpConfig(token_requests_per_s=1e6, requests_max=CONNECTIONS, token_requests_max=CONNECTIONS)
    config = Config(data_dir=str(folder), listen_port=0, hypervisor="simulated", host="bench", http=http)
    configure_logging(config)  # to standard error: standard output is for the report to the parent process
    server = Server(config)
    server.agent = IdleAgent(server.means, server.in_force, server.upkeep)
    started = asyncio.Event()
    serving = asyncio.create_task(server.serve(started))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
    ids = await fill(server.store, count, VmState.ACTIVE)
    secret = (folder / ADMIN_TOKEN).read_text().strip()
    print(json.dumps({"port": int(server.url.rsplit(":", 1)[1]), "secret": secret, "ids": ids}), flush=True)
    await serving


def main(folder: str, count: int) -> Any:
    from interlock.bench import run

    return run(_serve(Path(folder), count))


def main_bare(_folder: str, count: int) -> None:
    """Serve with the same HTTP server an application that reads the body and sends an answer of the usual length."""
    import uvicorn

    head = {
        "type": "http.response.start",
        "status": 202,
        "headers": [(b"content-length", b"%d" % _ANSWER_BYTES), (b"content-type", b"application/json")],
    }
    body = {"type": "http.response.body", "body": b" " * _ANSWER_BYTES}

    async def application(_scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send(head)
        await send(body)

    listening = bind("127.0.0.1", 0)
    ids = [str(number) for number in range(count)]
    print(json.dumps({"port": listening.getsockname()[1], "secret": "none", "ids": ids}), flush=True)
    settings = uvicorn.Config(
        application, http=HttpProtocol, loop="uvloop", lifespan="off", log_config=None, access_log=False
    )
    uvicorn.Server(settings).run([listening])
