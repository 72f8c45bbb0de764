"""What is killed while the soak goes on: the server, and the agents of other hosts, each at moments of its own."""

from __future__ import annotations

import random
import threading
import time
from typing import Final

from soak.environment import LEASE_MS, Ground
from soak.identities import Contesting
from soak.report import Book

_LATE: Final = 0.4
"""How often an agent comes back only when its lease has run out."""
_CONTESTED: Final = 0.6
"""How often another identity wants a host's name instead."""


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
        chance = random.Random(seed)
        try:
            while not self._over.is_set():
                self._over.wait(self._every_s * (0.5 + chance.random()))  # how long it lives is what this is about
                with self._ground.steady:
                    self._kill_server()
        except Exception as error:  # noqa: BLE001 - one that breaks must be seen
            self._book.complain(f"the server cannot be started: {error!r}")
            self._over.set()
        finally:
            self._serving.set()

    def _kill_server(self) -> None:
        self._serving.clear()
        self._ground.server.kill()
        self._book.count("kills of the server")
        begun = time.monotonic()
        self._ground.server.start()
        if time.monotonic() - begun > LEASE_MS / 1000:
            self._book.count("servers that took longer to start than a lease")
        self._serving.set()

    def kill_agents_until_over(self, seed: float, contesting: Contesting | None) -> None:
        """Kill one agent after the other; it comes back while its lease lasts, or too late. Now and then another
        identity wants its name instead, unless `contesting` is None.
        """
        chance = random.Random(seed)
        try:
            while not self._over.wait(self._every_s * (0.5 + chance.random())):
                if contesting is not None and chance.random() < _CONTESTED:
                    contesting.contest(chance)
                else:
                    self._kill_agent(chance)
        except Exception as error:  # noqa: BLE001 - one that breaks must be seen
            self._book.complain(f"the agent cannot be started: {error!r}")
            self._over.set()

    def _kill_agent(self, chance: random.Random) -> None:
        agent = chance.choice(list(self._ground.agents.values()))
        agent.kill()
        late = chance.random() < _LATE
        away_s = LEASE_MS / 1000 * (1.0 + chance.random() if late else 0.5 * chance.random())
        self._book.count(f"kills of an agent, which is away {'beyond' if late else 'within'} its lease")
        # How long it is away is what this is about; the end of the soak does not make it shorter.
        threading.Event().wait(away_s)
        agent.start()
