"""Steps that several operations share: guest shutdown, boot, and returning an instance to an earlier state."""

from __future__ import annotations

import asyncio
import itertools

import msgspec

from interlock.core.errors import GuestNotFound, NotResponding, OperationRejected
from interlock.core.records import InstanceUpdate, Spec
from interlock.core.state_stack import Memory, resolve_target, rests
from interlock.core.states import EXECUTING_STATES, PowerState, VmState
from interlock.driver.operation_context import Done, OperationContext
from interlock.ports import Observation


async def ask_guest(work: OperationContext) -> str | None:
    """Ask the guest to power itself off before the deadline; return a message for people if it did not.

    The deadline applies whether or not QEMU responds; the caller ends or resets the QEMU process afterwards.

    Raises:
        NotResponding: the host is unreachable, so that the QEMU process cannot be ended either.
    """
    timeout_ms = work.config.guest_shutdown_timeout_ms
    requests = _ShutdownRequests(work)
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            seen = await work.hypervisor.inspect(work.id)
            if not seen.responsive and work.request.preempts:
                # It took over from a request that timed out on this QEMU process: another attempt would, too.
                return "QEMU did not respond, so the guest was not asked to shut down."
            await requests.until_off(seen)
            return None
    except TimeoutError:
        pass
    if requests.answers:
        await work.describe("guest shutdown timed out: powering off hard")
        return f"Guest shutdown timed out after {timeout_ms / 1000:g} s; it was powered off hard."
    await work.describe("QEMU timed out: ending its process")
    return f"QEMU did not respond within {timeout_ms / 1000:g} s; its process was ended."


class _ShutdownRequests:
    """Repeated shutdown requests to a guest: one that still boots ignores its power button and has no agent yet."""

    def __init__(self, work: OperationContext) -> None:
        self._work = work
        self.answers = False
        """Whether QEMU responded to the last inspection."""
        # Alternate, in case the guest agent accepts the request and does nothing.
        self._ways = itertools.cycle((work.hypervisor.ask_shutdown, work.hypervisor.press_power_button))

    async def until_off(self, seen: Observation) -> None:
        """Return when the guest is not running (or paused, so that it cannot shut down)."""
        work, said = self._work, None
        while True:
            self.answers = seen.responsive
            if seen.responsive and seen.power_state is not PowerState.RUNNING:
                return
            if seen.responsive and not await self._ask():
                return
            if said is not seen.responsive:
                said = seen.responsive
                await work.describe(self._detail())
            elif seen.responsive:
                await work.alive()
            retry_ms = work.config.guest_shutdown_retry_ms
            if await work.while_alive(lambda: work.hypervisor.wait_powered_off(work.id), retry_ms):
                return
            seen = await work.hypervisor.inspect(work.id)

    async def _ask(self) -> bool:
        """Ask once; return whether there still is a guest."""
        try:
            await next(self._ways)(self._work.permit, self._work.id)
        except GuestNotFound:
            return False
        except (NotResponding, OperationRejected):
            pass  # retried until the deadline
        return True

    def _detail(self) -> str:
        limit = f"for {self._work.config.guest_shutdown_timeout_ms / 1000:g} s at most"
        if self.answers:
            return f"waiting for the guest to power off, {limit}"
        return f"QEMU does not respond: waiting {limit}, then its process is ended"


async def shut_down(work: OperationContext) -> str | None:
    """Shut the guest down and end its QEMU process; return a message for people if it did not power itself off."""
    message = None
    if not work.request.hard:
        message = await ask_guest(work)
    await work.hypervisor.power_off(work.permit, work.id)
    await work.release_strays()
    return message


async def settle_resize(work: OperationContext) -> None:
    """Remove every root disk but the present one, which confirms a pending resize.

    Call it before creating the next root disk: one of that number may be left over from a failed operation.
    """
    await work.hypervisor.drop_root_disks(work.permit, work.id, work.spec, frozenset({work.spec.root}))
    if work.instance.prior_spec is not None:
        await work.keep(InstanceUpdate(prior_spec=None))


