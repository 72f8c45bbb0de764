"""Runs programs and collects their output; sandboxes a command to a folder, limits and an unprivileged user."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from interlock.core.errors import NotResponding


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """An unprivileged user that programs run as."""

    user_id: int
    group_id: int
    group_ids: tuple[int, ...] = ()
    """Further groups."""


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


def confined(
    command: Sequence[str], folder: Path, limits: Sequence[str], to: Account | None, marks: Sequence[str] = ()
) -> list[str]:
    """Wrap a command to run in `folder`, with resource limits and without privileges.

    `marks` are environment variables besides PATH, as NAME=VALUE.
    """
    words = ["env", "-i", f"--chdir={folder}", f"PATH={os.environ.get('PATH', os.defpath)}", *marks]
    words += ["prlimit", *limits, "--", "setpriv", "--no-new-privs"]
    if to is not None:
        words += [f"--reuid={to.user_id}", f"--regid={to.group_id}"]
        words += ["--groups=" + ",".join(map(str, to.group_ids)) if to.group_ids else "--clear-groups"]
        words += ["--inh-caps=-all", "--bounding-set=-all"]
    return [*words, "--", *command]
