"""`python -m mutants`: see the package, and `--help`."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Final

import click
import msgspec
import pytest

from mutants.mutations import Mutant, mutants_of
from mutants.reach import OPTIONS, ROOT, reach_of
from mutants.trial import Fate, Result, Trials

_EQUIVALENT: Final = Path(__file__).parent / "equivalent.toml"
_SUITES: Final = {
    "core": ("core", "policies", "service", "driver"),
    "policies": ("core", "policies", "api"),
    "driver": ("driver", "service", "api"),
    "stores": ("stores", "service", "driver"),
}
"""The tests that ought to notice, by the package of `interlock` that is changed: folders of `tests`."""
_NOTICED: Final = frozenset({Fate.NOTICED, Fate.HUNG})
_AIMS: Final = {"core": 0.95, "driver": 0.90, "stores": 0.90, "policies": 0.90}


def main() -> int:
    options = _options()
    folder = ROOT / "build" / "mutants"
    folder.mkdir(parents=True, exist_ok=True)
    reach = reach_of(_SUITES[options.package], folder / "reach.json")
    sample = _sample(options.package, options.seed, options.sample)
    results = folder / f"{options.package}.jsonl"
    known = _kept(results, sample, again=options.again)
    equivalent = _equivalent()
    open_ones = [one for one in sample if one.name not in known and one.name not in equivalent]
    with results.open("ab") as file:

        def keep(result: Result) -> None:
            known[result.name] = result
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
            click.echo(f"{len(known):6} {result.fate.value:11} line {result.line}: {result.name}")

        if open_ones:
            tests = [str(ROOT / "tests" / name) for name in _SUITES[options.package]]
            pytest.main([*OPTIONS, "-s", *tests], plugins=[Trials(open_ones, reach, ROOT, options.jobs, keep)])
    return _report(options.package, sample, known, equivalent)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("package", choices=sorted(_SUITES), help="the package of interlock to change")
    parser.add_argument("--sample", type=int, default=0, help="how many mutants are drawn; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at the same time")
    parser.add_argument("--again", action="store_true", help="try those again that no test noticed")
    return parser.parse_args()


def _sample(package: str, seed: int, size: int) -> list[Mutant]:
    """Return mutants in an order that depends on their names and the seed: most stay when the program changes."""
    paths = sorted((ROOT / "src/interlock" / package).rglob("*.py"))
    found = {one.name: one for path in paths for one in mutants_of(path, ROOT)}
    drawn = sorted(found.values(), key=lambda one: hashlib.sha256(f"{seed} {one.name}".encode()).digest())
    return drawn[: size or len(drawn)]


def _kept(results: Path, sample: list[Mutant], *, again: bool) -> dict[str, Result]:
    """Return the results for the functions as they are; `again`: only those of mutants that were noticed."""
    lines = results.read_bytes().splitlines() if results.exists() else []
    found = [msgspec.json.decode(line, type=Result) for line in lines]
    digests = {one.name: one.digest for one in sample}
    return {
        one.name: one for one in found if digests.get(one.name) == one.digest and (one.fate in _NOTICED or not again)
    }


def _equivalent() -> dict[str, str]:
    """Return the reasons why mutants do what the original does, by their names."""
    return msgspec.toml.decode(_EQUIVALENT.read_text(encoding="utf-8"), type=dict[str, str])


def _report(package: str, sample: list[Mutant], known: dict[str, Result], equivalent: dict[str, str]) -> int:
    """Print the survivors and the share that was noticed; return 1 if it is below the aim."""
    tried = [known[one.name] for one in sample if one.name in known and one.name not in equivalent]
    for result in sorted(tried, key=lambda one: one.name):
        if result.fate not in _NOTICED:
            click.echo(f"{result.fate.value}: line {result.line}: {result.name}")
    counted = [result for result in tried if result.fate is not Fate.NOT_TRIED]
    noticed = sum(result.fate in _NOTICED for result in counted)
    share = noticed / len(counted) if counted else 1.0
    skipped = sum(one.name in equivalent for one in sample)
    click.echo(f"{package}: {noticed} of {len(counted)} noticed ({share:.1%}); {skipped} equivalent ones are left out.")
    click.echo(f"The aim is {_AIMS[package]:.0%}.")
    return share < _AIMS[package]


if __name__ == "__main__":
    sys.exit(main())
