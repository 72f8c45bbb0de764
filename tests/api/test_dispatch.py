"""Requests find their endpoint by path segments, and responses leave in one write."""

from __future__ import annotations

import asyncio
import re

import pytest
from starlette.routing import Match

from api.conftest import ApiServer
from interlock.api.app import ROUTES
from interlock.api.http.protocol import _GATHERED_BYTES_MAX, _GatheringTransport


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_path_has_the_endpoint_and_parameters_that_starlette_finds(api: ApiServer, route: object) -> None:
    assert isinstance(route, ROUTES[0].__class__)
    path = re.sub("{(.*?)}", r"a-\1", route.path)
    for method in (route.method, "HEAD") if route.method == "GET" else (route.method,):
        scope = {"type": "http", "path": path, "method": method, "headers": []}
        endpoint = api.app.find(scope)
        expected = next(
            found for found in (one.matches(dict(scope)) for one in api.app.routes) if found[0] is Match.FULL
        )
        assert endpoint is expected[1]["endpoint"]
        assert scope["path_params"] == expected[1]["path_params"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/instances"),
        ("GET", "/v1/instances/"),
        ("GET", "/v1/instances/{}/nothing"),
        ("GET", "/v1"),
        ("GET", "/v1/instances//requests"),
        ("POST", "/v1/instances/a/requests/"),
        ("GET", "//"),
    ],
)
async def test_everything_else_is_left_to_starlette(api: ApiServer, method: str, path: str) -> None:
    assert api.app.find({"type": "http", "path": path, "method": method, "headers": []}) is None


class Wire:
    """A transport that keeps each write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0


async def test_a_head_and_its_body_are_one_write() -> None:
    wire = Wire()
    transport = _GatheringTransport(wire, 1.0)  # type: ignore[arg-type]
    transport.write(b"head")
    transport.write(b"body")
    assert wire.writes == []
    await asyncio.sleep(0)
    assert wire.writes == [b"headbody"]


async def test_much_is_not_gathered_and_closing_writes_what_is_left() -> None:
    wire = Wire()
    transport = _GatheringTransport(wire, 1.0)  # type: ignore[arg-type]
    transport.write(b"x" * _GATHERED_BYTES_MAX)
    transport.write(b"y")
    assert wire.writes == [b"x" * _GATHERED_BYTES_MAX + b"y"]
    transport.write(b"last")
    transport.close()
    assert (wire.writes[1:], wire.closed) == ([b"last"], True)
