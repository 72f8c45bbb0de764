"""Runs qemu-img for long operations: with progress, and killed when its worker or the server ends.

It reads disks that guests have written, so that it sees these disks only, and has no capabilities. As root it keeps the
user, who owns the disks. Short operations, which read none, use `images.subprocess_runner`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from interlock.confinement.sandbox import View, confined, namespaces_for
from interlock.core.errors import NotResponding, OperationRejected
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.hypervisors.qemu.stall_timeout import StallTimeout, copy_stall

_PROGRESS: Final = re.compile(rb"\(([0-9.]+)/100%\)")
_READ_BYTES: Final = 4096


async def run_qemu_img(
    words: list[str],
    what: str,
    settings: QemuSettings,
    on_progress: Callable[[float], None],
    *,
    reads: Sequence[Path] = (),
    writes: Path,
) -> None:
    """Run qemu-img, and call `on_progress` with the share that is done, 0 to 1.

    Args:
        words: its arguments; with `-p` it reports progress.
        what: what it does, as the beginning of an error message.
        settings: its path, and how long it may make no progress.
        on_progress: an exception in it kills qemu-img, and is raised here.
        reads: the files that it reads.
        writes: the existing file that it writes to.

    Raises:
        OperationRejected: it failed, or made no progress.
        NotResponding: it was killed and has not ended.
    """
    files = (*reads, *map(Path, settings.program_paths))
    command = confined(
        [settings.image_tool_binary, *words],
        View(folder=Path("/"), whole=False, files=files, written=(writes,), processes=False),
        ["--core=0"],
        None,
        ["LC_ALL=C"],
        namespaces=(await asyncio.to_thread(namespaces_for, None)).namespaces,
        # After a crash of the server, the disk must not be locked by a qemu-img that nobody waits for.
        dies_with_parent=True,
    )
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    reading_errors = asyncio.create_task(process.stderr.read())
    try:
        await _follow(process, copy_stall(settings.copy_silence_timeout_ms, what), settings, on_progress)
        status, errors = await process.wait(), await reading_errors
    finally:
        await _end(process, settings)
        reading_errors.cancel()
    if status != 0:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        raise OperationRejected(f"{what} failed: {lines[-1] if lines else f'qemu-img exited with {status}'}")


async def _follow(
    process: asyncio.subprocess.Process,
    stall: StallTimeout,
    settings: QemuSettings,
    on_progress: Callable[[float], None],
) -> None:
    """Return when qemu-img has closed its output."""
    assert process.stdout is not None
    done = 0.0
    while True:
        chunk = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.copy_look_interval_ms / 1000):
                chunk = await process.stdout.read(_READ_BYTES)
        if chunk == b"":
            return
        progress = _PROGRESS.findall(chunk or b"")
        if progress:
            done = float(progress[-1]) / 100
            on_progress(done)
        # One per cent of a large disk takes long: bytes read and written show progress in between.
        stall.note((done, _transferred(process.pid)))


def _transferred(process_id: int) -> bytes:
    """Return how much the process and its children have read and written, in the kernel's words."""
    place, found = Path(f"/proc/{process_id}"), b""
    with contextlib.suppress(OSError):
        children = (place / f"task/{process_id}/children").read_text().split()
        for one in (place, *(Path("/proc", child) for child in children)):
            found += (one / "io").read_bytes()
    return found


async def _end(process: asyncio.subprocess.Process, settings: QemuSettings) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(settings.kill_timeout_ms / 1000):
            await process.wait()
    except TimeoutError:
        raise NotResponding(
            f"qemu-img (process {process.pid}) was killed and has not ended.",
            remedy="It probably waits for I/O: check the host's storage.",
        ) from None
