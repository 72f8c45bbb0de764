"""A server that is killed at any moment loses nothing and leaves nothing stuck: hundreds of rounds, simulated guests.

Real processes and a real SIGKILL, on a real SQLite file; only the guests are simulated, and theirs is a file too.
"""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from processes.preloaded import fork_server
from recovery import simulated_server
from tiers import tier
from waiting import PATIENCE_S

ROUNDS = tier(40, 400)


def test_every_acknowledged_request_ends_and_nothing_is_stuck_after_each_kill(tmp_path: Path) -> None:
    """Laws 3, 5 and 9, and that record and host agree after each restart."""
    context = fork_server()
    chance = random.Random(20_26)
    waiting: list[str] = []
    for number in range(ROUNDS):
        here, there = context.Pipe(duplex=False)
        server = context.Process(target=simulated_server.run, args=(tmp_path, number, waiting, there))
        server.start()
        there.close()
        try:
            ends = _next(here, "ends")
            assert None not in ends, f"round {number}: an acknowledged request is not in the record"
            unfinished = [end for end in ends if end[1] in {"queued", "in_flight", "unknown"}]
            assert not unfinished, f"round {number}: {unfinished}"
            assert _next(here, "differences") == [], f"round {number}"
            # Every other server lives until it has acknowledged something, however slow it is.
            assert number % 2 or here.poll(PATIENCE_S), f"round {number}: nothing was acknowledged"
            time.sleep(chance.random() * 0.06)  # how long it lives after that is what the round is about
        finally:
            os.kill(server.pid or 0, signal.SIGKILL)
            server.join(PATIENCE_S)
        waiting = _acknowledged(here)


def _next(pipe: Connection, kind: str) -> Any:
    assert pipe.poll(PATIENCE_S), f"no {kind} within {PATIENCE_S} s"
    told, what = pipe.recv()
    assert told == kind
    return what


def _acknowledged(pipe: Connection) -> list[str]:
    """What the dead server had told before it died."""
    told = []
    try:
        while True:
            told.append(pipe.recv()[1])
    except (EOFError, OSError):
        return told
