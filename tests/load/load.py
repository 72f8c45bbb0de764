"""Many clients that ask at once for whatever comes to their minds, and the history that they leave.

Each client has one connection and a seed of its own, asks as fast as it is answered, and keeps what it was told. What
the answers promise is judged afterwards by `check_history`; what no answer may ever be is noted here.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter, deque
from pathlib import Path
from random import Random
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from interlock.core.records import Event, Instance
from interlock.core.states import VmState
from interlock.ports import InstanceFilter
from interlock.server import DATABASE
from interlock.stores.sqlite import SqliteStore
from load import load_server
from load.load_server import IMAGE, VOLUMES

CLIENTS: Final = 200
INSTANCES: Final = 50
_OPERATIONS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    *(("start", {}),) * 4,
    *(("stop", {}),) * 2,
    *(("stop", {"hard": True}),) * 2,
    *(("reboot", {}),) * 2,
    *(("reboot", {"hard": True}),) * 2,
    *(("pause", {}),) * 2,
    *(("unpause", {}),) * 2,
    ("lock", {}),
    ("unlock", {}),
    *(("attach_volume", {"volume": ""}),) * 3,
    *(("detach_volume", {"volume": ""}),) * 3,
)
_DELETES, _CANCELS, _LOOKS, _KEYED = 0.01, 0.05, 0.05, 0.05
"""Shares of what a client does, apart from the operations; the last, of the operations."""
_EXPECTED: Final = {
    "ask": {200, 202, 404, 409},
    "create": {202, 409},
    "cancel": {200, 202, 404, 409},
    "look": {200, 404},
}
_RECENT: Final = 400
_PAGE: Final = 500
_EVENTS_AT_ONCE: Final = 10_000


class Report(msgspec.Struct, kw_only=True):
    """What a load came to."""

    seconds: float = 0.0
    requests: int = 0
    answers: Counter[str] = msgspec.field(default_factory=Counter)
    """How often each kind of asking got each answer, such as `ask admitted`."""
    reasons: Counter[str] = msgspec.field(default_factory=Counter)
    """The codes of the refusals."""
    took_s: list[float] = msgspec.field(default_factory=list)
    acknowledged: list[str] = msgspec.field(default_factory=list)
    """The ids of the requests that clients were told are admitted."""
    wrong: list[str] = msgspec.field(default_factory=list)
    """Answers that must not be: a 5xx, a refusal without its reason, a repeated key with another answer."""
    stuck: list[str] = msgspec.field(default_factory=list)
    """What never came to its end when the faults were over."""
    differences: list[str] = msgspec.field(default_factory=list)
    """Where the record and the host did not agree at the end."""

    def figures(self) -> dict[str, Any]:
        """The report in numbers; times in milliseconds."""
        took = sorted(self.took_s) or [0.0]
        return {
            "seconds": round(self.seconds, 1),
            "requests": self.requests,
            "requests_per_s": round(self.requests / self.seconds),
            "median_ms": round(took[len(took) // 2] * 1000, 1),
            "p99_ms": round(took[len(took) * 99 // 100] * 1000, 1),
            "answers": dict(self.answers.most_common()),
            "reasons": dict(self.reasons.most_common()),
        }


async def put_load(folder: Path, seconds: float, requests: int, *, seed: int = 1, clients: int = CLIENTS) -> Report:
    """Start a server in `folder`, load it for so long and with so many requests at least, let it settle, and end it.

    Raises:
        RuntimeError: the server did not start, or did not end by itself.
    """
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", load_server.__name__, str(folder), str(seed)),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        told = await _line(server.stdout)
        load = _Load(told["url"], told["secret"], seed)
        report = await load.run(clients, seconds, requests)
        server.stdin.write(b"calm\n")
        settled = await _line(server.stdout)
        report.stuck, report.differences = settled["stuck"], settled["differences"]
        server.stdin.write(b"stop\n")
        if await asyncio.wait_for(server.wait(), 30) != 0:
            raise RuntimeError(f"The server ended with {server.returncode}.")
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
    return report


async def read_history(folder: Path) -> tuple[list[Event], list[Instance]]:
    """Every event that the ended server of `folder` kept, in order, and every instance as it is at the end."""
    store = SqliteStore(folder / "data" / DATABASE)
    await store.open()
    try:
        events: list[Event] = []
        while page := await store.events(events[-1].sequence if events else 0, _EVENTS_AT_ONCE):
            events += page
        instances: list[Instance] = []
        for where in (InstanceFilter(), InstanceFilter(vm_state=VmState.DELETED)):
            cursor: str | None = None
            while True:
                found = await store.instances(where, _PAGE, cursor)
                instances += found.items
                cursor = found.next_cursor
                if cursor is None:
                    break
    finally:
        await store.close()
    return events, instances


async def _line(stream: asyncio.StreamReader) -> dict[str, Any]:
    line = await stream.readline()
    if not line:
        raise RuntimeError("The server ended before its time; its standard error says why.")
    told: dict[str, Any] = json.loads(line)
    return told


class _Load:
    """What the clients of one load know of the server together."""

    def __init__(self, url: str, secret: str, seed: int) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.secrets = [secret]
        self.seed = seed
        self.ids: dict[str, str | None] = dict.fromkeys(f"vm-{number}" for number in range(INSTANCES))
        self.names = tuple(self.ids)
        self.recent: deque[str] = deque(maxlen=_RECENT)
        self.report = Report()

    async def run(self, clients: int, seconds: float, requests: int) -> Report:
        """Ask for so long and so often, at least. Half of the clients are members, whom a lock binds."""
        first = await Connection.open(self.host, self.port, self.secrets[0])
        _, made = await first.ask("POST", "/v1/tokens", {"name": "member", "role": "member", "project": "default"})
        self.secrets.append(made["secret"])
        first.close()
        started = time.perf_counter()
        until = started + seconds, requests
        await asyncio.gather(*(self._client(number, *until) for number in range(clients)))
        self.report.seconds = time.perf_counter() - started
        return self.report

    async def _client(self, number: int, until_s: float, requests: int) -> None:
        connection = await Connection.open(self.host, self.port, self.secrets[number % 2])
        client = _Client(self, connection, Random(f"{self.seed}/{number}"))
        try:
            while time.perf_counter() < until_s or self.report.requests < requests:
                await client.step()
        except (OSError, asyncio.IncompleteReadError) as error:
            self.report.wrong.append(f"a connection broke: {error!r}")
        finally:
            connection.close()


class _Client:
    """One client: does one thing after the other."""

    def __init__(self, load: _Load, connection: Connection, chance: Random) -> None:
        self._load = load
        self._report = load.report
        self._connection = connection
        self._chance = chance

    async def step(self) -> None:
        name = self._chance.choice(self._load.names)
        instance_id = self._load.ids[name]
        point = self._chance.random()
        if instance_id is None:
            await self._create(name)
        elif point < _DELETES:
            await self._ask(name, instance_id, "delete", {})
        elif point < _DELETES + _CANCELS and self._load.recent:
            await self._told("cancel", "DELETE", f"/v1/requests/{self._chance.choice(self._load.recent)}")
        elif point < _DELETES + _CANCELS + _LOOKS:
            await self._look(name, instance_id)
        else:
            operation, parameters = self._chance.choice(_OPERATIONS)
            if "volume" in parameters:
                parameters = {"volume": self._chance.choice(VOLUMES)}
            await self._ask(name, instance_id, operation, parameters)

    async def _create(self, name: str) -> None:
        status, said = await self._told("create", "POST", "/v1/instances", {"name": name, "image": IMAGE.name})
        if status == 202:
            self._acknowledge(said["request"]["id"])
            self._load.ids[name] = said["instance"]["id"]
        elif status == 409:
            status, said = await self._told("look", "GET", f"/v1/instances/{name}")
            if status == 200:
                self._load.ids[name] = said["id"]

    async def _ask(self, name: str, instance_id: str, operation: str, parameters: dict[str, Any]) -> None:
        keyed = self._chance.random() < _KEYED
        by_name = not keyed and self._chance.random() < 0.5
        path = f"/v1/instances/{name if by_name else instance_id}/requests"
        body = {"operation": operation, "parameters": parameters}
        key = f"{self._chance.getrandbits(128):032x}" if keyed else None
        status, said = await self._told("ask", "POST", path, body, key)
        if status == 404 or said.get("reason") == "deleted":
            self._load.ids[name] = None
        asked = self._admitted(status, said)
        if key is not None and asked is not None:
            status, said = await self._told("ask", "POST", path, body, key)
            if self._admitted(status, said) != asked:
                self._report.wrong.append(f"the key of {asked} was answered the second time with {status} {said}")

    def _admitted(self, status: int, said: dict[str, Any]) -> str | None:
        """The id of the request that was admitted, or None."""
        if said.get("disposition") == "admitted":
            request_id: str = said["request"]["id"]
            self._acknowledge(request_id)
            return request_id
        if status == 409:
            kind = str(said["type"]).rpartition(":")[2]
            self._report.reasons[said.get("reason") or kind] += 1
            if "reason" in said and not said.get("rule"):
                self._report.wrong.append(f"a refusal names no rule: {said}")
        return None

    def _acknowledge(self, request_id: str) -> None:
        self._report.acknowledged.append(request_id)
        self._load.recent.append(request_id)

    async def _look(self, name: str, instance_id: str) -> None:
        recent = self._load.recent
        paths = [f"/v1/instances/{name}", f"/v1/instances/{instance_id}/allowed", "/v1/instances?limit=20"]
        if recent:
            paths.append(f"/v1/requests/{self._chance.choice(recent)}")
        await self._told("look", "GET", self._chance.choice(paths))

    async def _told(
        self, kind: str, method: str, path: str, body: Any = None, key: str | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Ask, and keep what the answer was."""
        started = time.perf_counter()
        status, said = await self._connection.ask(method, path, body, key)
        report = self._report
        report.took_s.append(time.perf_counter() - started)
        report.requests += 1
        report.answers[f"{kind} {said.get('disposition') or said.get('outcome') or status}"] += 1
        if status not in _EXPECTED[kind]:
            report.wrong.append(f"{method} {path} {body}: {status} {said}")
        return status, said


class Connection:
    """One kept-alive connection, asked as plainly as can be, so that asking costs little."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str) -> None:
        self._reader = reader
        self._writer = writer
        self._head = f"HTTP/1.1\r\nHost: load\r\nAuthorization: Bearer {secret}\r\n"

    @classmethod
    async def open(cls, host: str, port: int, secret: str) -> Connection:
        return cls(*await asyncio.open_connection(host, port), secret)

    def close(self) -> None:
        self._writer.close()

    async def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of the answer. Raises `OSError` or `IncompleteReadError` if there is none."""
        sent = b"" if body is None else msgspec.json.encode(body)
        head = f"{method} {path} {self._head}Content-Length: {len(sent)}\r\n"
        if body is not None:
            head += "Content-Type: application/json\r\n"
        if key is not None:
            head += f"Idempotency-Key: {key}\r\n"
        self._writer.write(f"{head}\r\n".encode() + sent)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status = int(answer[9:12])
        text = await self._reader.readexactly(_length(answer))
        said: dict[str, Any] = msgspec.json.decode(text) if text else {}
        return status, said


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0
