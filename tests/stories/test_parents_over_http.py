"""Both parents' examples, as written, through the HTTP door: every `*.txt` in this folder is played and must hold.

A transcript is a text file. `policy NAME` comes first; `METHOD PATH BODY` asks, and the indented line after it says the
status and the fields of the answer. `allowed` reads what is allowed now; the indented lines after it say which
operations are denied or admitted, or admitted by the policy and refused for what the VM is `lacking`; `*` being those
not named. `until FIELD=VALUE` waits for the VM to come there.
`block METHOD` holds every such call on the host until `release METHOD`, and `advance MS` moves the store's clock, which
stands still otherwise. `#` begins a comment.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from in_process.embedded import IMAGE, QUICK
from in_process.virtual_time import OneClock
from interlock.config import Config
from interlock.core.operations import Operation
from interlock.core.preconditions import RULE
from interlock.core.records import Spec
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import Permit
from interlock.server import Server
from waiting import PATIENCE_S

FOLDER = Path(__file__).parent
TRANSCRIPTS = sorted(FOLDER.glob("*.txt"))


class StillClock(OneClock):
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self._now_ms = 1_700_000_000_000

    def now_ms(self) -> int:
        return self._now_ms

    def advance(self, by_ms: int) -> None:
        self._now_ms += by_ms


class GatedHypervisor(SimulatedHypervisor):
    """A simulated hypervisor some of whose calls wait until they are let through."""

    def __init__(self, host: SimulatedHost) -> None:
        super().__init__(host)
        self._gates = {name: asyncio.Event() for name in ("power_on", "reset", "ask_shutdown")}
        for name in self._gates:
            self.release(name)

    def block(self, name: str) -> None:
        self._gates[name].clear()

    def release(self, name: str) -> None:
        self._gates[name].set()

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        await self._gates["power_on"].wait()
        await super().power_on(permit, instance_id, spec)

    async def reset(self, permit: Permit, instance_id: str) -> None:
        await self._gates["reset"].wait()
        await super().reset(permit, instance_id)

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        await self._gates["ask_shutdown"].wait()
        await super().ask_shutdown(permit, instance_id)


class Player:
    """Plays one transcript against a server of its own."""

    def __init__(self, folder: Path, policy: str) -> None:
        self.clock = StillClock()
        self.hypervisor = GatedHypervisor(SimulatedHost())
        config = Config(data_dir=str(folder), hypervisor="simulated", host="here", policy=policy, driver=QUICK)
        self.server = Server(config, self.hypervisor, self.clock)
        self.said: Any = None
        self.status = 0
        self.checked = 0

    async def open(self) -> None:
        await self.server.open()
        await self.server.store.images.put(IMAGE)
        token = (self.server.folder / "admin.token").read_text().strip()
        transport = httpx.ASGITransport(self.server.app())
        headers = {"Authorization": f"Bearer {token}"}
        self.client = httpx.AsyncClient(transport=transport, base_url="http://interlock.test", headers=headers)

    async def close(self) -> None:
        await self.client.aclose()
        await self.server.close()

    async def play(self, line: str) -> None:
        if line.startswith("  "):
            self._check(line.split())
            return
        verb, _, rest = line.partition(" ")
        match verb:
            case "GET" | "POST":
                path, _, body = rest.partition(" ")
                answer = await self.client.request(verb, path, json=json.loads(body) if body else None)
                self.status, self.said = answer.status_code, answer.json()
            case "allowed":
                answer = await self.client.get("/v1/instances/vm/allowed")
                operations = answer.json()["operations"]
                dispositions = {one["operation"]: one["disposition"] for one in operations}
                dispositions |= {one["operation"]: "lacking" for one in operations if one["rule"] == RULE}
                assert set(dispositions) == set(Operation)
                self.status, self.said = 0, dispositions
            case "until":
                name, _, value = rest.partition("=")
                await self._until(name, value)
            case "block":
                self.hypervisor.block(rest)
            case "release":
                self.hypervisor.release(rest)
            case "advance":
                self.clock.advance(int(rest))
            case _:
                raise AssertionError(f"unknown line: {line}")

    async def _until(self, name: str, value: str) -> None:
        generation = 0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                query: dict[str, str | int] = {"after_generation": generation, "wait": "20s"}
                found = (await self.client.get("/v1/instances/vm", params=query)).json()
                if found[name] == value:
                    return
                generation = found["generation"]

    def _check(self, expected: list[str]) -> None:
        self.checked += 1
        if self.status == 0:
            verdict, *named = expected
            if named == ["*"]:
                assert set(self.said.values()) == {verdict}, self.said
                return
            for operation in named:
                assert self.said.pop(operation) == verdict, operation
            return
        assert self.status == int(expected[0]), self.said
        for one in expected[1:]:
            field, _, value = one.partition("=")
            assert str(self.said[field]) == value, (field, self.said)


@pytest.fixture(params=TRANSCRIPTS, ids=lambda path: path.stem)
async def transcript(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Player, list[tuple[int, str]]]]:
    # The examples are about rules, so a rule is asked also about what this driver does not perform.
    monkeypatch.setattr("interlock.server.PERFORMS", frozenset(Operation))
    lines = [(number, line.rstrip()) for number, line in enumerate(request.param.read_text().splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    (_, first), *rest = lines
    player = Player(tmp_path / "data", first.removeprefix("policy "))
    await player.open()
    yield player, rest
    await player.close()


async def test_a_parents_example_holds_through_http(transcript: tuple[Player, list[tuple[int, str]]]) -> None:
    player, lines = transcript
    for number, line in lines:
        try:
            await player.play(line)
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"line {number}: {line}\n{error}") from error
    assert player.checked >= 8


def test_both_parents_have_their_transcript() -> None:
    assert {path.stem for path in TRANSCRIPTS} == {"propolis", "take2"}