async def remove_all(work: OperationContext) -> None:
    """Remove everything of the instance, including root disks in a shared folder; a running guest is ended first."""
    if work.spec.shared is not None:
        await work.hypervisor.power_off(work.permit, work.id)
        await _drop_shared(work)
    await work.hypervisor.undefine(work.permit, work.id)


async def drop_shared_disks(work: OperationContext) -> None:
    """Remove root disks of an instance on a fenced host from the shared folder."""
    if work.spec.shared is not None:
        await work.hosts.of(work.hosts.own).drop_root_disks(work.permit, work.id, work.spec, frozenset())


async def _drop_shared(work: OperationContext) -> None:
    """Remove the root disks from the shared folder, by the server's host if the instance's host lacks it."""
    own = work.hosts.of(work.hosts.own)
    try:
        await work.hypervisor.drop_root_disks(work.permit, work.id, work.spec, frozenset())
    except OperationRejected:
        if own is work.hypervisor:
            raise
        await own.drop_root_disks(work.permit, work.id, work.spec, frozenset())


async def define(work: OperationContext) -> None:
    """Create what is missing of the instance on its host, and record that its root disk was created.

    That is recorded before the guest runs: a root disk that is missing later was lost, and is not created again.
    """
    await work.hypervisor.define(work.permit, work.id, work.spec)
    if work.spec.has_root and not work.spec.root_made:
        await work.keep_changed(with_root)


def with_root(spec: Spec) -> Spec:
    """Return the spec with its root disk recorded as created."""
    return msgspec.structs.replace(spec, root_made=True)


def without_root(spec: Spec) -> Spec:
    """Return the spec for creating the root disk again, when its content is discarded or comes from elsewhere."""
    return msgspec.structs.replace(spec, root_made=False)


async def make_disk(work: OperationContext) -> None:
    """Create the root disk of an instance that never had one, before it is copied."""
    if not work.spec.root_made:
        await define(work)


async def boot(work: OperationContext) -> Done:
    """Create what is missing, and start the guest with its present spec, including concurrent component changes."""
    await work.refresh()
    if work.instance.detaching:
        # The QEMU process of a crashed guest still has the devices; the next one does not get them.
        await work.hypervisor.power_off(work.permit, work.id)
        await work.release_strays()
    await define(work)
    await work.refresh()
    await work.hypervisor.power_on(work.permit, work.id, work.spec)
    return Done(power_state=PowerState.RUNNING)


async def boot_own(work: OperationContext) -> Done:
    """Start the guest from its own root disk, which ends a rescue and confirms a pending resize."""
    await leave_rescue(work)
    done = await boot(work)
    await settle_resize(work)
    return done


async def leave_rescue(work: OperationContext) -> None:
    """End a rescue, so that the instance boots its own root disk again.

    The QEMU process is ended first, since it may have the rescue disk.
    """
    if work.spec.rescue_image is not None:
        await work.hypervisor.power_off(work.permit, work.id)
        await work.keep_changed(_unrescued)


def _unrescued(spec: Spec) -> Spec:
    return msgspec.structs.replace(spec, rescue_image=None)


async def forget_memory(work: OperationContext) -> None:
    """Discard the saved memory, if there is one."""
    if (await work.hypervisor.inspect(work.id)).memory_saved:
        await work.hypervisor.forget_memory(work.permit, work.id)


async def bring_back(work: OperationContext) -> Done:
    """Return an instance without a running guest to the state that its operation restores."""
    instance = work.instance
    return await bring_to(work, *resolve_target(work.request.operation, instance.vm_state, instance.state_stack))


async def bring_to(work: OperationContext, vm_state: VmState, memory: Memory = ()) -> Done:
    """Bring an instance without a running guest to `vm_state`: start its guest if one runs in that state.

    `memory` is the state stack there.
    """
    if vm_state not in EXECUTING_STATES or rests(vm_state, memory):
        return Done(power_state=PowerState.NONE)
    done = await boot(work)
    if vm_state is not VmState.PAUSED:
        return done
    await work.hypervisor.pause(work.permit, work.id)
    return Done(power_state=PowerState.PAUSED)
