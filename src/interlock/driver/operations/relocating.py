"""Cold migration: an instance goes to another host with its guest powered off.

Its root disk is written to a file of the server, and made of that on the other host, where it stands by itself from
then on; one in a shared folder stays where it is. Where the instance is, is what the record says: until it names the
other host, everything is still here and whatever is there is not the instance's; from then on it is the other way
round.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import Fenced, HypervisorError, InterlockError, NotResponding, Refused
from interlock.core.records import Kept, Spec
from interlock.core.states import VmState
from interlock.driver.operations.bringing import bring_to, make_disk, settle_resize, shut_down
from interlock.driver.operations.migrating import answering, drop_there, require_other, require_root
from interlock.driver.work import Done, Work


async def migrate(work: Work) -> Done:
    """Bring an instance to another host, and start it there if it was active."""
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


async def undo_migrate(work: Work) -> None:
    """Have the instance as it was where it is. One that has arrived already stays there."""
    await work.alive()  # the record as it is once everything that was asked of the store is done
    target = str(work.request.parameters["host"])
    if work.instance.host == target:
        await _arrive(work, None)
        raise Refused(f"It had come to {target} already.")
    if work.request.detail is not None:
        await shut_down(work)  # it was asked already, and what is half-way down must not be taken for what runs
    await _stay(work, target)


async def _bring(work: Work, target: str) -> str | None:
    """Have everything of the instance on the target; what to tell people if its guest did not power itself off."""
    there, spec = work.hosts.of(target), work.spec
    with answering(target):
        await there.undefine(work.permit, work.id)
        await require_root(work, there)
        if spec.shared is not None or not spec.root_is_whole:
            # Whatever the target has not is told before the guest is asked to power off.
            await there.define(work.permit, work.id, spec)
    if work.instance.vm_state is VmState.ACTIVE:
        await work.tell("the guest is to power off")
    message = await shut_down(work)
    await make_disk(work)
    moved = _moved(spec)
    if moved.root != spec.root:
        await _carry(work, target, moved)
    with answering(target):
        await there.define(work.permit, work.id, moved)
        if spec.shared is None:
            await there.drop_root_disks(work.permit, work.id, moved, frozenset({moved.root}))
    await work.keep(Kept(host=target, left_host=work.instance.host, spec=moved, prior_spec=None))
    return message


def _moved(spec: Spec) -> Spec:
    """What the instance is once it is elsewhere: a rescue that it was stopped in is over."""
    gone = msgspec.structs.replace(spec, rescue_image=None)
    if spec.shared is not None or not spec.has_root:
        return gone
    return msgspec.structs.replace(gone, root=spec.root + 1, root_is_whole=True)


async def _carry(work: Work, target: str, moved: Spec) -> None:
    # One of an earlier attempt is of no use: the guest may have run since.
    await _discard(work)
    draft = work.images.draft_path(work.request.id)
    async with work.moving() as report:
        await work.hypervisor.export_root_disk(work.permit, work.id, work.spec, draft, report)
    await work.tell(f"sending the root disk to {target}")
    with answering(target):
        async with work.moving() as report:
            await work.hosts.of(target).root_disk_from(work.permit, work.id, moved, draft, report)
    await _discard(work)


async def _discard(work: Work) -> None:
    work.permit.check()
    await work.images.discard(work.request.id)


async def _stay(work: Work, target: str) -> None:
    """Bring the instance back to what it was, where it is; remove what was made of it elsewhere."""
    await drop_there(work, target)
    await _discard(work)
    work.brought_back = True
    await bring_to(work, work.instance.vm_state)


async def _arrive(work: Work, message: str | None) -> Done:
    """Have the instance as it was before where the record says that it is, and remove it where it was."""
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
        raise Refused(
            f"{work.instance.name} is on {work.instance.host} now, and could not be started there: {error.message}",
            remedy=error.remedy or "Start it when that is mended.",
        ) from None
    await _leave(work)
    return Done(power_state=done.power_state, message=message, arrived=True)


async def _leave(work: Work) -> None:
    source = work.instance.left_host
    if source is not None:
        await drop_there(work, source)  # one that cannot be asked removes it when it comes back
        await work.keep(Kept(left_host=None))
