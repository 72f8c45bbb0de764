"""`python -m mutants`: see the package, and `--help`."""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import click
import msgspec
import pytest

from mutants.mutations import Mutant, mutants_of
from mutants.reach import Measure, Reach
from mutants.trial import Fate, Result, Trials

_ROOT: Final = Path(__file__).parents[2]
_EQUIVALENT: Final = Path(__file__).parent / "equivalent.toml"
_SUITES: Final = {
    "core": ("core", "policies", "service", "driver"),
    "policies": ("core", "policies", "cli", "api"),
    "driver": ("driver", "service", "api", "recovery"),
    "stores": ("stores", "service", "driver"),
}
"""The tests that ought to notice, by the package of `interlock` that is changed: folders of `tests`."""
_AIMS: Final = {"core": 0.95, "driver": 0.90, "stores": 0.90, "policies": 0.90}


def main() -> int:
    options = _options()
    folder = _ROOT / "build" / "mutants" / options.package
    folder.mkdir(parents=True, exist_ok=True)
    tests = [str(_ROOT / "tests" / name) for name in _SUITES[options.package]]
    plain = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not long and not qemu", *tests]
    reach = _reach(folder / "reach.json", plain, again=options.measure)
    sample = _sample(options.package, options.seed, options.sample)
    results = folder / "results.jsonl"
    known = {each.name: each for each in _kept(results)}
    equivalent = _equivalent()
    open_ones = [one for one in sample if one.name not in known and one.name not in equivalent]
    with results.open("ab") as file:

        def keep(result: Result) -> None:
            known[result.name] = result
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
            click.echo(f"{len(known):6} {result.fate.value:11} line {result.line}: {result.name}")

        if open_ones:
            pytest.main([*plain, "-s"], plugins=[Trials(open_ones, reach, _ROOT, options.jobs, keep)])
    return _report(options.package, sample, known, equivalent)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("package", choices=sorted(_SUITES), help="the package of interlock to change")
    parser.add_argument("--sample", type=int, default=0, help="how many mutants are drawn; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at the same time")
    parser.add_argument("--measure", action="store_true", help="measure again which tests reach which lines")
    return parser.parse_args()


def _sample(package: str, seed: int, size: int) -> list[Mutant]:
    found = [
        one for path in sorted((_ROOT / "src/interlock" / package).rglob("*.py")) for one in mutants_of(path, _ROOT)
    ]
    found = list({one.name: one for one in found}.values())
    return random.Random(seed).sample(found, min(size, len(found))) if size else found


def _reach(path: Path, plain: list[str], *, again: bool) -> Reach:
    if path.exists() and not again:
        return msgspec.json.decode(path.read_bytes(), type=Reach)
    measure = Measure(path.with_suffix(".coverage"))
    pytest.main(plain, plugins=[measure])
    reach = measure.reach(_ROOT)
    path.write_bytes(msgspec.json.encode(reach))
    return reach


def _kept(results: Path) -> list[Result]:
    lines = results.read_bytes().splitlines() if results.exists() else []
    return [msgspec.json.decode(line, type=Result) for line in lines]


def _equivalent() -> dict[str, str]:
    """Return the reasons why mutants do what the original does, by their names."""
    return msgspec.toml.decode(_EQUIVALENT.read_text(encoding="utf-8"), type=dict[str, str])


def _report(package: str, sample: list[Mutant], known: dict[str, Result], equivalent: dict[str, str]) -> int:
    """Print the survivors and the share that was noticed; return 1 if it is below the aim."""
    tried = [known[one.name] for one in sample if one.name in known and one.name not in equivalent]
    for result in sorted(tried, key=lambda one: one.name):
        if result.fate in {Fate.SURVIVED, Fate.NOT_REACHED}:
            click.echo(f"{result.fate.value}: line {result.line}: {result.name}")
    fates = Counter(result.fate for result in tried)
    noticed = fates[Fate.NOTICED] + fates[Fate.HUNG]
    share = noticed / len(tried) if tried else 1.0
    skipped = sum(one.name in equivalent for one in sample)
    click.echo(f"{package}: {noticed} of {len(tried)} noticed ({share:.1%}); {skipped} equivalent ones are left out.")
    click.echo(f"The aim is {_AIMS[package]:.0%}.")
    return share < _AIMS[package]


if __name__ == "__main__":
    sys.exit(main())
