"""Tries mutants: each in processes that are forked from the one that collected the tests."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from mutants.mutations import Mutant, codes_in, mutated
from mutants.reach import Measured, Reach

_BUDGET_S: Final = 12.0
"""How much processor time the tests of one mutant take, as measured without it."""
_PROCESSOR_S: Final = 10.0
"""How much processor time a test may use on top of five times the measured one: what loops for ever is found then."""
_PATIENCE_S: Final = 60.0
"""How long a test may take on top of ten times the measured time: what waits for ever is found then."""


class Fate(StrEnum):
    """What became of a mutant."""

    NOTICED = "noticed"
    SURVIVED = "survived"
    HUNG = "hung"
    """A test did not end, and ends without the mutant: noticed."""
    NOT_REACHED = "not_reached"
    """No test in this process reaches the line."""
    NOT_TRIED = "not_tried"
    """The changed code cannot take the place of the function's, and is not counted."""


class Result(msgspec.Struct, frozen=True):
    """One line of the file of results."""

    name: str
    digest: str
    """Of the function that was changed: a result is of no use once that is another one."""
    line: int
    fate: Fate
    by: str = ""
    """The test that failed."""
    tests: int = 0
    """How many tests were run."""


class _End(NamedTuple):
    at: int
    """Index of the test."""
    fate: Fate


_Places = Sequence[tuple[FunctionType, CodeType]]


class Trials:
    """A plugin of pytest that tries mutants instead of running the tests.

    A mutant is noticed by a test that fails with it twice, the second time alone, and then passes without it. So
    neither a slow machine nor a test that fails now and then counts.
    """

    def __init__(
        self, mutants: Sequence[Mutant], reach: Reach, root: Path, jobs: int, keep: Callable[[Result], None]
    ) -> None:
        self._mutants, self._reach, self._root, self._jobs, self._keep = mutants, reach, root, jobs, keep
        self._items: dict[str, pytest.Item] = {}
        self._functions: dict[tuple[str, str], list[FunctionType]] = defaultdict(list)
        self._running: dict[int, tuple[int, Mutant]] = {}
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._items = {item.nodeid: item for item in session.items}
        gc.unfreeze()  # `conftest.py` froze what was collected, and what is frozen is not listed
        for each in gc.get_objects():
            if isinstance(each, FunctionType):
                self._functions[each.__code__.co_filename, each.__code__.co_qualname].append(each)
        gc.freeze()  # the collector of a child touches no page of what was collected
        for mutant in self._mutants:
            while len(self._running) >= self._jobs:
                self._settle()
            reaching = self._reach.of(mutant.file, (mutant.line, mutant.statement), mutant.around)
            chosen = list(_within_budget(test for test in reaching if test.id in self._items))
            if chosen:
                self._start(mutant, chosen)
            else:
                self._keep(_result(mutant, Fate.NOT_REACHED))
        while self._running:
            self._settle()
        return True

    def _start(self, mutant: Mutant, chosen: list[Measured]) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            try:
                os.write(writing, msgspec.json.encode(self._tried(mutant, chosen)))
            except Exception:  # noqa: BLE001 (whatever it is, the parent goes on with the other mutants)
                traceback.print_exc()
            os._exit(0)
        os.close(writing)
        self._running[reading] = child, mutant

    def _settle(self) -> None:
        """Wait until one mutant or more have been tried."""
        ready, _, _ = select.select(list(self._running), [], [])
        for pipe in ready:
            child, mutant = self._running.pop(pipe)
            said = os.read(pipe, 65536)
            os.close(pipe)
            os.waitpid(child, 0)
            self._keep(msgspec.json.decode(said, type=Result) if said else _result(mutant, Fate.NOT_TRIED))

    def _tried(self, mutant: Mutant, tests: list[Measured]) -> Result:
        path = self._root / mutant.file
        code, _line = mutated(path, mutant)
        places = self._places(str(path), code)
        if not places:
            return _result(mutant, Fate.NOT_TRIED)
        left = tests
        while end := self._run(left, places):
            test, left = left[end.at], left[end.at + 1 :]
            if self._run([test], places) and not self._run([test], ()):
                return _result(mutant, end.fate, test.id, len(tests) - len(left))
        return _result(mutant, Fate.SURVIVED, tests=len(tests))

    def _places(self, path: str, code: CodeType) -> _Places:
        """Return the function and its new code, and the same of what it has made already, such as lambdas in tables."""
        codes = [code, *codes_in(code)]
        alike = Counter((each.co_qualname, each.co_firstlineno) for each in codes)
        return [
            (function, each)
            for each in codes
            if alike[each.co_qualname, each.co_firstlineno] == 1
            for function in self._functions[path, each.co_qualname]
            if function.__code__.co_firstlineno == each.co_firstlineno
            and function.__code__.co_freevars == each.co_freevars
        ]

    def _run(self, tests: list[Measured], places: _Places) -> _End | None:
        """Run tests in a process with that code in place, until one does not pass; return None if all do."""
        if not tests:
            return None
        folder = Path(tempfile.mkdtemp(prefix="interlock-mutant-"))
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.setsid()
            os.close(reading)
            with contextlib.suppress(BaseException):
                self._perform(tests, places, folder, writing)
            os._exit(0)
        os.close(writing)
        end = _followed(reading, tests)
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what its tests left running
        _, status = os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)
        out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        return end._replace(fate=Fate.HUNG) if end and out_of_time else end

    def _perform(self, tests: list[Measured], places: _Places, folder: Path, pipe: int) -> None:
        """Run tests in this process; write '.' before each, then 'E' if all passed and 'F' if one failed."""
        from hypothesis.configuration import set_hypothesis_home_dir

        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        items = [self._items[test.id] for test in tests]
        factory: Any = items[0].config._tmp_path_factory  # type: ignore[attr-defined]  # no public way to move it
        factory._given_basetemp = folder / "tests"
        set_hypothesis_home_dir(folder)  # no example is taken from another trial
        for function, code in places:
            function.__code__ = code
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for test, item, following in zip(tests, items, [*items[1:], None], strict=True):
            limit_s = time.process_time() + _PROCESSOR_S + 5 * test.seconds
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s) + 1, resource.RLIM_INFINITY))
            os.write(pipe, b".")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._failed:
                break
        os.write(pipe, b"F" if self._failed else b"E")


def _followed(pipe: int, tests: Sequence[Measured]) -> _End | None:
    """Return the test that does not pass, by what the process writes that runs them."""
    started = 0
    while True:
        at = max(started - 1, 0)
        ready, _, _ = select.select([pipe], [], [], _PATIENCE_S + 10 * tests[at].seconds)
        match os.read(pipe, 1) if ready else None:
            case None:
                return _End(at, Fate.HUNG)
            case b".":
                started += 1
            case b"E":
                return None
            case _:  # a test failed, or the process ended
                return _End(at, Fate.NOTICED)


def _within_budget(tests: Iterable[Measured]) -> Iterator[Measured]:
    left_s = _BUDGET_S
    for test in tests:
        if test.seconds <= left_s:
            left_s -= test.seconds
            yield test


def _result(mutant: Mutant, fate: Fate, by: str = "", tests: int = 0) -> Result:
    return Result(mutant.name, mutant.digest, mutant.line, fate, by, tests)
