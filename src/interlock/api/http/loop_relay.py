"""An ASGI application that runs another one in the event loop of another thread.

The connections of agents are served in a thread of their own, and what they ask for in the loop of the API. Messages of
a WebSocket are received in the connection's thread at once, however busy the other loop is, and some are answered
there, see `ports.hosts.ThreadedLink`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Reply = Callable[[bytes], bytes | None]

REPLY_AT_ONCE: Final = "interlock.reply_at_once"
"""Key in a WebSocket's scope: a function that takes the `Reply`."""
WAITING_BYTES_MAX: Final = 64 << 20
"""How much may have been received that the application has not taken. Beyond it nothing more is received."""


class LoopRelay:
    """The application, for connections of another event loop than its own.

    Args:
        application: an ASGI application.
        loop: in which it runs.
    """

    def __init__(self, application: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._application = application
        self._loop = loop

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        connection = _Connection(self._loop, receive, send)
        if scope["type"] == "websocket":
            scope[REPLY_AT_ONCE] = connection.set_reply
            receiving = asyncio.create_task(connection.pump(), name="receive from an agent")
            relayed = connection.next_message
        else:
            receiving, relayed = None, connection.receive
        try:
            running = self._application(scope, relayed, connection.send)
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(running, self._loop))
        finally:
            if receiving is not None:
                receiving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await receiving


class _Connection:
    """One connection: `receive` and `send` are of the loop that it is made in, the rest is for the application."""

    def __init__(self, application_loop: asyncio.AbstractEventLoop, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        self._application_loop = application_loop
        self._receive = receive
        self._send = send
        self._reply: Reply | None = None
        self._messages: asyncio.Queue[tuple[Any, int]] = asyncio.Queue()
        """Only of the application's loop, with the size of each message in bytes."""
        self._waiting_bytes = 0
        self._taken = asyncio.Event()

    def set_reply(self, reply: Reply) -> None:
        self._reply = reply

    async def pump(self) -> None:
        """Receive until the client disconnects; answer what can be answered here, and pass all of it on."""
        while True:
            message = await self._receive()
            frame: bytes | None = message.get("bytes")
            answer = None if frame is None or self._reply is None else self._reply(frame)
            if answer is not None:
                with contextlib.suppress(OSError, RuntimeError):  # closed meanwhile, which is received next
                    await self._send({"type": "websocket.send", "bytes": answer})
            size = 0 if frame is None else len(frame)
            self._waiting_bytes += size
            self._application_loop.call_soon_threadsafe(self._messages.put_nowait, (message, size))
            if message["type"] == "websocket.disconnect":
                return
            while self._waiting_bytes > WAITING_BYTES_MAX:
                self._taken.clear()
                await self._taken.wait()

    def _take(self, size: int) -> None:
        self._waiting_bytes -= size
        self._taken.set()

    async def next_message(self) -> Any:
        """Return the next message that `pump` has received."""
        message, size = await self._messages.get()
        if size:
            self._loop.call_soon_threadsafe(self._take, size)
        return message

    async def receive(self) -> Any:
        """Receive in the connection's loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_of(self._receive()), self._loop))

    async def send(self, message: Any) -> None:
        """Send in the connection's loop. Raises what that raises."""
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_of(self._send(message)), self._loop))


async def _of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
