"""Start, stop, reboot, pause, unpause."""

from __future__ import annotations

from interlock.core.errors import GuestNotFound, NotResponding
from interlock.core.states import PowerState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import ask_guest, boot_own, forget_memory, settle_resize, shut_down


async def start(work: OperationContext) -> Done:
    """Create what is missing, and boot the guest from its own disk; this confirms a pending resize."""
    return await boot_own(work)


async def stop(work: OperationContext) -> Done:
    """Ask the guest to power itself off, and power it off hard after the timeout, or at once for a hard stop.

    A paused or crashed guest is powered off at once.
    """
    message = await shut_down(work)
    await forget_memory(work)
    return Done(power_state=PowerState.NONE, message=message)


async def reboot(work: OperationContext) -> Done:
    """Reset the guest; a soft reboot first asks it to shut down, with the timeout of a stop."""
    if work.request.hard:
        await work.phase("reboot_started_hard")
        return await _reset(work, None)
    message = None
    if work.request.phase != "reboot_started":
        await work.phase("reboot_pending", "waiting for the guest to shut down")
        message = await ask_guest(work)
        await work.phase("reboot_started")
    return await _reset(work, message)


async def _reset(work: OperationContext, message: str | None) -> Done:
    """Reset a running guest; otherwise end the QEMU process and start one with the present spec.

    The latter also after a takeover, so that pending QMP commands of the last worker have no effect, and after a
    rescue, to boot the own root disk again.
    """
    seen = await work.hypervisor.inspect(work.id)
    runs = seen.responsive and seen.power_state in {PowerState.RUNNING, PowerState.PAUSED, PowerState.SHUTDOWN}
    if runs and not work.request.preempts and work.spec.rescue_image is None:
        try:
            await work.hypervisor.reset(work.permit, work.id)
        except (GuestNotFound, NotResponding):
            pass
        else:
            if work.instance.prior_spec is not None:
                await settle_resize(work)
            return Done(power_state=PowerState.RUNNING, message=message)
    await work.describe("power cycling the guest")
    await work.hypervisor.power_off(work.permit, work.id)
    await forget_memory(work)
    await work.release_strays()
    await boot_own(work)
    return Done(power_state=PowerState.RUNNING, message=message or "Powered off and on.")


async def pause(work: OperationContext) -> Done:
    await work.hypervisor.pause(work.permit, work.id)
    return Done(power_state=PowerState.PAUSED)


async def unpause(work: OperationContext) -> Done:
    await work.hypervisor.unpause(work.permit, work.id)
    return Done(power_state=PowerState.RUNNING)


async def pull_plug(work: OperationContext) -> None:
    """Undo a start: power off, and keep the disks."""
    await work.hypervisor.power_off(work.permit, work.id)
