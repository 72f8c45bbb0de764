"""Jobs of a QEMU that copy disks: followed until they are where they should be, and ended.

A job is begun so that it stays when it has ended (`auto-dismiss` off): whoever finds it after a crash of ours learns
how it ended. What a job copies, and what its end means, is not here.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import msgspec

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.silence import Silence
from interlock.ports import Permit, Report

ENDED: Final = "concluded"
READY: Final = "ready"
"""What is copied and its copy are the same, and are kept so."""


class Job(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What QEMU says of a job."""

    id: str
    status: str
    current_progress: int
    total_progress: int
    error: str | None = None


async def jobs(guest: Guest) -> dict[str, Job]:
    """The jobs that there are, ended ones included, by id. Raises as `Guest.look`."""
    found = msgspec.convert(await guest.ask("query-jobs"), list[Job])
    return {job.id: job for job in found}


async def begin(guest: Guest, permit: Permit, command: str, job_id: str, **arguments: Any) -> None:
    """Begin a job that copies. `arguments` are those of the command, with underscores. Raises as `Guest.tell`."""
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    limit = {"speed": guest.settings.copy_bytes_per_s} if guest.settings.copy_bytes_per_s else {}
    await guest.tell(permit, command, {"job-id": job_id, "auto-dismiss": False, **named, **limit})


async def follow(guest: Guest, job_id: str, what: str, report: Report, *, until: str = ENDED) -> None:
    """Return when the job is in that state, or has ended well; tell meanwhile how far it is.

    Raises:
        Refused: it failed, with QEMU's words; or it made no progress. `what` begins the sentence.
        NotThere: the process has ended, or there is no such job.
        NotResponding: QEMU gave no answer.
    """
    silence = Silence(guest.settings.copy_silence_timeout_ms, what)
    while True:
        guest.job_news.clear()
        job = (await jobs(guest)).get(job_id)
        if job is None:
            raise NotThere(f"{what}: the job is not there any more.")
        if job.error is not None:
            raise Refused(f"{what} failed: {job.error.rstrip('.')}.", remedy=_remedy(job.error))
        if job.total_progress:
            report(job.current_progress, job.total_progress)
        if job.status in {until, ENDED}:
            return
        silence.note(job)
        await _news(guest)


def _remedy(error: str) -> str | None:
    if "No space left" in error or "quota exceeded" in error:
        return "Make room on the file system that is copied to, then ask again."
    if "Input/output error" in error:
        return "Look at the storage of the host."
    return None


async def _news(guest: Guest) -> None:
    """Wait until a job of the guest goes on to its next state, or for as long as progress may go untold."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(guest.settings.copy_look_interval_ms / 1000):
            await guest.job_news.wait()


async def end(guest: Guest, permit: Permit, job_id: str) -> None:
    """End a job, at work or not, and forget it; does nothing where there is none.

    Raises:
        NotResponding: it does not end.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + guest.settings.detach_timeout_ms / 1000
    while (job := (await jobs(guest)).get(job_id)) is not None:
        guest.job_news.clear()
        # It may come to its end, or refuse to be ended while it does, between our question and the command.
        with contextlib.suppress(Refused):
            await guest.tell(permit, "job-dismiss" if job.status == ENDED else "job-cancel", {"id": job_id})
            if job.status == ENDED:
                return
        if loop.time() >= deadline:
            raise NotResponding(f"The job {job_id} of instance {guest.instance_id} does not end.")
        await _news(guest)
