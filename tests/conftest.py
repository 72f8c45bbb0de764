"""What all tests share: a process in which Ctrl-C means what it means in a terminal."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def _interrupts_are_heard() -> None:
    """A shell ignores SIGINT for what it runs in the background, and children inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
