"""What tests mount is gone after them, however they end."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pytest

from small_file_systems import fill, small_file_system


def test_a_file_system_goes_with_the_block_that_fails_on_it_and_leaves_a_file_open(tmp_path: Path) -> None:
    folder, left_open = tmp_path / "small", list[IO[bytes]]()

    def fail() -> None:
        with small_file_system(folder, "1m"):
            assert folder.is_mount()
            fill(folder / "ballast")
            left_open.append((folder / "ballast").open("rb"))
            raise RuntimeError("failed here")

    with pytest.raises(RuntimeError, match="failed here"):
        fail()
    assert not folder.is_mount()
    left_open[0].close()
