"""Token revocation: open requests, streams and WebSockets are closed as soon as their token is no longer valid."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.requests import ClientDisconnect

from interlock.service.auth import Use
from interlock.service.load_limits import waiting

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

REVOKED: Final = "The access token was deleted, rotated or has expired."
_DISCONNECTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "http": {"type": "http.disconnect"},
    "websocket": {"type": "websocket.disconnect", "code": 4401, "reason": REVOKED},
}


def revocable_receive(use: Use, scope: Any, receive: Receive) -> Receive:
    """Wrap the ASGI `receive` of a connection: it returns a disconnect as soon as the token is not valid."""
    disconnect = _DISCONNECTS[scope["type"]]

    async def receive_unless_revoked() -> Any:
        task = asyncio.current_task()
        if use.revoked or task is None:
            return disconnect
        use.waiting.add(task)
        try:
            with waiting():
                return await receive()
        except asyncio.CancelledError:
            # Another task may have cancelled it, instead of or in addition to the revocation.
            if not use.revoked or task.uncancel():
                raise
            return disconnect
        finally:
            use.waiting.discard(task)

    return receive_unless_revoked


class RevocableSend:
    """Wraps the ASGI `send` of an HTTP request: a response that has started is aborted when the token is
    no longer valid.
    """

    def __init__(self, send: Send, use: Use) -> None:
        self._send = send
        self._use = use
        self._reports_revocation = False
        """Whether the token became invalid before the response started, so that the response is the 401."""
        self._open = False
        """Whether the response has started and is not complete."""
        self._has_length = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._reports_revocation = self._use.revoked
            self._has_length = any(name == b"content-length" for name, _ in message["headers"])
        elif self._use.revoked and not self._reports_revocation:
            raise ClientDisconnect
        await self._send(message)
        self._open = message["type"] != "http.response.body" or message.get("more_body", False)

    async def finish(self) -> None:
        """End an aborted response; with a Content-Length, the HTTP server closes the connection instead."""
        if self._open and not self._has_length:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
