"""A server that kills itself in a phase of an operation, so that what a crash there leads to can be seen.

`python tests/processes/crash_injection.py PHASE:MOMENT` is `interlock serve`, until a request is in PHASE.
The moments are `begun` (the phase is kept, nothing of it was done), `amid` (its first effect is about to be followed by
another; `amid:N`: N - 1 of them are) and `done` (what it does was done, and what follows is not kept). The end is a
SIGKILL: nothing is tidied up.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

import uvloop

from interlock import server
from interlock.config_file import load
from interlock.driver.operation_context import FencePermit, OperationContext
from interlock.driver.worker import Worker
from interlock.service import server_log

MOMENTS: Final = ("begun", "amid", "done")
_AMID_CHECKS: Final = 2
"""A permit is checked before each effect, so that at the second check one effect has been."""


class Death:
    """Where the process is to die, and how near it is."""

    def __init__(self, phase: str, moment: str, check: int = _AMID_CHECKS) -> None:
        self._phase = phase
        self._moment = moment
        self._last_check = check
        self._works: dict[str, OperationContext] = {}
        self._checks = 0

    def attend(self, work: OperationContext) -> None:
        """Take note that a request is being served."""
        self._works[work.id] = work

    def at(self, work: OperationContext, moment: str) -> None:
        """Die if the request is in that phase and this is the moment."""
        if moment == self._moment and work.request.phase == self._phase:
            _die()

    def effect(self, instance_id: str) -> None:
        """Note that something is about to be done to an instance."""
        work = self._works.get(instance_id)
        if self._moment == "amid" and work is not None and work.request.phase == self._phase:
            self._checks += 1
            if self._checks == self._last_check:
                _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(death: Death) -> None:
    """Have every worker of this process tell `death` how far it is."""
    serve, finish, report, check = Worker._serve, Worker._finish, OperationContext._report, FencePermit.check

    async def dying_serve(self: Worker) -> None:
        death.attend(self.work)
        death.at(self.work, "begun")
        await serve(self)

    async def dying_finish(self: Worker, *arguments: Any, **more: Any) -> None:
        death.at(self.work, "done")
        await finish(self, *arguments, **more)

    async def dying_report(self: OperationContext, phase: str | None = None, **news: Any) -> None:
        if phase is not None:
            death.at(self, "done")
        await report(self, phase=phase, **news)
        if phase is not None:
            death.at(self, "begun")

    def dying_check(self: FencePermit) -> None:
        death.effect(self._instance_id)
        check(self)

    for owner, name, dying in (
        (Worker, "_serve", dying_serve),
        (Worker, "_finish", dying_finish),
        (OperationContext, "_report", dying_report),
        (FencePermit, "check", dying_check),
    ):
        setattr(owner, name, dying)


def main(arguments: Sequence[str]) -> None:
    """Serve with the configuration of the environment, to die where the argument says."""
    phase, _, word = arguments[0].partition(":")
    moment, _, check = word.partition(":")
    if moment not in MOMENTS:
        raise SystemExit(f"expected PHASE:MOMENT, the moment one of {', '.join(MOMENTS)}")
    arrange(Death(phase, moment, int(check or _AMID_CHECKS)))
    config = load(None, os.environ)
    server_log.configure_logging(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.Server(config).serve())


if __name__ == "__main__":
    main(sys.argv[1:])
