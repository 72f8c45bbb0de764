"""The guide *Embed the gate* says what happens, and its example needs msgspec and nothing else."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from clean_environments import ROOT, make_environment

GUIDE = ROOT / "docs" / "guides" / "embed-the-gate.md"
EXAMPLES = ROOT / "examples"
EXAMPLE = EXAMPLES / "embed_the_gate.py"


def test_the_guide_runs_as_it_stands_with_msgspec_only(tmp_path: Path) -> None:
    python = make_environment(tmp_path, [Requirement("msgspec")])
    program = f"""
import doctest, sys
sys.path.insert(0, {str(EXAMPLES)!r})
failed, tried = doctest.testfile({str(GUIDE)!r}, module_relative=False, optionflags=doctest.ELLIPSIS)
print(tried)
sys.exit(failed > 0)
"""
    ended = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False, cwd="/")
    assert ended.returncode == 0, ended.stdout
    assert int(ended.stdout) == GUIDE.read_text().count("\n>>> ") > 15


def test_the_example_is_short_and_the_guide_quotes_it() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
    [quoted] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert quoted in EXAMPLE.read_text()


def test_the_queue_outlives_the_process(tmp_path: Path) -> None:
    """Each step runs in a process of its own, and finds what the one before it committed."""
    before = "import sqlite3; from embed_the_gate import *; service = Service(sqlite3.connect('machines.db'))\n"
    steps = [
        ("service.add('web'); print(service.ask('web', Operation.START, 'ann'))", "admitted"),
        ("print(service.ask('web', Operation.REBOOT, 'ann'))", "admitted: queued behind 1"),
        ("print(service.report(service.take('web'), Outcome.SUCCEEDED), service.take('web').operation)", "True reboot"),
        ("print(service.take('web'), service.ask('web', Operation.START, 'ben')[:9])", "None redundant"),
    ]
    for step, answer in steps:
        ended = subprocess.run(
            [sys.executable, "-c", before + step],
            env={"PYTHONPATH": str(EXAMPLES)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.stdout.strip() == answer, ended.stderr
    [[status]] = sqlite3.connect(tmp_path / "machines.db").execute("SELECT status FROM machines").fetchall()
    assert status == "active"
