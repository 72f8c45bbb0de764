"""One server with real guests for all the proofs of a test process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from operation_tests.run import clear
from operation_tests.stage import Stage


@pytest.fixture(scope="session")
def theatre() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="interlock-proof-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        stage = Stage(folder)
        stage.open()
        try:
            yield stage
        finally:
            stage.close()


@pytest.fixture
def stage(theatre: Stage) -> Iterator[Stage]:
    """The stage, cleared when a proof is over; one whose server died there is started again."""
    yield theatre
    theatre.server.kill()
    theatre.server.start()
    clear(theatre)
