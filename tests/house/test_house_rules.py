"""The rules of the house that a linter does not know. What each is for is in docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "interlock"
FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 400
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}

CORE_STANDARD_LIBRARY = {
    *("__future__", "abc", "bisect", "collections", "dataclasses", "enum", "fractions", "functools", "heapq"),
    *("itertools", "math", "operator", "re", "string", "types", "typing"),
}
"""All that the core may use of it: nothing that waits, reads a clock, is random, logs, or touches the world."""

EXTERNAL_PACKAGES = {
    "core": {"msgspec"},
    "ports": {"msgspec"},
    "config": {"msgspec"},
    "policies": {"matplotlib", "msgspec", "numpy"},
    "service": {"msgspec", "structlog"},
    "driver": {"msgspec", "structlog"},
    "stores": {"alembic", "apsw", "msgspec", "sqlalchemy", "structlog"},
    "hypervisors": {"lz4", "msgspec", "oslo_utils", "pycdlib", "qemu", "structlog", "websockets", "zstandard"},
    "api": {"msgspec", "prometheus_client", "python_multipart", "starlette", "structlog", "swagger_ui"},
    "dashboard": {"msgspec"},
    "hosting": {"msgspec", "structlog"},
    "wiring": {"msgspec", "starlette", "structlog", "uuid_utils", "uvicorn", "uvloop"},
    "cli": {"click", "httpx", "msgspec", "rich", "uvloop", "websockets"},
    "__main__": {"click"},
}
"""Which packages of others each layer may import. `testing` may import anything."""


@cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def named(path: Path, line: int | None = None) -> str:
    place = str(path.relative_to(ROOT))
    return place if line is None else f"{place}:{line}"


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The top-level names of what a module imports absolutely, anywhere in it, and the lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0], node.lineno


def refuse(wrong: list[str]) -> None:
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_there_is_something_to_judge() -> None:
    assert len(modules()) > 20


def test_every_module_says_what_lives_in_it() -> None:
    refuse([f"{named(path)}: no docstring" for path, tree in modules().items() if not ast.get_docstring(tree)])


def test_no_function_is_longer_than_a_screen() -> None:
    wrong = []
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    wrong.append(f"{named(path, node.lineno)}: {node.name} has {lines} lines of {FUNCTION_LINES_MAX}")
    refuse(wrong)


def test_no_module_is_longer_than_can_be_kept_in_mind() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in modules()}
    refuse([f"{named(path)}: {n} lines of {MODULE_LINES_MAX}" for path, n in lengths.items() if n > MODULE_LINES_MAX])


def test_names_of_modules_are_nouns_of_the_field() -> None:
    paths = [path for path in PACKAGE.rglob("*") if path.suffix in {"", ".py"} and path.stem in FORBIDDEN_NAMES]
    refuse([f"{named(path)}: such a name takes in anything" for path in paths])


def test_files_of_tests_have_names_of_their_own() -> None:
    """The test runner knows them by these names alone."""
    seen: dict[str, Path] = {}
    paths = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path.stem not in {"conftest", "__init__"}]
    wrong = [
        f"{named(path)}: there is {named(seen[path.stem])} already"
        for path in paths
        if seen.setdefault(path.stem, path) != path
    ]
    refuse(wrong)


def test_types_are_not_ignored_in_the_core() -> None:
    wrong = [
        f"{named(path, number)}: a type is ignored"
        for path in modules()
        if layer(path) == "core"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"#\s*(type:\s*ignore|mypy:|pyright:)", line)
    ]
    refuse(wrong)


def test_the_core_imports_nothing_that_waits_reads_a_clock_or_logs() -> None:
    wrong = [
        f"{named(path, line)}: the core may not import {name}"
        for path, tree in modules().items()
        if layer(path) == "core"
        for name, line in imports(tree)
        if name in sys.stdlib_module_names and name not in CORE_STANDARD_LIBRARY
    ]
    refuse(wrong)


def test_each_layer_imports_only_the_packages_that_are_its_own() -> None:
    wrong = []
    for path, tree in modules().items():
        where = layer(path)
        if where in {"testing", "__init__"}:
            continue
        for name, line in imports(tree):
            if name != "interlock" and name not in sys.stdlib_module_names | EXTERNAL_PACKAGES.get(where, set()):
                wrong.append(f"{named(path, line)}: {where} may not import {name}")
    refuse(wrong)


def test_imports_name_where_a_thing_lives() -> None:
    wrong = [
        f"{named(path, node.lineno)}: a relative import hides its direction"
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    refuse(wrong)


def test_the_map_names_every_folder_and_none_that_is_not_there() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    folders = {
        f"{path.relative_to(PACKAGE)}/"
        for path in PACKAGE.rglob("*")
        if path.is_dir() and path.name != "__pycache__" and any(entry.name != "__pycache__" for entry in path.iterdir())
    }
    top = {f"{path.name}" for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    missing = [
        f"docs/ARCHITECTURE.md does not name `{name}`" for name in sorted(folders | top) if f"`{name}`" not in text
    ]
    headings = set(re.findall(r"^\*\*`([a-z_/]+/)`\*\*", text, flags=re.MULTILINE))
    gone = [f"docs/ARCHITECTURE.md names `{name}`, which is not there" for name in sorted(headings - folders)]
    refuse(missing + gone)
