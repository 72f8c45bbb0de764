"""An agent that its server does not want: it asks again, and not all the time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from interlock import agent as hosting
from interlock.agent import Contact, HostAgent
from interlock.config import Config
from interlock.core.errors import InterlockError
from interlock.ports import Hypervisor

TIMES = 11


async def test_an_agent_that_is_turned_away_asks_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def reached(*_: object) -> None:
        """The server can be reached, each time."""

    async def turned_away(*_: object) -> None:
        raise InterlockError("The agent speaks another language than this server.")

    async def noted(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == TIMES:
            raise asyncio.CancelledError

    contact = Contact(server="http://127.0.0.1:7420", token="t", name="north")
    agent = HostAgent(Config(data_dir=str(tmp_path)), contact, cast("Hypervisor", cast("Any", None)))
    monkeypatch.setattr(hosting, "dial", reached)
    monkeypatch.setattr(agent._service, "run", turned_away)
    monkeypatch.setattr(asyncio, "sleep", noted)
    with pytest.raises(asyncio.CancelledError):
        await agent._serve()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60.0, 60.0]


async def test_an_agent_uses_the_secret_that_its_file_has_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends when the former secret of a rotated token does; the next one must not need a restart."""
    file = tmp_path / "token"
    used: list[str] = []

    async def refused(_server: str, _name: str, secret: str, *_: object) -> None:
        used.append(secret)
        raise ConnectionError("the former secret has expired")

    async def rotated(_pause_s: float) -> None:
        match len(used):
            case 1:
                file.unlink()  # whoever writes it anew may be between two steps
                used.append("none")
            case 2:
                file.write_text("second\n")
            case _:
                raise asyncio.CancelledError

    file.write_text("first\n")
    contact = Contact(server="http://127.0.0.1:7420", token="first", token_file=file, name="north")
    agent = HostAgent(Config(data_dir=str(tmp_path)), contact, cast("Hypervisor", cast("Any", None)))
    monkeypatch.setattr(hosting, "dial", refused)
    monkeypatch.setattr(asyncio, "sleep", rotated)
    with pytest.raises(asyncio.CancelledError):
        await agent._serve()
    assert used == ["first", "none", "second"]
    assert agent._ranges._client is not None
    assert agent._ranges._client.headers["authorization"] == "Bearer second"
    await agent._ranges.close()
