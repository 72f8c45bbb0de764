"""Every kind of finding is described once, with an example that gives it, and many of one kind are one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from interlock.policies import lint
from interlock.policies.lint import KINDS, Severity, check_file, grouped

SOURCES = Path(lint.__file__).parent
ONLY_ELSEWHERE = {"not-performed", "not-all-seen"}
"""Those that depend on the driver, or on limits: tests of their own trigger them."""


def test_every_code_of_the_checks_is_described() -> None:
    named = {
        code
        for path in SOURCES.glob("*.py")
        if path.name != "finding_kinds.py"
        for code in re.findall(r'\bfinding\(\s*"([a-z]+(?:-[a-z]+)*)"', path.read_text())
    }
    assert len(named) > 20
    assert named <= set(KINDS)


@pytest.mark.parametrize("code", sorted(set(KINDS) - ONLY_ELSEWHERE))
def test_the_example_of_a_kind_gives_a_finding_of_it(code: str, tmp_path: Path) -> None:
    path = tmp_path / "example.toml"
    path.write_text(KINDS[code].text())
    own = [one for one in check_file(path) if one.code == code]
    assert own, [one.code for one in check_file(path)]
    assert KINDS[code].severity in {one.severity for one in own}


def test_kinds_are_listed_by_severity() -> None:
    order = [tuple(Severity).index(kind.severity) for kind in KINDS.values()]
    assert order == sorted(order)


def test_many_findings_of_one_kind_are_one_sentence_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "messy.toml"
    rules = "".join(f'[[rule]]\nid = "r{n}"\noperations = ["stop"]\nverdict = "deny"\n' for n in range(31))
    path.write_text(f'[policy]\nextends = "standard"\n{rules}')
    findings = check_file(path)
    groups = grouped(findings)
    assert sum(len(group.findings) for group in groups) == len(findings)
    first = groups[0]
    assert (first.code, first.severity, len(first.findings)) == ("unreachable", Severity.ERROR, 30)
    assert first.summary == KINDS["unreachable"].several
    assert [tuple(Severity).index(group.severity) for group in groups] == sorted(
        tuple(Severity).index(group.severity) for group in groups
    )
    (alone,) = grouped(findings[:1])
    assert alone.summary == findings[0].message
