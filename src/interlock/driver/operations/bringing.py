"""What performances of several families share: shutting a guest down, and bringing an instance to where it was."""

from __future__ import annotations

import msgspec

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.core.operations import Memory, land, rests
from interlock.core.records import Kept, Spec
from interlock.core.states import PowerState, VmState
from interlock.driver.work import Done, Work


async def ask_guest(work: Work) -> str | None:
    """Ask the guest to power off and wait; what to tell people if it did not, or could not be asked."""
    seen = await work.hypervisor.inspect(work.id)
    if not seen.responsive:
        if work.request.preempts:
            # It took over from something that this machine had left without an answer: asking again helps nobody.
            return "The machine gave no answer, and was not asked again."
        raise NotResponding("The machine gives no answer, so its guest cannot be asked to power off.")
    if seen.power_state is not PowerState.RUNNING:
        return None
    try:
        await work.hypervisor.ask_shutdown(work.permit, work.id)
    except NotThere:
        return None
    timeout_ms = work.config.guest_shutdown_timeout_ms
    await work.tell(f"waiting for the guest to power off, for {timeout_ms / 1000:g} s at most")
    if await work.while_alive(lambda: work.hypervisor.wait_powered_off(work.id), timeout_ms):
        return None
    message = f"The guest did not power off within {timeout_ms / 1000:g} s; the plug was pulled."
    await work.tell("the guest did not power off in time: pulling the plug")
    return message


async def shut_down(work: Work) -> str | None:
    """Do what a stop does; what to tell people if the guest did not power itself off."""
    message = None
    if not work.request.hard:
        message = await ask_guest(work)
    await work.hypervisor.power_off(work.permit, work.id)
    await work.release_strays()
    return message


async def settle_resize(work: Work) -> None:
    """Let go of every root disk but the one that the instance has now, and so of a resize that was not confirmed.

    Whatever makes the next root disk begins with this: one of that number may be left of something that failed.
    """
    await work.hypervisor.drop_root_disks(work.permit, work.id, work.spec, frozenset({work.spec.root}))
    if work.instance.prior_spec is not None:
        await work.keep(Kept(prior_spec=None))


async def remove_all(work: Work) -> None:
    """Remove everything of the instance, its root disks in a shared folder too; a running guest is ended first."""
    if work.spec.shared is not None:
        await work.hypervisor.power_off(work.permit, work.id)
        await _drop_shared(work)
    await work.hypervisor.undefine(work.permit, work.id)


async def _drop_shared(work: Work) -> None:
    """Remove the root disks from the shared folder: where its host has that no more, the server's own host does it."""
    own = work.hosts.of(work.hosts.own)
    try:
        await work.hypervisor.drop_root_disks(work.permit, work.id, work.spec, frozenset())
    except Refused:
        if own is work.hypervisor:
            raise
        await own.drop_root_disks(work.permit, work.id, work.spec, frozenset())


async def make_disk(work: Work) -> None:
    """Make the root disk of an instance that was stopped before it had one, for whatever copies it."""
    if not work.instance.launched:
        await work.hypervisor.define(work.permit, work.id, work.spec)


async def boot(work: Work) -> Done:
    """Make what is missing, and run the guest as the spec says, with what was swapped or plugged in beside this."""
    await work.refresh()
    await work.hypervisor.define(work.permit, work.id, work.spec)
    await work.refresh()
    await work.hypervisor.power_on(work.permit, work.id, work.spec)
    return Done(power_state=PowerState.RUNNING)


async def boot_own(work: Work) -> Done:
    """Run the guest from its own disk, as something else than a resize or its reversion asked.

    A rescue ends with that, and a resize that nobody has confirmed is confirmed.
    """
    await leave_rescue(work)
    done = await boot(work)
    await settle_resize(work)
    return done


async def leave_rescue(work: Work) -> None:
    """Have the instance boot its own disk from now on. To be called before whatever boots it, unless that rescues it.

    What still holds the guest is ended first, since it may have the rescue disk.
    """
    if work.spec.rescue_image is not None:
        await work.hypervisor.power_off(work.permit, work.id)
        await work.keep_changed(_unrescued)


def _unrescued(spec: Spec) -> Spec:
    return msgspec.structs.replace(spec, rescue_image=None)


async def forget_memory(work: Work) -> None:
    """Give up the memory of a guest that is not resumed any more."""
    if (await work.hypervisor.inspect(work.id)).memory_saved:
        await work.hypervisor.forget_memory(work.permit, work.id)


async def bring_back(work: Work) -> Done:
    """Bring an instance of which no guest runs to what holds of one where undoing leads: to what it remembers."""
    instance = work.instance
    return await bring_to(work, *land(work.request.operation, instance.vm_state, instance.memory))


async def bring_to(work: Work, vm_state: VmState, memory: Memory = ()) -> Done:
    """Bring an instance of which no guest runs to what holds of one in that state, with that memory.

    Where a guest runs in that state, one is started. Everywhere else there is nothing to do: what is stopped stays so,
    and what is suspended still has its memory saved.
    """
    match vm_state:
        case VmState.ACTIVE | VmState.RESCUED | VmState.RESIZED if not rests(vm_state, memory):
            return await boot(work)
        case VmState.PAUSED:
            await boot(work)
            await work.hypervisor.pause(work.permit, work.id)
            return Done(power_state=PowerState.PAUSED)
        case _:
            return Done(power_state=PowerState.NONE)
