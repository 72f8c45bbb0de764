"""Tries mutants: each in a forked process of the one that collected the tests."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from types import FunctionType
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from mutants.mutations import Mutant, mutated
from mutants.reach import Reach, Test

_BUDGET_S: Final = 30.0
"""How long the tests of one mutant take at most, as measured without it."""
_PATIENCE_S: Final = 60.0
"""How much longer they may take with it: a mutant that loops for ever is noticed then."""


class Fate(StrEnum):
    """What became of a mutant."""

    NOTICED = "noticed"
    SURVIVED = "survived"
    HUNG = "hung"
    """No test ended in time: noticed."""
    NOT_REACHED = "not_reached"
    """No test in this process reaches the line."""


class Result(msgspec.Struct, frozen=True):
    """One line of the file of results."""

    name: str
    line: int
    fate: Fate
    by: str = ""
    """The test that failed."""
    tests: int = 0
    """How many tests were run at most."""


class _Running(NamedTuple):
    mutant: Mutant
    pipe: int
    until_s: float
    tests: int
    folder: Path


class Trials:
    """A plugin of pytest that tries mutants instead of running the tests."""

    def __init__(
        self, mutants: Sequence[Mutant], reach: Reach, root: Path, jobs: int, keep: Callable[[Result], None]
    ) -> None:
        self._mutants, self._reach, self._root, self._jobs, self._keep = mutants, reach, root, jobs, keep
        self._functions: dict[tuple[str, str], list[FunctionType]] = defaultdict(list)
        self._running: dict[int, _Running] = {}
        self._failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed = report.nodeid

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for each in gc.get_objects():
            if isinstance(each, FunctionType):
                self._functions[each.__code__.co_filename, each.__code__.co_qualname].append(each)
        gc.freeze()  # the collector of a child touches no page of what was collected
        for mutant in self._mutants:
            while len(self._running) >= self._jobs:
                self._settle()
            chosen = list(_within_budget(self._reach.of(mutant.file, mutant.line)))
            if chosen:
                self._start(mutant, [items[test.id] for test in chosen if test.id in items], chosen)
            else:
                self._keep(Result(mutant.name, mutant.line, Fate.NOT_REACHED))
        while self._running:
            self._settle()
        return True

    def _start(self, mutant: Mutant, items: list[pytest.Item], chosen: list[Test]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="interlock-mutant-"))
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.setsid()
            os.close(reading)
            with contextlib.suppress(BaseException):
                os.write(writing, self._run(mutant, items, folder).encode())
            os._exit(0)
        os.close(writing)
        until_s = time.monotonic() + sum(test.seconds for test in chosen) * 3 + _PATIENCE_S
        self._running[child] = _Running(mutant, reading, until_s, len(items), folder)

    def _run(self, mutant: Mutant, items: list[pytest.Item], folder: Path) -> str:
        """Run the tests in this process until one fails; return its id, or '-' if none does."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        factory: Any = items[0].config._tmp_path_factory  # type: ignore[attr-defined]  # no public way to move it
        factory._given_basetemp = folder / "tests"
        path = self._root / mutant.file
        code, _line = mutated(path, mutant)
        for function in self._functions[str(path), mutant.function]:
            function.__code__ = code
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._failed:
                return self._failed
        return "-"

    def _settle(self) -> None:
        """Wait until one child has ended or is out of time."""
        pipes = {running.pipe: child for child, running in self._running.items()}
        left_s = min(running.until_s for running in self._running.values()) - time.monotonic()
        ready, _, _ = select.select(list(pipes), [], [], max(0.0, left_s))
        now_s = time.monotonic()
        late = [child for child, running in self._running.items() if running.until_s <= now_s]
        for child in {*(pipes[pipe] for pipe in ready), *late}:
            running = self._running.pop(child)
            said = os.read(running.pipe, 65536).decode() if running.pipe in ready else None
            os.close(running.pipe)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what its tests left running
            os.waitpid(child, 0)
            shutil.rmtree(running.folder, ignore_errors=True)
            self._keep(_result(running, said))


def _within_budget(tests: Iterable[Test]) -> Iterator[Test]:
    left_s = _BUDGET_S
    for test in tests:
        if test.seconds <= left_s:
            left_s -= test.seconds
            yield test


def _result(running: _Running, said: str | None) -> Result:
    """Interpret what a child wrote: an empty text means that the mutant ended the process."""
    mutant = running.mutant
    match said:
        case None:
            return Result(mutant.name, mutant.line, Fate.HUNG, tests=running.tests)
        case "-":
            return Result(mutant.name, mutant.line, Fate.SURVIVED, tests=running.tests)
        case _:
            return Result(mutant.name, mutant.line, Fate.NOTICED, said or "(the process ended)", running.tests)
