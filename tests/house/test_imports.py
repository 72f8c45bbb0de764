"""The direction of imports, as `.importlinter` states it, holds; and stating it would show a wrong one."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
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
        ("service/callers.py", "import interlock.stores"),
        ("stores/__init__.py", "import interlock.hypervisors"),
        ("driver/agent.py", "import interlock.wiring"),
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
