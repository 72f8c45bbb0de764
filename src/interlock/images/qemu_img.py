"""Runs qemu-img on untrusted images in a sandbox: resource limits, explicit formats, and one folder.

As root, it runs as an unprivileged user without network.
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from interlock.confinement.sandbox import Account, View, confined
from interlock.core.errors import NotResponding
from interlock.images.subprocess_runner import Ended

_ADDRESS_SPACE_BYTES: Final = 1 << 30
_OPEN_FILES: Final = 64
_STACK_BYTES: Final = 2 << 20
_MARKS: Final = ("MALLOC_ARENA_MAX=1",)
"""On a busy machine it starts up to 64 threads: with 8 MiB of stack and an arena of 64 MiB for each, they would not fit
into its address space."""
_OVERFLOW: Final = 65_534
"""The kernel's overflow uid."""
_LOOK_S: Final = 0.2
_PROBE_S: Final = 10.0


class Abandoned(Exception):
    """The operation was cancelled."""


def unprivileged() -> Account | None:
    """Return the account `nobody`, or None if this process is not root."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return Account(user_id=_OVERFLOW, group_id=_OVERFLOW)
    return Account(user_id=nobody.pw_uid, group_id=nobody.pw_gid)


class ImageTool(msgspec.Struct, frozen=True, kw_only=True):
    """Settings for running qemu-img."""

    account: Account | None = msgspec.field(default_factory=unprivileged)
    """The user it runs as; None: this process's."""
    timeout_ms: int = 600_000
    """Time limit of a conversion or check."""
    look_timeout_ms: int = 30_000
    """Time limit of `qemu-img info`."""
    bytes_max: int = 64 << 30
    """Maximum size of a file it writes."""

    @property
    def usable(self) -> bool:
        """Whether it and the sandbox tools are installed."""
        return all(shutil.which(name) for name in ("qemu-img", "prlimit", "setpriv"))

    def run(
        self, words: Sequence[str], folder: Path, timeout_ms: int, abandoned: Callable[[], bool] = lambda: False
    ) -> Ended:
        """Run `qemu-img` with `words` in `folder`. Blocks: call it in a thread.

        Raises:
            NotResponding: it timed out and was killed.
            Abandoned: `abandoned` returned true, and it was killed.
        """
        limits = [f"--as={_ADDRESS_SPACE_BYTES}", f"--cpu={max(1, timeout_ms // 1000)}", f"--fsize={self.bytes_max}"]
        limits += ["--core=0", f"--nofile={_OPEN_FILES}", f"--stack={_STACK_BYTES}"]
        command = [
            *_without_network(),
            *confined(["qemu-img", *words], View(folder=folder), limits, self.account, _MARKS),
        ]
        with subprocess.Popen(  # noqa: S603 - the words are this package's own, never through a shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                output, errors = _followed(process, time.monotonic() + timeout_ms / 1000, abandoned)
            except BaseException:
                process.kill()
                raise
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        return Ended(status=process.returncode, output=output, complaint=lines[-1].strip() if lines else "")


def _followed(process: subprocess.Popen[bytes], until: float, abandoned: Callable[[], bool]) -> tuple[bytes, bytes]:
    while True:
        try:
            return process.communicate(timeout=_LOOK_S)
        except subprocess.TimeoutExpired:
            if abandoned():
                raise Abandoned from None
            if time.monotonic() > until:
                raise NotResponding("qemu-img timed out and was killed.") from None


@functools.cache
def _without_network() -> tuple[str, ...]:
    """Return a command prefix that isolates the network; empty if not permitted."""
    words = ("unshare", "--net", "--")
    try:
        tried = subprocess.run([*words, "true"], capture_output=True, timeout=_PROBE_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return words if tried.returncode == 0 else ()
