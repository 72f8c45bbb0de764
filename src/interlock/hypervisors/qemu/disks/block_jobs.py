"""QEMU block jobs: started, followed, cancelled and dismissed.

A job stays when it has concluded (`auto-dismiss` off), so that its result is known after a crash of the server. What a
job copies, and what its result means, is not here.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import msgspec

from interlock.core.errors import GuestNotFound, NotResponding, OperationRejected
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.stall_timeout import copy_stall
from interlock.ports import Permit, Report

CONCLUDED: Final = "concluded"
READY: Final = "ready"
"""Source and target of a mirror are the same, and are kept so."""
STANDBY: Final = "standby"
"""As `READY`, but paused for a moment, as while QEMU pauses the guest."""


class Job(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A job, as `query-jobs` describes it."""

    id: str
    status: str
    current_progress: int
    total_progress: int
    error: str | None = None


async def jobs(guest: Guest) -> dict[str, Job]:
    """Return all jobs by id, concluded ones included. Raises as `Guest.query`."""
    found = msgspec.convert(await guest.query("query-jobs"), list[Job])
    return {job.id: job for job in found}


async def start(guest: Guest, permit: Permit, command: str, job_id: str, **arguments: Any) -> None:
    """Start a job. `arguments` are those of the command, with underscores. Raises as `Guest.execute`."""
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    limit = {"speed": guest.settings.copy_bytes_per_s} if guest.settings.copy_bytes_per_s else {}
    await guest.execute(permit, command, {"job-id": job_id, "auto-dismiss": False, **named, **limit})


async def follow(guest: Guest, job_id: str, what: str, report: Report, *, until: str = CONCLUDED) -> None:
    """Return when the job has that status, or has concluded successfully; report its progress.

    Raises:
        OperationRejected: it failed, or made no progress. `what` begins the message.
        GuestNotFound: the process has ended, or there is no such job.
        NotResponding: QEMU does not respond.
    """
    stall = copy_stall(guest.settings.copy_silence_timeout_ms, what)
    while True:
        guest.job_changed.clear()
        job = (await jobs(guest)).get(job_id)
        if job is None:
            raise GuestNotFound(f"{what}: the job no longer exists.")
        if job.error is not None:
            raise OperationRejected(f"{what} failed: {job.error.rstrip('.')}.", remedy=_remedy(job.error))
        if job.total_progress:
            report(job.current_progress, job.total_progress)
        if job.status in {until, CONCLUDED}:
            return
        stall.note(job)
        await _wait_for_change(guest)


def _remedy(error: str) -> str | None:
    if "No space left" in error or "quota exceeded" in error:
        return "Make room on the target file system, then try again."
    if "Input/output error" in error:
        return "Check the host's storage."
    return None


async def _wait_for_change(guest: Guest) -> None:
    """Wait until a job changes its status, or the next progress report is due."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(guest.settings.copy_look_interval_ms / 1000):
            await guest.job_changed.wait()


async def remove(guest: Guest, permit: Permit, job_id: str) -> None:
    """Cancel and dismiss a job, if it exists.

    Raises:
        NotResponding: it does not end.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + guest.settings.detach_timeout_ms / 1000
    while (job := (await jobs(guest)).get(job_id)) is not None:
        guest.job_changed.clear()
        # It may conclude between the query and the command, and cannot be cancelled while it does.
        with contextlib.suppress(OperationRejected):
            await guest.execute(permit, "job-dismiss" if job.status == CONCLUDED else "job-cancel", {"id": job_id})
            if job.status == CONCLUDED:
                return
        if loop.time() >= deadline:
            raise NotResponding(f"The block job {job_id} of VM {guest.instance_id} does not end.")
        await _wait_for_change(guest)
