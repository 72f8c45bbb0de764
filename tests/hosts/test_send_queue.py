"""What waits to be sent to the other side: bounded, in order, and never before a lease."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from interlock.hypervisors.remote.exchange import QUEUE_BYTES_MAX, Exchange, SendQueue
from interlock.hypervisors.remote.protocol import (
    FRAME_BYTES_MAX,
    Call,
    CallResult,
    LeaseGranted,
    Message,
    Ping,
    Pong,
    Renew,
    Superseded,
    TransferMessage,
    Welcome,
    decode,
    encode,
    packed,
)
from interlock.hypervisors.remote.reconnect import WebSocketLink

BULK = 1 << 20


def result(number: int, size: int = 10) -> CallResult:
    return CallResult(number=number, value=packed(bytes(size)))


async def drained(queue: SendQueue, count: int) -> list[Message]:
    return [decode(await queue.get()) for _ in range(count)]


@pytest.mark.parametrize(
    "urgent", [Welcome(lease_ms=0), Renew(number=1), LeaseGranted(number=1), Ping(number=1), Pong(number=1)]
)
async def test_what_a_lease_depends_on_is_sent_before_bulk_data(urgent: Message) -> None:
    queue = SendQueue()
    for number in range(8):
        queue.put(result(number, BULK))
    queue.put(urgent)
    assert decode(await queue.get()) == urgent
    assert [one.number for one in await drained(queue, 8) if isinstance(one, CallResult)] == list(range(8))


async def test_a_fence_is_sent_before_the_calls_of_its_holder() -> None:
    queue = SendQueue()
    fence = Superseded(instance_id="one", fence=2)
    call = Call(number=1, method="pause", instance_id="one", fence=2, arguments=packed(()))
    for message in (fence, call, result(7)):
        queue.put(message)
    assert await drained(queue, 3) == [fence, call, result(7)]


async def test_the_progress_of_a_call_that_was_not_sent_is_replaced() -> None:
    queue = SendQueue()
    for number, done in itertools.product((1, 2), range(10_000)):
        queue.put(TransferMessage(number=number, done=done))
    queue.put(result(1))
    expected = [TransferMessage(number=number, done=9_999) for number in (1, 2)]
    assert await drained(queue, 3) == [*expected, result(1)]
    queue.put(TransferMessage(number=1, done=0))
    assert await drained(queue, 1) == [TransferMessage(number=1, done=0)]


async def test_a_queue_that_is_full_takes_nothing_more_and_says_so() -> None:
    message = result(1, 100)
    size = len(encode(message))
    queue = SendQueue(bytes_max=3 * size)
    for _ in range(3):
        queue.put(message)
    assert not queue.full.is_set()
    assert await drained(queue, 1) == [message]
    queue.put(message)
    assert not queue.full.is_set(), "what was sent makes space"
    queue.put(message)
    assert queue.full.is_set()


async def test_a_peer_that_stops_reading_is_disconnected_with_the_reason() -> None:
    """Over a real connection, whose buffers are filled first."""
    over = asyncio.Event()

    async def stalled(connection: ServerConnection) -> None:
        await over.wait()
        connection.transport.abort()

    async with serve(stalled, "127.0.0.1", 0, max_size=FRAME_BYTES_MAX, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        connection = await connect(f"ws://127.0.0.1:{port}", compression=None)
        try:
            exchange = Exchange(WebSocketLink(connection))
            running = asyncio.create_task(exchange.run(lambda _: None))
            for number in range(2 * QUEUE_BYTES_MAX // BULK):
                exchange.post(result(number, BULK))
                await asyncio.sleep(0)
            with pytest.raises(ConnectionError, match="Send queue full: 32 MiB were not read"):
                await running
        finally:
            over.set()


async def test_a_renewal_overtakes_what_waits_for_a_slow_peer() -> None:
    reads, sent = asyncio.Event(), asyncio.Queue[Message]()

    class SlowLink:
        async def send(self, frame: bytes) -> None:
            sent.put_nowait(decode(frame))
            await reads.wait()

        async def receive(self) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

        async def close(self, reason: str = "") -> None:
            return

    exchange = Exchange(SlowLink())
    running = asyncio.create_task(exchange.run(lambda _: None))
    for number in range(20):
        exchange.post(result(number, BULK))
    assert await sent.get() == result(0, BULK)
    exchange.post(Renew(number=1))
    reads.set()
    assert await sent.get() == Renew(number=1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
