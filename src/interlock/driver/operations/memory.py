"""Suspend, resume and crash dump: what is done with a guest's memory."""

from __future__ import annotations

from interlock.core.errors import NotThere, Refused
from interlock.core.states import PowerState, VmState
from interlock.driver.operations.bringing import boot_own
from interlock.driver.work import Done, Work


async def suspend(work: Work) -> Done:
    """Write the guest's memory to a file, and end what held it."""
    async with work.moving() as report:
        await work.hypervisor.save_memory(work.permit, work.id, report)
    return Done(power_state=PowerState.NONE)


async def undo_suspend(work: Work) -> None:
    """Let the guest go on that is saved already; one that is not does so by itself."""
    if (await work.hypervisor.inspect(work.id)).memory_saved:
        async with work.moving() as report:
            await work.hypervisor.restore_memory(work.permit, work.id, work.spec, report)
        if work.instance.vm_state is VmState.PAUSED:
            await work.hypervisor.pause(work.permit, work.id)


async def resume(work: Work) -> Done:
    """Let the guest go on from its saved memory; where that is gone, start it afresh and say so.

    Raises:
        Refused: it could not be read. It is still saved.
    """
    try:
        async with work.moving() as report:
            await work.hypervisor.restore_memory(work.permit, work.id, work.spec, report)
    except NotThere:
        await boot_own(work)
        return Done(
            power_state=PowerState.RUNNING, message="No memory was saved any more, so the guest was started afresh."
        )
    except Refused as error:
        raise Refused(
            f"{error.message} The guest's memory is still saved.",
            remedy="Resume it again, or give its memory up and start it afresh with a hard reboot.",
        ) from error
    return Done(power_state=PowerState.RUNNING)


async def crash_dump(work: Work) -> Done:
    """Write a dump of the guest's memory for a debugger; the guest is afterwards what it was.

    What is one too many then is the oldest, and goes: a dump is removed only once there is a newer one.
    """
    target = work.dumps.dump_path(work.id, work.request.id)
    async with work.moving() as report:
        await work.hypervisor.dump_memory(work.permit, work.id, target, report)
    others = [dump for dump in await work.dumps.dumps(work.id) if dump.id != work.request.id]
    spent = others[: max(0, len(others) + 1 - work.config.dumps_max)]
    for dump in spent:
        work.permit.check()
        await work.dumps.discard(dump)
    message = f"The dump {work.request.id} is there to be downloaded."
    if spent:
        message += f" {work.config.dumps_max} are kept, so that {', '.join(dump.id for dump in spent)} was removed."
    return Done(message=message)
