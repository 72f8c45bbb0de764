"""A guest's memory for a debugger, from the command line, on a real server with simulated guests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.test_real_server import Serving


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    one = Serving(tmp_path / "data")
    one.start()
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1024 * 1024))
    one.json("image", "add", "empty", "--disk", str(disk), "--format", "raw")
    yield one
    if one.process.poll() is None:
        one.stop()


def test_a_dump_is_made_downloaded_listed_and_gone_with_its_vm(serving: Serving, tmp_path: Path) -> None:
    assert serving.run("vm", "create", "demo", "--image", "empty", "--wait").returncode == 0
    target = tmp_path / "demo.kdump"
    dumped = serving.run("vm", "dump", "demo", "--output", str(target))
    assert dumped.returncode == 0, dumped.stderr
    assert target.read_bytes().startswith(b"KDUMP   ")
    assert target.stat().st_mode & 0o777 == 0o600
    assert serving.run("vm", "dump", "demo", "--output", str(target)).returncode == 2, "nothing is written over"
    found: Any = serving.json("vm", "dumps", "demo")["items"]
    (dump,) = found
    again = tmp_path / "again.kdump"
    assert serving.run("vm", "dump", "demo", "--id", dump["id"], "--output", str(again)).returncode == 0
    assert again.read_bytes() == target.read_bytes()
    assert "demo" not in serving.run("vm", "dumps", "demo").stderr
    assert serving.run("vm", "dumps", "demo", "--delete", dump["id"]).returncode == 0
    assert serving.json("vm", "dumps", "demo")["items"] == []
    assert serving.run("vm", "dumps", "demo", "--delete", dump["id"]).returncode == 4
    assert serving.run("vm", "dump", "demo", "--output", str(tmp_path / "third.kdump")).returncode == 0
    assert serving.run("vm", "delete", "demo", "--yes", "--wait").returncode == 0
    assert not any((serving.folder / "dumps").iterdir())
