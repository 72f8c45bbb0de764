"""Runs programs and collects their output."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec

from interlock.core.errors import NotResponding


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """Exit status and output of a program."""

    status: int
    """Exit status, or the negative signal number."""
    output: bytes
    complaint: str
    """The last line of standard error, or an empty string."""


def run(command: list[str], *, timeout_s: float, folder: Path | None = None) -> Ended:
    """Run `command` without input, in the C locale, and wait for it. Blocks: call it in a thread.

    Raises:
        FileNotFoundError: the program is not installed.
        NotResponding: it timed out and was killed.
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
        raise NotResponding(f"{command[0]} timed out after {timeout_s:g} s and was killed.") from error
    lines = ended.stderr.decode("utf-8", "replace").strip().splitlines()
    return Ended(status=ended.returncode, output=ended.stdout, complaint=lines[-1].strip() if lines else "")
