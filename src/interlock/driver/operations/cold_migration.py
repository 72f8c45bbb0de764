"""Cold migration: move an instance to another host with its guest powered off.

Its root disk is exported to a file on the server, and imported on the target without backing file; one in a shared
folder stays. The record says which host has the instance: until it names the target, the target's copy is disposable;
from then on the source's is.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import Fenced, HypervisorError, InterlockError, NotResponding, OperationRejected
from interlock.core.records import InstanceUpdate, Spec
from interlock.core.states import VmState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import bring_to, make_disk, settle_resize, shut_down, without_root
from interlock.driver.operations.live_migration import answering, drop_there, require_other, require_root


async def migrate(work: OperationContext) -> Done:
    """Move the instance to the target host, and start it there if it was active."""
    target = str(work.request.parameters["host"])
    message = None
    if work.instance.host != target:
        require_other(work, target)
        try:
            message = await _bring(work, target)
        except (NotResponding, Fenced):
            raise
        except InterlockError:
            await _stay(work, target)
            raise
    return await _arrive(work, message)


async def undo_migrate(work: OperationContext) -> None:
    """Restore the instance on the source. One that has arrived already stays on the target."""
    await work.alive()  # read the record after all pending writes
    target = str(work.request.parameters["host"])
    if work.instance.host == target:
        await _arrive(work, None)
        raise OperationRejected(f"The VM was already migrated to host {target}.")
    if work.request.detail is not None:
        await shut_down(work)  # it was asked to shut down, so it must not be taken for a running guest
    await _stay(work, target)


async def _bring(work: OperationContext, target: str) -> str | None:
    """Copy the instance to the target; return a message for people if its guest did not power itself off."""
    there, spec = work.hosts.of(target), work.spec
    with answering(target):
        await there.undefine(work.permit, work.id)
        await require_root(work, there)
        if spec.shared is not None or not spec.root_is_whole:
            # Find what the target lacks before the guest is shut down.
            await there.define(work.permit, work.id, spec if spec.shared is not None else without_root(spec))
    if work.instance.vm_state is VmState.ACTIVE:
        await work.describe("shutting the guest down")
    message = await shut_down(work)
    await make_disk(work)
    moved = _moved(spec)
    if moved.root != spec.root:
        await _copy_root(work, target, moved)
    with answering(target):
        await there.define(work.permit, work.id, moved)
        if spec.shared is None:
            await there.drop_root_disks(work.permit, work.id, moved, frozenset({moved.root}))
    await work.keep(InstanceUpdate(host=target, left_host=work.instance.host, spec=moved, prior_spec=None))
    return message


def _moved(spec: Spec) -> Spec:
    """Return the spec on the target, without a rescue."""
    gone = msgspec.structs.replace(spec, rescue_image=None)
    if spec.shared is not None or not spec.has_root:
        return gone
    return msgspec.structs.replace(gone, root=spec.root + 1, root_is_whole=True)


async def _copy_root(work: OperationContext, target: str, moved: Spec) -> None:
    # The export of an earlier attempt may be stale: the guest may have run since.
    await _discard(work)
    draft = work.images.draft_path(work.request.id)
    async with work.moving() as report:
        await work.hypervisor.export_root_disk(work.permit, work.id, work.spec, draft, report)
    await work.describe(f"sending the root disk to {target}")
    with answering(target):
        async with work.moving() as report:
            await work.hosts.of(target).root_disk_from(work.permit, work.id, moved, draft, report)
    await _discard(work)


async def _discard(work: OperationContext) -> None:
    work.permit.check()
    await work.images.discard(work.request.id)


async def _stay(work: OperationContext, target: str) -> None:
    """Restore the instance on the source, and clean up the target."""
    await drop_there(work, target)
    await _discard(work)
    work.brought_back = True
    await bring_to(work, work.instance.vm_state)


async def _arrive(work: OperationContext, message: str | None) -> Done:
    """Restore the instance's state on the host in its record, and clean up the source."""
    await _discard(work)
    try:
        if work.spec.shared is not None:
            await settle_resize(work)
        done = await bring_to(work, work.instance.vm_state)
    except NotResponding:
        raise
    except HypervisorError as error:
        await _leave(work)
        work.brought_back = True
        raise OperationRejected(
            f"{work.instance.name} was migrated to host {work.instance.host}, but failed to start there: "
            f"{error.message}",
            remedy=error.remedy or "Start it when that is fixed.",
        ) from None
    await _leave(work)
    return Done(power_state=done.power_state, message=message, arrived=True)


async def _leave(work: OperationContext) -> None:
    source = work.instance.left_host
    if source is not None:
        await drop_there(work, source)  # an unreachable host cleans up when it reconnects
        await work.keep(InstanceUpdate(left_host=None))
