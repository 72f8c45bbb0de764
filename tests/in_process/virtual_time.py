"""Time that passes only when a test says so, or when nothing else is left to do.

`VirtualClock` is moved by hand: for tests of one object that is given its clock and its `sleep`. `VirtualTimeLoop` is
an event loop in which a wait costs nothing: as soon as nothing is ready, its time jumps to the next moment that
somebody waits for. It serves whole systems, whose every `asyncio.sleep` and time-out then runs in virtual time, in the
same order each time. Real time must not be read here.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, Final, TypeVar, TypeVarTuple

AnswerT = TypeVar("AnswerT")
WordTs = TypeVarTuple("WordTs")

BEGINNING_MS: Final = 1_700_000_000_000
"""What virtual clocks show at first, in milliseconds since the Unix epoch."""
_THREADS_WAIT_S: Final = 0.1
"""For how long at most threads are waited for at once; they announce themselves."""


class OneClock:
    """A clock that is never set: people's time and that of the machine go on together. Satisfies `ports.Clock`."""

    def now_ms(self) -> int:
        raise NotImplementedError

    def wall_ms(self) -> int:
        return self.now_ms()

    def running_ms(self) -> int:
        return self.now_ms()

    def boot(self) -> str:
        return "the only one"


class VirtualClock(OneClock):
    """A clock that stands still until it is moved."""

    def __init__(self, start_ms: int = BEGINNING_MS) -> None:
        self._now_ms = float(start_ms)
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_ms(self) -> int:
        return int(self._now_ms)

    async def sleep(self, seconds: float) -> None:
        """Return when the clock has been moved so far; at once, after others had their turn, for zero or less."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_ms + seconds * 1000, next(self._order), woken))
        await woken

    async def advance(self, seconds: float) -> None:
        """Move the clock, and wake whoever sleeps until then: in the order due, each at the moment that it is due.

        Between two of them everything that is ready runs, as far as it comes without real time passing.

        Raises:
            ValueError: the clock would go backwards.
        """
        if seconds < 0:
            raise ValueError("A clock does not go backwards.")
        until_ms = self._now_ms + seconds * 1000
        await settle()
        while self._sleepers and self._sleepers[0][0] <= until_ms:
            due_ms, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                self._now_ms = max(self._now_ms, due_ms)
                woken.set_result(None)
                await settle()
        self._now_ms = until_ms

    @property
    def sleepers(self) -> int:
        """How many wait for the clock to be moved."""
        return sum(not woken.done() for _, _, woken in self._sleepers)


async def settle(turns: int = 50) -> None:
    """Let everything run that is ready, and what that makes ready, so many turns of the loop deep."""
    for _ in range(turns):
        await asyncio.sleep(0)


class _JumpingSelector(selectors.DefaultSelector):
    """Where the loop would wait for time to pass, time passes, unless threads are at work for somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.elapsed_s = 0.0
        self.threads = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            # Nobody waits for a moment: only another thread or a file can bring news, and those live in real time.
            return super().select(None)
        ready = super().select(0)
        if not ready and timeout > 0 and self.threads:
            return super().select(_THREADS_WAIT_S)
        if not ready and timeout > 0:
            self.elapsed_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps over every wait.

    It stands still while threads of an executor work, and others between `thread_begins` and `thread_ends`. Any other
    thread that works while somebody waits for a moment is overtaken by that moment.
    """

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._jumping.elapsed_s

    def thread_begins(self) -> None:
        """Have time stand still until `thread_ends` was called as often. Both only in the loop's own thread."""
        self._jumping.threads += 1

    def thread_ends(self) -> None:
        self._jumping.threads -= 1

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*WordTs], AnswerT], *args: *WordTs
    ) -> asyncio.Future[AnswerT]:
        """As the loop's, with time standing still until the answer is there."""
        answer = super().run_in_executor(executor, func, *args)
        self.thread_begins()
        answer.add_done_callback(lambda _: self.thread_ends())
        return answer


class LoopClock(OneClock):
    """The virtual time of a `VirtualTimeLoop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, start_ms: int = BEGINNING_MS) -> None:
        self._loop = loop
        self._start_ms = start_ms

    def now_ms(self) -> int:
        return self._start_ms + round(self._loop.time() * 1000)


def run_in_virtual_time(main: Coroutine[Any, Any, AnswerT]) -> AnswerT:
    """Run `main` to its end in a `VirtualTimeLoop` of its own, and answer what it answers."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
