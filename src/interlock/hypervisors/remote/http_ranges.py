"""The server's files over HTTP ranges: GET with Range, PUT with Content-Range, with the agent's token."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import httpx
import msgspec

from interlock.core.errors import OperationRejected

_CONNECT_TIMEOUT_S: Final = 10.0
_TIMEOUT_S: Final = 30.0
"""How long a connection may make no progress, in seconds."""
_RETRIED: Final = frozenset({408, 429, 502, 503, 504})
"""Statuses after which a retry may succeed."""
_OK: Final = 200
_PARTIAL: Final = 206
_NO_CONTENT: Final = 204
_PROBLEM_BYTES_MAX: Final = 1 << 16


class _Problem(msgspec.Struct):
    detail: str = "No reason given."
    remedy: str | None = None


class HttpRanges:
    """Implements `range_transfer.RangeServer`.

    Args:
        server: the server's URL.
        name: the host's name.
    """

    def __init__(self, server: str, name: str) -> None:
        self._url = f"{server.rstrip('/')}/v1/hosts/{name}/files/"
        self._client: httpx.AsyncClient | None = None

    async def open(self, tls: ssl.SSLContext | None, token: str) -> None:
        """Use these TLS settings (None without TLS) and this token from now on. Closes earlier connections."""
        await self.close()
        self._client = httpx.AsyncClient(
            verify=tls or False,
            trust_env=False,
            timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            headers={
                "Authorization": f"Bearer {token}",
                "Accept-Encoding": "identity",
                "User-Agent": "interlock",
            },
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _stream(self, method: str, transfer: str, **request: Any) -> AbstractAsyncContextManager[httpx.Response]:
        if self._client is None:
            raise ConnectionError("not connected")
        return self._client.stream(method, self._url + transfer, **request)

    @asynccontextmanager
    async def download(self, transfer: str, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open the bytes of the file from `start` to before `end`. Raises `ConnectionError`, `OperationRejected`."""
        try:
            async with self._stream("GET", transfer, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
                # A server may send the whole file instead of a range that begins with it.
                await _check(response, (_PARTIAL,) if start else (_OK, _PARTIAL))
                yield response.aiter_bytes()
        except httpx.TransportError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error

    async def upload(self, transfer: str, offset: int, piece: bytes) -> None:
        """Write a range of the file. Raises `ConnectionError`, `OperationRejected`."""
        headers = {"Content-Range": f"bytes {offset}-{offset + len(piece) - 1}/*"}
        try:
            async with self._stream("PUT", transfer, content=piece, headers=headers) as response:
                await _check(response, (_NO_CONTENT,))
        except httpx.TransportError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error


async def _check(response: httpx.Response, expected: tuple[int, ...]) -> None:
    status = response.status_code
    if status in expected:
        return
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > _PROBLEM_BYTES_MAX:
            break
    try:
        problem = msgspec.json.decode(bytes(content), type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    if status in _RETRIED:
        raise ConnectionError(f"HTTP status {status}: {problem.detail}")
    raise OperationRejected(f"The server rejected the transfer ({status}): {problem.detail}", remedy=problem.remedy)
