"""The direction of imports, as `.importlinter` states it, holds; and stating it would show a wrong one."""

from __future__ import annotations

import ast
import configparser
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Container, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINTER = Path(sys.executable).with_name("lint-imports")


def lint(source: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LINTER), "--no-logo", "--no-cache", "--config", str(ROOT / ".importlinter")],
        cwd=source.parent,
        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_import_points_towards_the_core() -> None:
    ended = lint(ROOT / "src")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core/states.py", "import interlock.ports"),
        ("core/states.py", "import apsw"),
        ("service/auth.py", "import interlock.stores"),
        ("stores/__init__.py", "import interlock.hypervisors"),
        ("driver/dispatcher.py", "import interlock.server"),
    ],
)
def test_an_import_that_points_away_from_the_core_is_found(tmp_path: Path, module: str, line: str) -> None:
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    with (source / "interlock" / module).open("a") as wrong:
        wrong.write(f"\n{line}\n")
    assert "BROKEN" in lint(source).stdout


def test_every_layer_is_listed() -> None:
    stated = configparser.ConfigParser()
    stated.read(ROOT / ".importlinter")
    assert stated["importlinter:contract:direction"]["exhaustive"] == "True"


def test_a_server_that_starts_waits_for_nothing_that_takes_long_to_make_and_is_not_needed_yet() -> None:
    """HTTP is to answer within a second of the start; each of these took a tenth of that or more."""
    late = ["numpy", "oslo_utils", "swagger_ui"]
    program = (
        f"import sys, interlock.__main__, interlock.server; print([name for name in {late} if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_no_packages_or_modules_import_each_other_in_a_cycle() -> None:
    """At every level of the tree: neither do two packages side by side, nor two modules of one package."""
    assert cycles(ROOT / "src") == []


def test_a_cycle_is_found(tmp_path: Path) -> None:
    for name, imported in (("a/x", "p.b.y"), ("b/y", "p.c"), ("c", "p.a.z"), ("a/z", "p.d"), ("d", "p.e")):
        path = (tmp_path / "p" / name).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from {imported} import thing\n")
    (tmp_path / "p" / "e.py").touch()
    assert cycles(tmp_path, "p") == ["p: a, b, c"]


def cycles(source: Path, package: str = "interlock") -> list[str]:
    """The cycles among the children of each package, as "package: child, child"; type-checking imports count too."""
    paths = {
        ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (source / package).rglob("*.py")
    }
    graphs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module, path in paths.items():
        for imported in imported_modules(ast.parse(path.read_text()), paths):
            here, there = module.split("."), imported.split(".")
            shared = next((n for n, (one, other) in enumerate(zip(here, there, strict=False)) if one != other), 0)
            if shared:
                graphs[".".join(here[:shared])][here[shared]].add(there[shared])
    found = []
    for parent, graph in graphs.items():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(f"{parent}: {', '.join(sorted(set(error.args[1])))}")
    return sorted(found)


def imported_modules(tree: ast.Module, known: Container[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known:
                    yield full
                elif node.module in known:
                    yield node.module
