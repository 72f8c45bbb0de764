"""Two agents that greet the server for one host in the same moment."""

from __future__ import annotations

import asyncio

import msgspec

from in_process.in_memory_agent import LinkEnd, linked_ends
from in_process.virtual_time import run_in_virtual_time
from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.protocol import CaughtUp, Hello, Message, Ping, Pong, Welcome
from interlock.ports import Host, HostIdentity


async def converse(link: LinkEnd) -> None:
    """An agent that is welcomed, and answers every ping."""
    exchange = Exchange(link)
    assert isinstance(await exchange.receive(), Welcome)

    def answer(message: Message) -> None:
        if isinstance(message, Ping):
            exchange.post(Pong(number=message.number))

    exchange.post(CaughtUp())
    await exchange.run(answer)


async def greeted(identity: str) -> tuple[LinkEnd, LinkEnd]:
    agents, servers = linked_ends()
    hello = Hello(name="north", log=identity, identity=HostIdentity(id=identity))
    await agents.send(msgspec.msgpack.encode(hello))
    return agents, servers


def test_an_agent_is_found_connected_as_soon_as_it_is_admitted() -> None:
    async def main() -> None:
        adapter = RemoteHypervisor("north", lease_ms=0, silence_ms=30_000, now_ms=lambda: 0, renewed=lambda _: None)
        found: list[bool] = []

        async def admit(_: Host) -> None:
            found.append(await adapter.answers())

        async def heard(_: Host) -> None:
            return

        first, second = await greeted("first"), await greeted("second")
        serving = [asyncio.create_task(adapter.serve(servers, admit, heard)) for _, servers in (first, second)]
        agent = asyncio.create_task(converse(first[0]))
        while len(found) < 2:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)
        assert found == [False, True]
        await adapter.close()
        await asyncio.gather(agent, *serving, return_exceptions=True)

    run_in_virtual_time(main())


def test_the_connection_of_an_agent_that_is_replaced_before_it_was_welcomed_is_closed() -> None:
    async def main() -> None:
        adapter = RemoteHypervisor("north", lease_ms=0, silence_ms=30_000, now_ms=lambda: 0, renewed=lambda _: None)
        admitted = asyncio.Event()

        async def admit(_: Host) -> None:
            if admitted.is_set():
                adapter.disconnect()
            admitted.set()

        async def heard(_: Host) -> None:
            return

        first, second = await greeted("first"), await greeted("second")
        serving = [asyncio.create_task(adapter.serve(servers, admit, heard)) for _, servers in (first, second)]
        await serving[0]
        async with asyncio.timeout(1):
            try:
                while True:
                    await first[0].receive()
            except ConnectionError:
                pass
        await adapter.close()
        await asyncio.gather(*serving, return_exceptions=True)

    run_in_virtual_time(main())
