"""The image tool at work on something long: it tells how far it is, ends when its worker does, and with this process.

What it is told to do is the caller's. Steps that are over at once go through `hypervisors.commands`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from interlock.core.errors import NotResponding, Refused
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.hypervisors.qemu.silence import Silence

_PROGRESS: Final = re.compile(rb"\(([0-9.]+)/100%\)")
_READ_BYTES: Final = 4096


async def use_image_tool(words: list[str], what: str, settings: QemuSettings, moved: Callable[[float], None]) -> None:
    """Run the image tool, and tell `moved` how much is done, 0 to 1.

    Args:
        words: its arguments; with `-p` among them it tells its progress.
        what: what it does, as the beginning of a sentence about how it failed.
        settings: where it is, and how long it may make no progress.
        moved: what it raises ends the tool, and is raised here.

    Raises:
        Refused: it failed, with its own words; or it made no progress.
        NotResponding: it was killed and has not ended.
    """
    process = await asyncio.create_subprocess_exec(
        # Whoever takes over after we were killed must not find its disk in use by a tool that works for nobody.
        *("setpriv", "--pdeathsig", "KILL", "--", settings.image_tool_binary, *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert process.stderr is not None
    complaining = asyncio.create_task(process.stderr.read())
    try:
        await _listen(process, Silence(settings.copy_silence_timeout_ms, what), settings, moved)
        status, complaint = await process.wait(), await complaining
    finally:
        await _end(process, settings)
        complaining.cancel()
    if status != 0:
        lines = complaint.decode("utf-8", "replace").strip().splitlines()
        raise Refused(f"{what} failed: {lines[-1] if lines else f'the image tool ended with {status}'}")


async def _listen(
    process: asyncio.subprocess.Process, silence: Silence, settings: QemuSettings, moved: Callable[[float], None]
) -> None:
    """Return when the tool has said its last word."""
    assert process.stdout is not None
    done = 0.0
    while True:
        chunk = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.copy_look_interval_ms / 1000):
                chunk = await process.stdout.read(_READ_BYTES)
        if chunk == b"":
            return
        told = _PROGRESS.findall(chunk or b"")
        if told:
            done = float(told[-1]) / 100
            moved(done)
        # A hundredth of a large disk takes long; what was read and written tells that it gets on.
        silence.note((done, _moved_bytes(process.pid)))


def _moved_bytes(process_id: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process_id}/io").read_bytes()
    return b""


async def _end(process: asyncio.subprocess.Process, settings: QemuSettings) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    try:
        async with asyncio.timeout(settings.kill_timeout_ms / 1000):
            await process.wait()
    except TimeoutError:
        raise NotResponding(
            f"The image tool, process {process.pid}, was killed and has not ended.",
            remedy="It probably waits for a disk that does not answer; look at the host's storage.",
        ) from None
