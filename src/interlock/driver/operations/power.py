"""Start, stop, reboot, pause, unpause."""

from __future__ import annotations

from interlock.core.errors import NotResponding, NotThere
from interlock.core.states import PowerState
from interlock.driver.operations.bringing import ask_guest, boot_own, forget_memory, settle_resize, shut_down
from interlock.driver.work import Done, Work


async def start(work: Work) -> Done:
    """Make what is missing, and run the guest from its own disk; a resize that was not confirmed is, by that."""
    return await boot_own(work)


async def stop(work: Work) -> Done:
    """Ask the guest to power itself off, and pull the plug if it does not in time; or pull it at once if hard.

    A guest that cannot hear (paused, crashed) is not asked.
    """
    message = await shut_down(work)
    await forget_memory(work)
    return Done(power_state=PowerState.NONE, message=message)


async def reboot(work: Work) -> Done:
    """Reset the machine; the soft one asks the guest to shut down first, for so long as a stop would wait."""
    if work.request.hard:
        await work.phase("reboot_started_hard")
        return await _reset(work, None)
    message = None
    if work.request.phase != "reboot_started":
        await work.phase("reboot_pending", "waiting for the guest to shut down")
        message = await ask_guest(work)
        await work.phase("reboot_started")
    return await _reset(work, message)


async def _reset(work: Work, message: str | None) -> Done:
    """Reset a guest that runs; any other machine is powered off and on, so that it has what the spec says.

    So is one that the reboot took over: what its last worker had asked of it must not take effect any more. And so is
    one that is rescued, which boots its own disk again.
    """
    seen = await work.hypervisor.inspect(work.id)
    runs = seen.responsive and seen.power_state in {PowerState.RUNNING, PowerState.PAUSED, PowerState.SHUTDOWN}
    if runs and not work.request.preempts and work.spec.rescue_image is None:
        try:
            await work.hypervisor.reset(work.permit, work.id)
        except (NotThere, NotResponding):
            pass
        else:
            if work.instance.prior_spec is not None:
                await settle_resize(work)
            return Done(power_state=PowerState.RUNNING, message=message)
    await work.tell("powering the machine off and on")
    await work.hypervisor.power_off(work.permit, work.id)
    await forget_memory(work)
    await work.release_strays()
    await boot_own(work)
    return Done(power_state=PowerState.RUNNING, message=message or "Powered off and on.")


async def pause(work: Work) -> Done:
    await work.hypervisor.pause(work.permit, work.id)
    return Done(power_state=PowerState.PAUSED)


async def unpause(work: Work) -> Done:
    await work.hypervisor.unpause(work.permit, work.id)
    return Done(power_state=PowerState.RUNNING)


async def pull_plug(work: Work) -> None:
    """Undo a start: nothing runs, and what was made stays for the next one."""
    await work.hypervisor.power_off(work.permit, work.id)
