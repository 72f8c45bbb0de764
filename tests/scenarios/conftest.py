"""The flag with which transcripts are written anew: `pytest tests/scenarios --rewrite`, then read the difference."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write the answers of the transcripts anew")
