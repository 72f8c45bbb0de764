from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cli.scripted_server import ScriptedServer
from cli.wire_samples import NOW
from interlock.__main__ import root
from interlock.cli.application import run


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Interlock = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer(NOW)
    yield scripted
    scripted.close()


@pytest.fixture
def folder(tmp_path: Path, server: ScriptedServer) -> Path:
    """A data folder in which the scripted server has left its URL and its token."""
    (tmp_path / "server.json").write_text(json.dumps({"url": server.url, "pid": 1}))
    (tmp_path / "admin.token").write_text("ilk_secret\n")
    return tmp_path


@pytest.fixture
def interlock(folder: Path, capsys: pytest.CaptureFixture[str]) -> Interlock:
    """Run a command line in this process, against the scripted server."""

    def call(*arguments: str, **environment: str) -> Ran:
        code = run(root(), arguments, {"INTERLOCK_DATA_DIR": str(folder), **environment})
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call
