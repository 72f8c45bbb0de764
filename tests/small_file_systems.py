"""File systems that are soon full, for tests of what happens then."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size (as in `16m`) at `folder`, which goes with the block however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs privileges that this user does not have")
    try:
        yield folder
    finally:
        # Lazily: something may have a file open there, such as a store that a failed test did not close.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Write to a file until there is no space for one more byte."""
    with ballast.open("ab", buffering=0) as file:
        for piece in (1 << 16, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(piece)):
                    pass
