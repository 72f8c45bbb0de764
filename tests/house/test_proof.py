"""docs/proof.md is about the laws that there are, and names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

from interlock.policies.laws import LAWS, SERVER_LAWS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "proof.md").read_text()


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


def test_every_mistake_is_of_a_law_and_every_law_of_the_core_has_one() -> None:
    laws = {int(law) for law in re.findall(r"^\| [^|]+ \| (\d+) \| `tests/", PAGE, re.MULTILINE)}
    assert set(LAWS) <= laws <= set(LAWS) | set(SERVER_LAWS)
