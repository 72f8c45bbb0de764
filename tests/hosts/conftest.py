"""A server to which agents of other hosts can be added: real processes, real QEMU, the smallest guest."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes.real_fleet import Fleet


@pytest.fixture
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """`request.param` may have settings of the server."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    with tempfile.TemporaryDirectory(prefix="interlock-hosts-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        one = Fleet(folder, getattr(request, "param", None))
        try:
            one.start()
            yield one
        finally:
            one.clear()
