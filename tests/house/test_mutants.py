"""The tool that changes the program to see whether a test notices."""

from __future__ import annotations

import ast
import random
from pathlib import Path
from types import FunctionType

import msgspec

from mutants.mutations import Mutant, mutants_of, mutated

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
