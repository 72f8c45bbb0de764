"""docs/proof.md is about the laws that there are, and names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import proof_page
from interlock.policies.laws import LAWS, SERVER_LAWS

ROOT = Path(__file__).parents[2]
PAGE = proof_page.PAGE


def test_the_page_has_every_law_with_its_name_and_promise() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", PAGE, re.MULTILINE)
    found = [(int(number), name, promise) for number, name, promise in rows]
    assert found == [(number, *law) for number, law in sorted({**LAWS, **SERVER_LAWS}.items())]


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`?(tests/[\w/]+(?:\.py)?)(?:::(\w+))?", PAGE)
    assert len(named) > 20
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert not test or re.search(rf"^(async )?def {test}\(", (ROOT / path).read_text(), re.MULTILINE), test


def test_every_law_has_a_row_of_mistakes() -> None:
    """What is in the rows is compared with what is made by the tests that make the mistakes."""
    for law in {**LAWS, **SERVER_LAWS}:
        row = proof_page.mistakes(law)
        assert row.core, law
        assert row.policies, law
        assert row.steps or row.server, law
