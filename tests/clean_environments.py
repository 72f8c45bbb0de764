"""Virtual environments with what some extras of Interlock need, and nothing else; made without the network."""

from __future__ import annotations

import re
import tomllib
import venv
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirements(*extras: str) -> Iterator[Requirement]:
    """What pyproject.toml states for these extras, and for none."""
    for text in (*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])):
        requirement = Requirement(text)
        if requirement.name == "interlock":
            yield from requirements(*requirement.extras)
        else:
            yield requirement


def distributions(wanted: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """The distributions that meet requirements, and all that these require in turn, by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()

    def add(requirement: Requirement) -> None:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (name, frozenset(requirement.extras)) in seen:
            return
        seen.add((name, frozenset(requirement.extras)))
        found[name] = distribution = metadata.distribution(requirement.name)
        for inner in map(Requirement, distribution.requires or ()):
            extras = ("", *requirement.extras)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                add(inner)

    for requirement in wanted:
        add(requirement)
    return found


def make_environment(folder: Path, wanted: Iterable[Requirement], sources: Path | None = ROOT / "src") -> Path:
    """Make a virtual environment with Interlock from `sources` and these requirements; return its interpreter.

    The packages are those of the environment that runs the tests, linked into the new one. Without `sources` it has no
    Interlock.
    """
    venv.create(folder, symlinks=True)
    [site_packages] = folder.glob("lib/python*/site-packages")
    if sources is not None:
        (site_packages / "interlock.pth").write_text(f"{sources}\n")
    for distribution in distributions(wanted).values():
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            target = site_packages / top
            if not target.is_symlink():
                target.symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin" / "python"
