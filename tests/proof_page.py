"""The table of mistakes in docs/proof.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = (Path(__file__).parents[1] / "docs" / "proof.md").read_text()


class Row(NamedTuple):
    """What the table lists for one law: mistakes in words, or names of policies and tests."""

    policies: list[str]
    core: list[str]
    steps: list[str]
    server: list[str]


def mistakes(law: int) -> Row:
    """Return the row of a law."""
    (row,) = re.findall(rf"^\| {law} \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", PAGE, re.MULTILINE)
    return Row(*([one.strip().strip("`") for one in cell.split(";") if one.strip() not in ("", "—")] for cell in row))
