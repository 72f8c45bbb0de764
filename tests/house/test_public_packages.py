"""The public packages of the library are documented, typed, and described by docs/reference/library.md."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POLICY_PACKAGES = ("comparison", "explanation", "fleet", "lint", "model_checker", "rehearsal")
PACKAGES = [
    *("interlock.core", "interlock.policies"),
    *(f"interlock.policies.{name}" for name in POLICY_PACKAGES),
    "interlock.stores",
]


def test_the_page_describes_what_is_public_now() -> None:
    tool = "tools/library_reference.py"
    written = subprocess.run([sys.executable, tool], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = ROOT / "docs" / "reference" / "library.md"
    assert written == page.read_text(), f"Run: .venv/bin/python {tool} > {page.relative_to(ROOT)}"
    assert [line.removeprefix("## ") for line in written.splitlines() if line.startswith("## ")] == [
        *PACKAGES[:2],
        *(f"interlock.policies.{name}" for name in ("comparison", "explanation", "lint", "rehearsal")),
        *(f"interlock.policies.{name}" for name in ("fleet", "model_checker")),
        "interlock.stores",
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented_and_typed(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type):
            assert "__doc__" in vars(value), name
            assert value.__doc__, name
        elif inspect.isfunction(value):
            assert value.__doc__, name
            parameters = inspect.signature(value).parameters.values()
            assert all(one.annotation is not inspect.Parameter.empty for one in parameters), name
            assert inspect.signature(value).return_annotation is not inspect.Signature.empty, name


def test_the_functions_of_the_core_that_take_an_instance_are_public_or_named_here() -> None:
    """A function that a shell needs is not left out of `__all__` by mistake."""
    core = importlib.import_module("interlock.core")
    lifecycle = importlib.import_module("interlock.core.lifecycle")
    taking = {
        name
        for name, value in vars(lifecycle).items()
        if inspect.isfunction(value) and value.__module__ == lifecycle.__name__ and not name.startswith("_")
    }
    assert taking - {"apply_update", "complete_detachments", "relabel"} <= set(core.__all__)
