"""Suspend, resume and crash dump."""

from __future__ import annotations

from interlock.core.errors import GuestNotFound, OperationRejected
from interlock.core.states import PowerState, VmState
from interlock.driver.operation_context import Done, OperationContext


async def suspend(work: OperationContext) -> Done:
    """Save the guest's memory to a file, and end its QEMU process."""
    async with work.moving() as report:
        await work.hypervisor.save_memory(work.permit, work.id, report)
    return Done(power_state=PowerState.NONE)


async def undo_suspend(work: OperationContext) -> None:
    """Restore a guest whose memory was saved already."""
    if (await work.hypervisor.inspect(work.id)).memory_saved:
        async with work.moving() as report:
            await work.hypervisor.restore_memory(work.permit, work.id, work.spec, report)
        if work.instance.vm_state is VmState.PAUSED:
            await work.hypervisor.pause(work.permit, work.id)


async def resume(work: OperationContext) -> Done:
    """Restore the guest from its saved memory.

    Raises:
        OperationRejected: the file is missing (the guest is not booted instead), or could not be read and is kept.
    """
    try:
        async with work.moving() as report:
            await work.hypervisor.restore_memory(work.permit, work.id, work.spec, report)
    except GuestNotFound as error:
        raise OperationRejected(
            f"The guest cannot be resumed: {error.message}",
            remedy="Restore the file if you have it, or discard the guest's memory with a hard reboot.",
        ) from error
    except OperationRejected as error:
        raise OperationRejected(
            f"{error.message} The guest's memory is still saved.",
            remedy="Resume it again, or discard its memory and boot it with a hard reboot.",
        ) from error
    return Done(power_state=PowerState.RUNNING)


async def crash_dump(work: OperationContext) -> Done:
    """Write a dump of the guest's memory for a debugger; then remove the oldest dumps beyond `dumps_max`."""
    target = work.dumps.dump_path(work.id, work.request.id)
    async with work.moving() as report:
        await work.hypervisor.dump_memory(work.permit, work.id, target, report)
    others = [dump for dump in await work.dumps.dumps(work.id) if dump.id != work.request.id]
    spent = others[: max(0, len(others) + 1 - work.config.dumps_max)]
    for dump in spent:
        work.permit.check()
        await work.dumps.discard(dump)
    message = f"The dump {work.request.id} can be downloaded."
    if spent:
        message += f" At most {work.config.dumps_max} are kept; removed: {', '.join(dump.id for dump in spent)}."
    return Done(message=message)
