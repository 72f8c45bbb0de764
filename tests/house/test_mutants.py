"""The tool that changes the program to see whether a test notices."""

from __future__ import annotations

import ast
import random
from pathlib import Path
from types import FunctionType

import msgspec
import pytest

from mutants.mutations import Mutant, mutants_of, mutated
from mutants.reach import Measured, Reach
from mutants.trial import Fate, Trials, _End

_ROOT = Path(__file__).parents[2]
_SOURCE = '''
def within(value, limits):
    """Never changed: 1 < 2."""
    assert value is not None
    if value < limits[0]:
        raise ValueError("It is below the limit.")
    return value <= limits[1] and not limits[2]
'''


def _mutants(tmp_path: Path) -> dict[str, FunctionType]:
    path = tmp_path / "module.py"
    path.write_text(_SOURCE)
    namespace: dict[str, FunctionType] = {}
    exec(compile(ast.parse(_SOURCE), str(path), "exec"), namespace)
    original = namespace["within"]
    return {
        mutant.change: FunctionType(mutated(path, mutant)[0], original.__globals__)
        for mutant in mutants_of(path, tmp_path)
    }


def test_each_mutant_differs_in_the_one_expression_that_it_names(tmp_path: Path) -> None:
    found = _mutants(tmp_path)
    assert found["value < limits[0] -> value <= limits[0]"](3, (2, 3, False)) is True
    assert found["value <= limits[1] -> value < limits[1]"](3, (2, 3, False)) is False
    assert found["not limits[2] -> limits[2]"](3, (2, 3, False)) is False
    assert found["return value <= limits[1] and (not limits[2]) -> return None"](3, (2, 3, False)) is None
    assert not any("1 < 2" in change or "below" in change or "is not None" in change for change in found)


def test_every_function_of_the_program_can_be_changed() -> None:
    paths = sorted((_ROOT / "src/interlock").rglob("*.py"))
    for path in random.Random(1).sample(paths, 12):
        found = list(mutants_of(path, _ROOT))
        for mutant in random.Random(1).sample(found, min(3, len(found))):
            assert mutated(path, mutant)[0].co_qualname == mutant.function


def test_what_is_listed_as_equivalent_exists() -> None:
    """An entry for code that is gone hides nothing, and misleads."""
    listed = msgspec.toml.decode((_ROOT / "tests/mutants/equivalent.toml").read_text(), type=dict[str, str])
    files = {name.partition("::")[0] for name in listed}
    known: set[str] = {mutant.name for file in files for mutant in mutants_of(_ROOT / file, _ROOT)}
    assert set(listed) <= known
    assert all(reason.endswith(".") for reason in listed.values())


def test_the_name_of_a_mutant_does_not_move_with_its_line() -> None:
    assert Mutant("a.py", "f", 3, "1 -> 2", 0).name == Mutant("a.py", "f", 9, "1 -> 2", 4).name


def test_a_change_within_a_statement_names_the_line_at_which_the_statement_begins(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f(a):\n    b = a\n    return (\n        a\n        + 1\n    )\n")
    found = {one.change: one for one in mutants_of(path, tmp_path)}
    assert (found["1 -> 2"].line, found["1 -> 2"].statement) == (5, 3)


def _reach(tests: tuple[Measured, ...], lines: dict[int, tuple[int, ...]], measured: dict[str, str]) -> Reach:
    file = "tests/house/test_mutants.py"
    text = (_ROOT / file).read_text()
    return Reach(tests, {file: lines}, {file: "\n".join(text.splitlines()[2:])}, measured)


def test_what_was_measured_moves_with_the_lines_of_the_program() -> None:
    """Two lines were added at the top since; of a line that is new the nearest one before it is taken."""
    reach = _reach((Measured("a.py::t", 0.1, 3),), {1: (0,)}, {"a.py": ""}).of_today()
    file = "tests/house/test_mutants.py"
    assert [test.id for test in reach.of(file, [3])] == ["a.py::t"]
    assert reach.of(file, [1]) == []


def test_the_narrowest_tests_of_the_rarest_branch_are_tried_first() -> None:
    tests = tuple(Measured(f"a.py::t{lines}", 0.1, lines) for lines in range(10, 30))
    reach = _reach(tests, {1: tuple(range(20)), 2: tuple(range(18)), 3: (18, 19)}, {"a.py": ""})
    ids = [test.id for test in reach.of("tests/house/test_mutants.py", [1], range(1, 4))]
    assert ids[:3] == ["a.py::t28", "a.py::t29", "a.py::t10"]
    assert len(set(ids)) == 20


def test_what_is_measured_again_replaces_what_was_measured_of_a_file() -> None:
    before = _reach(
        (Measured("a.py::old", 1.0, 9), Measured("b.py::t", 1.0, 9)), {1: (0, 1)}, {"a.py": "1", "b.py": "1"}
    )
    both = before.merged(_reach((Measured("a.py::new", 1.0, 3),), {1: (0,)}, {"a.py": "2"}))
    assert [test.id for test in both.of("tests/house/test_mutants.py", [1])] == ["a.py::new", "b.py::t"]


@pytest.mark.parametrize(
    ("alone", "without", "fate"),
    [(True, False, Fate.NOTICED), (False, False, Fate.SURVIVED), (True, True, Fate.SURVIVED)],
)
def test_a_mutant_is_noticed_if_a_test_fails_again_with_it_and_passes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, alone: bool, without: bool, fate: Fate
) -> None:
    path = tmp_path / "module.py"
    path.write_text(_SOURCE)
    mutant = next(mutants_of(path, tmp_path))
    trials = Trials([], Reach(), tmp_path, 1, lambda _result: None)
    namespace: dict[str, FunctionType] = {}
    exec(compile(_SOURCE, str(path), "exec"), namespace)
    trials._functions[str(path), "within"].append(namespace["within"])
    ends = iter([True, alone, without])
    monkeypatch.setattr(trials, "_run", lambda tests, places: _End(0, Fate.NOTICED) if tests and next(ends) else None)
    assert trials._tried(mutant, [Measured("a.py::t", 1.0, 3)]).fate is fate


def test_what_a_changed_function_has_made_before_is_changed_too(tmp_path: Path) -> None:
    """Tables are filled at import with what such functions return."""
    path = tmp_path / "module.py"
    path.write_text("def above(limit):\n    return lambda value: value > limit\n")
    namespace: dict[str, FunctionType] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    made = namespace["above"](3)
    trials = Trials([], Reach(), tmp_path, 1, lambda _result: None)
    for function in (namespace["above"], made):
        trials._functions[str(path), function.__code__.co_qualname].append(function)
    mutant = next(one for one in mutants_of(path, tmp_path) if one.change == "value > limit -> value >= limit")
    for function, code in trials._places(str(path), mutated(path, mutant)[0]):
        function.__code__ = code
    assert made(3)
