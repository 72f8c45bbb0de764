"""Running another program to its end and keeping what it said. For adapters here only; what it means is theirs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec

from interlock.core.errors import NotResponding


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a program ended and what it wrote."""

    status: int
    """Its exit status; the negative number of the signal that ended it."""
    output: bytes
    complaint: str
    """The last line that it wrote to its standard error, or an empty string."""


def run(command: list[str], *, timeout_s: float, folder: Path | None = None) -> Ended:
    """Run `command` without input, in the C locale, and wait for it. Blocks: call it in a thread.

    Raises:
        FileNotFoundError: the program is not installed.
        NotResponding: it was not done after `timeout_s` and has been ended.
    """
    try:
        ended = subprocess.run(  # noqa: S603 - the commands are this package's own, never through a shell
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NotResponding(f"{command[0]} was not done after {timeout_s:g} s and has been ended.") from error
    lines = ended.stderr.decode("utf-8", "replace").strip().splitlines()
    return Ended(status=ended.returncode, output=ended.stdout, complaint=lines[-1].strip() if lines else "")
