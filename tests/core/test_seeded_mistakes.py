"""Each mistake that is made in the core is found with the law that it breaks, and docs/proof.md lists it."""

from __future__ import annotations

import pytest
from seeded_mistakes import CHECKS, MISTAKES, Mistake, searched, with_evacuations, without_check

import proof_page
from interlock.policies.laws import LAWS, SERVER_LAWS
from interlock.policies.model_checker import Exploration


def broken_laws(found: Exploration) -> set[int]:
    return {violation.law for violation in found.violations}


def test_the_core_without_a_mistake_breaks_no_law() -> None:
    assert {*broken_laws(searched()), *broken_laws(with_evacuations())} == set()


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.make.__name__ for mistake in MISTAKES])
def test_a_mistake_in_the_core_is_found_by_the_check_of_its_law_and_by_nothing_else(
    monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    mistake.make(monkeypatch)
    noticed = without_check(monkeypatch, mistake.law)
    found = mistake.search()
    assert noticed, f"the check of law {mistake.law} notices nothing"
    assert mistake.law not in broken_laws(found), f"law {mistake.law} is reported although its check is removed"


def test_every_law_has_a_check_and_a_mistake_that_the_page_lists() -> None:
    assert set(CHECKS) == {mistake.law for mistake in MISTAKES} == {*LAWS, *SERVER_LAWS}
    listed = {law: proof_page.mistakes(law).core for law in CHECKS}
    assert listed == {law: [one.what for one in MISTAKES if one.law == law] for law in CHECKS}
