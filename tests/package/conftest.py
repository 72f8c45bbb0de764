"""What `make package` makes, built once for all tests of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from built_package import copy_sources, make_package


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder dist of this source tree."""
    return make_package(copy_sources(tmp_path_factory.mktemp("sources") / "interlock"))
