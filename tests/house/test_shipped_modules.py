"""Every shipped module can be imported with the extras that it belongs to, and the package says that it is typed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from clean_environments import EXTRAS, ROOT, distributions, make_environment, requirements
from interlock.cli.failures import MODULES

PACKAGE = ROOT / "src" / "interlock"

IMPORT_ALL = """
import importlib, json, pkgutil, interlock

missing = {}
for module in pkgutil.walk_packages(interlock.__path__, "interlock.", onerror=lambda name: None):
    if module.name != "interlock.__main__":
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = error.name
        else:
            missing[module.name] = None
print(json.dumps(missing))
"""

CORE = ["interlock.core"]
CLIENT = [*CORE, "interlock.config", "interlock.ports", "interlock.cli", "interlock.service.request_models"]
POLICY_FILES = [
    f"interlock.policies.{name}"
    for name in (
        "language",
        "lint",
        "comparison",
        "explanation",
        "fleet",
        "rehearsal",
        "rendering",
        "active_policy",
        "importer",
    )
]


def importable(folder: Path, wanted: list[Requirement]) -> dict[str, str | None]:
    """For each shipped module, the name of the module without which it cannot be imported, or None if it can be."""
    python = make_environment(folder, wanted)
    ended = subprocess.run([python, "-c", IMPORT_ALL], capture_output=True, text=True, check=False, cwd="/")
    assert ended.returncode == 0, ended.stderr
    found: dict[str, str | None] = json.loads(ended.stdout)
    return found


def below(packages: list[str], name: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("wanted", "packages"),
    [
        ([Requirement("msgspec")], [*CORE, *POLICY_FILES, "interlock.config", "interlock.ports"]),
        ([*requirements()], [*CLIENT, *POLICY_FILES]),
        ([*requirements("policies")], [*CLIENT, *POLICY_FILES, "interlock.policies.model_checker"]),
        ([*requirements("plots")], [*CLIENT, "interlock.policies"]),
    ],
    ids=["msgspec", "client", "policies", "plots"],
)
def test_what_an_extra_is_for_needs_no_other(tmp_path: Path, wanted: list[Requirement], packages: list[str]) -> None:
    found = importable(tmp_path, wanted)
    inside = {name: missing for name, missing in found.items() if below(packages, name)}
    assert len(inside) > 20
    assert {name: missing for name, missing in inside.items() if missing is not None} == {}


def test_every_shipped_module_can_be_imported_without_development_dependencies(tmp_path: Path) -> None:
    paths = (path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py"))
    expected = {".".join(path.parts).removesuffix(".__init__") for path in paths} - {"interlock"}
    found = importable(tmp_path, [*requirements("server", "plots")])
    assert found.keys() | {"interlock.__main__"} == expected
    assert {name: missing for name, missing in found.items() if missing is not None} == {}


def test_the_command_line_knows_which_extra_has_a_module() -> None:
    assert MODULES.keys() == EXTRAS.keys()
    for extra, modules in MODULES.items():
        own = [Requirement(line) for line in EXTRAS[extra] if not line.startswith("interlock[")]
        tops = {
            requirement.name: {path.parts[0].partition(".")[0] for path in distribution.files or ()}
            for requirement in own
            for distribution in [distributions([requirement])[requirement.name.lower().replace(".", "-")]]
        }
        assert len(modules) == len(tops)
        for name, top in tops.items():
            assert len(top.intersection(modules)) == 1, f"{name} of the extra {extra}"


@pytest.mark.parametrize(
    ("words", "extra", "module"),
    [
        ("policy explore standard", "policies", "numpy"),
        ("serve", "server", "structlog"),
        ("bench gate", "server", "uvloop"),
        ("demo", "server", "structlog"),
        ("policy suggest --picture thresholds.svg", "plots", "matplotlib"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(tmp_path: Path, words: str, extra: str, module: str) -> None:
    python = make_environment(tmp_path, requirements())
    ended = subprocess.run(
        [python, "-m", "interlock", *words.split()], capture_output=True, text=True, check=False, cwd="/"
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"Error: This command needs the extra '{extra}', which is not installed (no module named '{module}').\n"
        f"  Install it with: pip install 'interlock[{extra}]'\n"
    )


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
