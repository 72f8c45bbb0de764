"""A server whose wall clock is wrong by what a file says at the moment, so that clocks can jump under a real process.

`python tests/processes/wrong_clock_server.py FILE` is `interlock serve`; FILE has milliseconds, as `-3600000`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from interlock import server
from interlock.config_file import load
from interlock.service import server_log
from interlock.stores.clock import SystemClock


class WrongClock(SystemClock):
    """The machine's clocks, where people's is wrong."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def wall_ms(self) -> int:
        return super().wall_ms() + int(self._file.read_text(encoding="ascii"))


def main(arguments: Sequence[str]) -> None:
    """Serve with the configuration of the environment."""
    config = load(None, os.environ)
    server_log.configure_logging(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.Server(config, clock=WrongClock(Path(arguments[0]))).serve())


if __name__ == "__main__":
    main(sys.argv[1:])
