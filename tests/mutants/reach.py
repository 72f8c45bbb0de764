"""Which lines each test reaches, and how long it takes: measured once, and kept in `build/mutants`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import coverage
import msgspec
import pytest


class Test(msgspec.Struct, frozen=True):
    """What was measured of one test that passed."""

    id: str
    seconds: float
    lines: int
    """How many lines of the program it reaches: the fewer, the narrower it is."""


class Reach(msgspec.Struct, frozen=True):
    """The tests that reach each line, by file relative to the project's root."""

    tests: tuple[Test, ...]
    lines: dict[str, dict[int, tuple[int, ...]]]
    """Indexes of `tests`."""

    def of(self, file: str, line: int) -> list[Test]:
        """Return the tests that reach a line, the narrowest first."""
        return sorted((self.tests[at] for at in self.lines.get(file, {}).get(line, ())), key=lambda one: one.lines)


class Measure:
    """A plugin of pytest that measures what every test reaches."""

    def __init__(self, data_file: Path) -> None:
        self._coverage = coverage.Coverage(
            data_file=str(data_file), source_pkgs=["interlock"], config_file=False, data_suffix=False, branch=False
        )
        self._seconds: dict[str, float] = defaultdict(float)
        self._failed: set[str] = set()

    def pytest_collection_finish(self) -> None:
        self._coverage.erase()
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if not report.passed:
            self._failed.add(report.nodeid)

    def reach(self, root: Path) -> Reach:
        """Return what was measured, without tests that failed or were skipped."""
        self._coverage.stop()
        self._coverage.save()
        data = self._coverage.get_data()
        ids = sorted(self._seconds.keys() - self._failed)
        number = {test: at for at, test in enumerate(ids)}
        counts = [0] * len(ids)
        lines: dict[str, dict[int, tuple[int, ...]]] = {}
        for file in sorted(data.measured_files()):
            found = {}
            for line, contexts in data.contexts_by_lineno(file).items():
                reached = tuple(sorted(number[one] for one in contexts if one in number))
                if reached:
                    found[line] = reached
                for at in reached:
                    counts[at] += 1
            lines[str(Path(file).relative_to(root))] = found
        return Reach(tests=tuple(Test(one, self._seconds[one], counts[at]) for at, one in enumerate(ids)), lines=lines)
