"""QEMU's image tool, as it is let near images of strangers: confined, limited, and told each format.

Where we are root it runs as an unprivileged user without a network; it is given names in one folder, in which it is
started, because it can reach no other. What is asked of it is not here.
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

from interlock.core.errors import NotResponding
from interlock.hypervisors.commands import Ended
from interlock.hypervisors.qemu.process import Account, confined

_ADDRESS_SPACE_BYTES: Final = 1 << 30
_OPEN_FILES: Final = 64
_OVERFLOW: Final = 65_534
"""The number that the kernel itself uses for users it cannot name."""
_LOOK_S: Final = 0.2
_PROBE_S: Final = 10.0


class Abandoned(Exception):
    """Nobody waits for the outcome any more."""


def unprivileged() -> Account | None:
    """The account that owns nothing, or None if we have no privileges to drop."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return Account(user_id=_OVERFLOW, group_id=_OVERFLOW)
    return Account(user_id=nobody.pw_uid, group_id=nobody.pw_gid)


class ImageTool(msgspec.Struct, frozen=True, kw_only=True):
    """How the tool is run."""

    account: Account | None = msgspec.field(default_factory=unprivileged)
    """As whom; None: as we are, for we have no privileges to drop."""
    timeout_ms: int = 600_000
    """How long converting an image may take."""
    look_timeout_ms: int = 30_000
    """How long looking at one may take."""
    bytes_max: int = 64 << 30
    """How large a file it may write."""

    @property
    def usable(self) -> bool:
        """Whether it is installed, and what confines it."""
        return all(shutil.which(name) for name in ("qemu-img", "prlimit", "setpriv"))

    def run(
        self, words: Sequence[str], folder: Path, timeout_ms: int, abandoned: Callable[[], bool] = lambda: False
    ) -> Ended:
        """Run `qemu-img` with `words` in `folder`. Blocks: call it in a thread.

        Raises:
            NotResponding: it was not done in time and has been ended.
            Abandoned: `abandoned` said so, and it has been ended.
        """
        limits = [f"--as={_ADDRESS_SPACE_BYTES}", f"--cpu={max(1, timeout_ms // 1000)}", f"--fsize={self.bytes_max}"]
        limits += ["--core=0", f"--nofile={_OPEN_FILES}"]
        command = [*_without_network(), *confined(["qemu-img", *words], folder, limits, self.account)]
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
                raise NotResponding("qemu-img was not done in time and has been ended.") from None


@functools.cache
def _without_network() -> tuple[str, ...]:
    """The words before a command that take the network from it; none where we may not."""
    words = ("unshare", "--net", "--")
    try:
        tried = subprocess.run([*words, "true"], capture_output=True, timeout=_PROBE_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return words if tried.returncode == 0 else ()
