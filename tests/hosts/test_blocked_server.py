"""The connections of agents have a thread of their own: an event loop that is blocked costs no host its lease."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.trusting_verifier import TrustingProver
from interlock.config import Config, DriverConfig, HostsConfig
from interlock.core.roles import Role
from interlock.hypervisors.remote.agent_service import AgentService
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.protocol import Renew, Welcome
from interlock.hypervisors.remote.reconnect import dial
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import HostState
from interlock.server import Server
from interlock.service.auth import Caller
from waiting import eventually

LEASE_MS, MARGIN_MS = 800, 100
ADMIN = Caller(token_id="operator", name="operator", role=Role.ADMIN, project="default")


class Agent:
    """An agent in a thread of its own, which renews its lease three times within it."""

    def __init__(self, url: str, secret: str, folder: Path) -> None:
        self._url, self._secret, self._folder = url, secret, folder
        self.granted_s: list[float] = []
        self.connections = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    async def stop(self) -> None:
        self._stopping.set()
        await asyncio.to_thread(self._thread.join)

    async def _run(self) -> None:
        service = AgentService("north", SimulatedHypervisor(SimulatedHost()), self._folder)
        await service.open()
        while not self._stopping.is_set():
            link = await dial(self._url, "north", self._secret)
            self.connections += 1
            renewing: list[asyncio.Task[None]] = []

            def welcomed(exchange: Exchange, _: Welcome, renewing: list[asyncio.Task[None]] = renewing) -> None:
                renewing.append(asyncio.create_task(self._renew(exchange)))

            running = asyncio.create_task(
                service.run(link, welcomed, lambda _: self.granted_s.append(time.monotonic()))
            )
            while not running.done() and not self._stopping.is_set():
                await asyncio.wait({running}, timeout=0.05)
            for task in (running, *renewing):
                task.cancel()
            await asyncio.wait({running, *renewing})
            with contextlib.suppress(asyncio.CancelledError):
                running.exception()
            await link.close()
        await service.close()

    async def _renew(self, exchange: Exchange) -> None:
        number = 0
        while True:
            number += 1
            exchange.post(Renew(number=number))
            await asyncio.sleep(LEASE_MS / 3000)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    config = Config(
        data_dir=str(tmp_path / "here"),
        listen_port=0,
        hypervisor="simulated",
        host="here",
        driver=DriverConfig(drain_ms=1_000),
        hosts=HostsConfig(lease_ms=LEASE_MS, lease_margin_ms=MARGIN_MS),
    )
    made = Server(config, prover=TrustingProver())
    started = asyncio.Event()
    serving = asyncio.create_task(made.serve(started))
    await started.wait()
    yield made
    made.stop()
    await serving


@pytest.fixture
async def agent(server: Server, tmp_path: Path) -> AsyncIterator[Agent]:
    _, secret = await server.tokens.make(ADMIN, "north", Role.AGENT, "default", "north")
    made = Agent(server.url, secret, tmp_path / "north")
    await eventually(lambda: server.hosts.linked("north") and "north" in server.hosts and bool(made.granted_s))
    yield made
    await made.stop()


async def test_a_host_keeps_its_lease_while_the_server_is_blocked_for_longer_than_that(
    server: Server, agent: Agent
) -> None:
    blocked_s = 2.5 * (LEASE_MS + MARGIN_MS) / 1000
    began_s = time.monotonic()
    time.sleep(blocked_s)  # noqa: ASYNC251 - it must block
    await asyncio.sleep(0.1)  # whatever is due now is done
    during = [at_s for at_s in agent.granted_s if began_s < at_s < began_s + blocked_s]
    gaps = [later - earlier for earlier, later in zip([began_s, *during], [*during, began_s + blocked_s], strict=True)]
    assert max(gaps) < LEASE_MS / 1000, "the agent would have ended its guests"
    host = server.leases.host("north")
    assert (host.state, [event.kind for event in host.history]) == (HostState.UP, ["joined"])
    assert agent.connections == 1
