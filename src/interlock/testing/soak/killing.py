"""What is killed while the soak goes on: the server, and the agent of the other host, each at moments of its own."""

from __future__ import annotations

import random  # noqa: TID251 - the seed is an argument
import threading
import time
from typing import Final

from interlock.testing.real_agent import RealAgent
from interlock.testing.soak.book import Book
from interlock.testing.soak.ground import LEASE_MS, Ground

_LATE: Final = 0.4
"""How often an agent comes back only when its lease has run out."""


class Killing:
    """Kills with `kill -9` and starts again. `serving` is set while there is a server to ask."""

    def __init__(
        self, ground: Ground, book: Book, serving: threading.Event, over: threading.Event, every_s: float
    ) -> None:
        self._ground = ground
        self._book = book
        self._serving = serving
        self._over = over
        self._every_s = every_s

    def kill_server_until_over(self, seed: float) -> None:
        """Kill the server again and again, each time after about `every_s`, and once more at the end."""
        chance = random.Random(seed)  # noqa: S311 - not for secrets
        try:
            while not self._over.is_set():
                self._over.wait(self._every_s * (0.5 + chance.random()))  # how long it lives is what this is about
                self._serving.clear()
                self._ground.server.kill()
                self._book.count("kills of the server")
                begun = time.monotonic()
                self._ground.server.start()
                if time.monotonic() - begun > LEASE_MS / 1000:
                    self._book.count("servers that took longer to start than a lease")
                self._serving.set()
        except Exception as error:  # noqa: BLE001 - one that breaks must be seen
            self._book.complain(f"the server cannot be started: {error!r}")
            self._over.set()
        finally:
            self._serving.set()

    def kill_agent_until_over(self, agent: RealAgent, seed: float) -> None:
        """Kill the agent again and again; it comes back while its lease lasts, or too late."""
        chance = random.Random(seed)  # noqa: S311 - not for secrets
        try:
            while not self._over.wait(self._every_s * (0.5 + chance.random())):
                agent.kill()
                late = chance.random() < _LATE
                away_s = LEASE_MS / 1000 * (1.0 + chance.random() if late else 0.5 * chance.random())
                self._book.count(f"kills of the agent, which is away {'beyond' if late else 'within'} its lease")
                # How long it is away is what this is about; the end of the soak does not make it shorter.
                threading.Event().wait(away_s)
                agent.start()
        except Exception as error:  # noqa: BLE001 - one that breaks must be seen
            self._book.complain(f"the agent cannot be started: {error!r}")
            self._over.set()
