"""Which lines each test reaches, and how long it takes: measured once, and kept in `build/mutants`.

`python -m mutants.reach DATA TEST_FILE...` measures these files, in a process of its own: what it leaves in caches
would hide mutants.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import heapq
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Final, Self

import coverage
import msgspec
import pytest

ROOT: Final = Path(__file__).parents[2]
OPTIONS: Final = (
    *("-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not long and not qemu"),
    "--hypothesis-seed=0",  # the same examples in each trial
)
_PROCESSOR_S: Final = 3.0
"""After how much processor time a test is ended while it is measured."""
_TOO_LONG: Final = "It computes for too long to be measured."
_NARROWEST: Final = 12
"""How many tests of each line of a function are tried before the others."""
Lines = dict[int, tuple[int, ...]]


class Measured(msgspec.Struct, frozen=True):
    """What was measured of one test that passed."""

    id: str
    seconds: float
    """Processor time, which says the same on a machine that has other work."""
    lines: int
    """How many lines of the program it reaches: the fewer, the narrower it is."""


class Reach(msgspec.Struct, frozen=True):
    """The tests that reach each line, by file relative to the project's root."""

    tests: tuple[Measured, ...] = ()
    lines: dict[str, Lines] = {}
    """Indexes of `tests`."""
    sources: dict[str, str] = {}
    """The files whose lines these are."""
    measured: dict[str, str] = {}
    """The digests of the files of tests."""

    def of(self, file: str, lines: Iterable[int], around: Iterable[int] = ()) -> list[Measured]:
        """Return the tests that reach the first of the lines that any reaches.

        For each line around it, the rarest first, come those of these that are the narrowest: a wrong branch is noticed
        by what ought to take the other one. Then come the others, the narrowest first.
        """
        found = self.lines.get(file, {})
        reaching = {at: self.tests[at].lines for at in next((found[line] for line in lines if line in found), ())}
        branches = sorted((reaching.keys() & set(found.get(line, ())) for line in around), key=len)
        rank: dict[int, int] = {}
        for number, branch in enumerate(branches):
            for at in heapq.nsmallest(_NARROWEST, branch, key=lambda at: (reaching[at], at)):
                rank.setdefault(at, number)
        order = sorted(reaching, key=lambda at: (rank.get(at, len(branches)), reaching[at], at))
        return [self.tests[at] for at in order]

    def missing(self, files: Iterable[str]) -> list[str]:
        """Return the files of tests that were not measured as they are."""
        return [file for file in files if self.measured.get(file) != _digest(file)]

    def of_today(self) -> Self:
        """Return the same for the program as it is: a changed line is reached as the unchanged one before it."""
        sources = {file: (ROOT / file).read_text() for file in self.sources if (ROOT / file).exists()}
        lines = {
            file: _moved(self.lines[file], self.sources[file].splitlines(), now.splitlines())
            for file, now in sources.items()
        }
        return msgspec.structs.replace(self, lines=lines, sources=sources)

    def merged(self, other: Reach) -> Self:
        """Return both, with the files of tests that are in both as the other has them."""
        kept = [at for at, test in enumerate(self.tests) if test.id.partition("::")[0] not in other.measured]
        number = {at: to for to, at in enumerate(kept)}

        def both(file: str) -> Lines:
            mine, others = self.lines.get(file, {}), other.lines.get(file, {})
            return {
                line: (
                    *(number[at] for at in mine.get(line, ()) if at in number),
                    *(at + len(kept) for at in others.get(line, ())),
                )
                for line in mine.keys() | others.keys()
            }

        return type(self)(
            tests=(*(self.tests[at] for at in kept), *other.tests),
            lines={file: both(file) for file in self.lines | other.lines},
            sources=self.sources | other.sources,
            measured=self.measured | other.measured,
        )


def _moved(lines: Lines, then: list[str], now: list[str]) -> Lines:
    matcher = difflib.SequenceMatcher(None, then, now, autojunk=False)
    before = {b + k + 1: a + k + 1 for a, b, size in matcher.get_matching_blocks() for k in range(size)}
    moved, last = {}, 0
    for line in range(1, len(now) + 1):
        last = before.get(line, last)
        if last in lines:
            moved[line] = lines[last]
    return moved


def _digest(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()


def reach_of(folders: Iterable[str], kept: Path) -> Reach:
    """Return the reach of the tests in folders of `tests`, measured where the kept one is out of date."""
    reach = msgspec.json.decode(kept.read_bytes(), type=Reach).of_today() if kept.exists() else Reach()
    for folder in folders:
        files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / folder).rglob("test_*.py"))]
        missing = reach.missing(files)
        if missing:
            data = kept.with_name("measured.json")
            subprocess.run([sys.executable, "-m", "mutants.reach", str(data), *missing], cwd=ROOT, check=True)
            reach = reach.merged(msgspec.json.decode(data.read_bytes(), type=Reach))
            kept.write_bytes(msgspec.json.encode(reach))
    return reach


class Measure:
    """A plugin of pytest that measures what every test reaches."""

    def __init__(self, data_file: Path) -> None:
        self._coverage = coverage.Coverage(
            data_file=str(data_file), source_pkgs=["interlock"], config_file=False, data_suffix=False, branch=False
        )
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()

    def pytest_collection_finish(self) -> None:
        self._coverage.erase()
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._coverage.switch_context(item.nodeid)
        begun_s = time.process_time()
        try:
            return (yield)
        finally:
            self._seconds[item.nodeid] = time.process_time() - begun_s

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        """End a test that computes for too long: it may take more than was measured, and reach more lines."""
        signal.signal(signal.SIGVTALRM, _end)
        signal.setitimer(signal.ITIMER_VIRTUAL, _PROCESSOR_S)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed and _TOO_LONG not in str(report.longrepr):
            self._failed.add(report.nodeid)

    def reach(self, files: Iterable[str]) -> Reach:
        """Return what was measured of files of tests, without tests that failed or were skipped."""
        self._coverage.stop()
        self._coverage.save()
        data = self._coverage.get_data()
        ids = sorted(self._seconds.keys() - self._failed)
        number = {test: at for at, test in enumerate(ids)}
        counts = [0] * len(ids)
        lines: dict[str, Lines] = {}
        for path in sorted(data.measured_files()):
            found = {}
            for line, contexts in data.contexts_by_lineno(path).items():
                reached = tuple(sorted(number[one] for one in contexts if one in number))
                if reached:
                    found[line] = reached
                for at in reached:
                    counts[at] += 1
            lines[str(Path(path).relative_to(ROOT))] = found
        return Reach(
            tests=tuple(Measured(one, self._seconds[one], counts[at]) for at, one in enumerate(ids)),
            lines=lines,
            sources={file: (ROOT / file).read_text() for file in lines},
            measured={file: _digest(file) for file in files},
        )


def _end(*_: object) -> None:
    """End the test: in an event loop between two callbacks, since a task that is hit would leave others waiting."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        pytest.skip(_TOO_LONG)
    loop.call_soon_threadsafe(sys.exit, _TOO_LONG)


def main(data: str, *files: str) -> None:
    measure = Measure(Path(data).with_suffix(".coverage"))
    pytest.main([*OPTIONS, *files], plugins=[measure])
    Path(data).write_bytes(msgspec.json.encode(measure.reach(files)))


if __name__ == "__main__":
    main(*sys.argv[1:])
