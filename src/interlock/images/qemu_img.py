"""Runs qemu-img on untrusted images in a sandbox: resource limits, explicit formats, and the files in question.

As root, it runs as an unprivileged user of its own. vmdk, vhd, vhdx and vdi images are converted to standalone qcow2,
and inspected (`inspection`) before and after.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from interlock.confinement.host_users import HostUsers, temporary_user
from interlock.confinement.sandbox import Account, View, confined, namespaces_for
from interlock.core.errors import Invalid, NotResponding, StoreError, Unavailable
from interlock.images.atomic_files import full
from interlock.images.subprocess_runner import Ended

_ADDRESS_SPACE_BYTES: Final = 1 << 30
_OPEN_FILES: Final = 64
_STACK_BYTES: Final = 2 << 20
_MARKS: Final = ("MALLOC_ARENA_MAX=1",)
"""On a busy machine it starts up to 64 threads: with 8 MiB of stack and an arena of 64 MiB for each, they would not fit
into its address space."""
_READ_ONLY: Final = 0o400
_READ_WRITE: Final = 0o600
_LOOK_S: Final = 0.2


class Abandoned(Exception):
    """The operation was cancelled."""


@contextlib.contextmanager
def _given(to: Account | None, reads: Path, writes: Path | None) -> Iterator[None]:
    """Give files to a user for the block. Raises `StoreError`."""
    try:
        for path, mode in ((reads, _READ_ONLY), (writes, _READ_WRITE)):
            if path is not None and to is not None:
                path.chmod(mode)
                os.chown(path, to.user_id, to.group_id)
        yield
    except OSError as error:
        raise StoreError(f"{error.filename} cannot be given to the user of QEMU's tool: {error.strerror}.") from error
    finally:
        for path in (reads, writes):
            if path is not None and to is not None:
                os.chown(path, os.geteuid(), os.getegid())
                path.chmod(_READ_WRITE)


class ImageTool(msgspec.Struct, frozen=True, kw_only=True):
    """Settings for running qemu-img."""

    users: HostUsers | None = None
    """The users of this host, one of which each run gets as root; None: `nobody`."""
    program_paths: tuple[str, ...] = ()
    """What it needs besides itself and the system's libraries."""
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
        self,
        words: Sequence[str],
        timeout_ms: int,
        abandoned: Callable[[], bool] = lambda: False,
        *,
        reads: Path,
        writes: Path | None = None,
    ) -> Ended:
        """Run `qemu-img` with `words` in the folder of `reads`. Blocks: call it in a thread.

        Args:
            words: its arguments; they name the files relative to the folder.
            timeout_ms: the time limit, in milliseconds.
            abandoned: asked now and then whether to stop.
            reads: the file that it reads.
            writes: an existing file in the same folder that it writes to.

        Raises:
            NotResponding: it timed out and was killed.
            Abandoned: `abandoned` returned true, and it was killed.
            StoreError: the files cannot be given to its user.
        """
        limits = [f"--as={_ADDRESS_SPACE_BYTES}", f"--cpu={max(1, timeout_ms // 1000)}", f"--fsize={self.bytes_max}"]
        limits += ["--core=0", f"--nofile={_OPEN_FILES}", f"--stack={_STACK_BYTES}"]
        files = (reads, *map(Path, self.program_paths))
        written = () if writes is None else (writes,)
        view = View(folder=reads.parent, whole=False, files=files, written=written, processes=False)
        with temporary_user(self.users, "qemu-img") as account, _given(account, reads, writes):
            command = confined(
                ["qemu-img", *words],
                view,
                limits,
                account,
                _MARKS,
                namespaces=namespaces_for(account).namespaces,
                dies_with_parent=True,
            )
            return _run(command, time.monotonic() + timeout_ms / 1000, abandoned)


def _run(command: list[str], until: float, abandoned: Callable[[], bool]) -> Ended:
    with subprocess.Popen(  # noqa: S603 - the words are this package's own, never through a shell
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            output, errors = _followed(process, until, abandoned)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
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


_DRIVERS: Final = {"vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}
"""QEMU's block driver by format."""


def needs_conversion(image_format: str) -> bool:
    """Whether an image of that format must be converted."""
    return image_format in _DRIVERS


def convert(
    tool: ImageTool, source: Path, target: Path, named: Path, image_format: str, abandoned: Callable[[], bool]
) -> None:
    """Convert the image `source` to `target`, an empty file in the same folder. Blocks.

    `named` is the caller's path, for messages.

    Raises:
        Invalid: QEMU cannot read it, it would become too large, or it timed out.
        StoreFull: no space left.
        Unavailable: qemu-img is not installed.
        Abandoned: `abandoned` returned true.
    """
    if not tool.usable:
        raise Unavailable(
            f"Converting a {image_format} image requires qemu-img, which is not installed.",
            remedy="Run `sudo apt-get install qemu-utils`, or convert it to qcow2 elsewhere.",
        )
    driver = _DRIVERS[image_format]
    # Relative names, so that the tool's user needs no access to the parent folders.
    words = ["convert", "-q", "-f", driver, "-O", "qcow2", f"./{source.name}", f"./{target.name}"]
    try:
        ended = tool.run(words, tool.timeout_ms, abandoned, reads=source, writes=target)
    except NotResponding as error:
        raise Invalid(
            f"{named.name}: converting the image timed out: it took longer than {tool.timeout_ms} ms.",
            remedy="Convert it to qcow2 elsewhere, or have image_conversion_timeout_ms raised.",
        ) from error
    if ended.status == 0:
        return
    if ended.status in {-signal.SIGXFSZ, 128 + signal.SIGXFSZ} or "File too large" in ended.complaint:
        raise Invalid(
            f"{named.name}: the image would become larger than {tool.bytes_max} bytes.",
            remedy="Have image_bytes_max raised if you trust the image.",
        )
    if "No space left" in ended.complaint or "quota exceeded" in ended.complaint:
        raise full(source.parent)
    reason = ended.complaint.rpartition("': ")[2] or f"it ended with status {ended.status}"
    raise Invalid(f"{named.name}: QEMU cannot convert the image: {reason.rstrip('.')}.")
