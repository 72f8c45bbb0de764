"""The policies in docs/examples pass the tools that the guide recommends."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.policies.language.loader import read
from interlock.policies.lint.checker import check_file
from interlock.policies.lint.findings import Severity
from interlock.policies.model_checker import explore
from interlock.policies.rehearsal.scenarios import files_beside, read_all, run
from tiers import tier

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.toml"))
example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


@example
def test_policy_check_finds_nothing_worse_than_a_note(path: Path) -> None:
    assert [one for one in check_file(path) if one.severity is not Severity.NOTE] == []


@example
def test_policy_test_passes_and_every_rule_of_the_file_decides_in_it(path: Path) -> None:
    result = run(read(path), read_all(files_beside(path)))
    assert [one.failed for one in result.scenarios if one.failed is not None] == []
    assert result.scenarios
    assert result.untouched == ()


@example
def test_policy_explore_finds_no_law_broken(path: Path) -> None:
    few = (Operation.CREATE, Operation.STOP, Operation.SOFT_DELETE, Operation.DELETE)
    policy = CompiledPolicy(read(path).policy)
    found = explore(policy, operations=tier(few, None), outstanding_max=tier(1, 3))
    assert found.complete
    assert found.violations == ()
