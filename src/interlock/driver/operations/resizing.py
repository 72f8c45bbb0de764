"""Resize, and its confirmation or reversion.

A resize always copies the root disk, also where only processors or memory change: what a guest writes while nobody
has confirmed is in the copy, and reverting brings the disk back as it was. Until it is confirmed the instance is known
by both specs, `spec` and `prior_spec`, and both disks are there.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import Refused
from interlock.core.records import Kept, Spec
from interlock.core.states import PowerState, VmState
from interlock.driver.operations.bringing import boot, bring_back, make_disk, settle_resize, shut_down
from interlock.driver.work import Done, Work

_GIB = 1 << 30
_DONE = frozenset({"resize_migrated", "resize_finish"})
"""The phases from which the instance is known by its new size."""


async def resize(work: Work) -> Done:
    """Give the instance another size; one that does not come up with it gets its old one back."""
    runs = work.instance.vm_state is VmState.ACTIVE
    message = None
    if work.request.phase not in _DONE:
        message = await _migrate(work)
    await work.phase("resize_finish")
    if work.instance.prior_spec is None:
        raise Refused(*_PUT_BACK)
    if not runs:
        await work.hypervisor.define(work.permit, work.id, work.spec)
        return Done(power_state=PowerState.NONE, message=message)
    try:
        await boot(work)
    except Refused as error:
        await _put_back(work)
        raise Refused(f"{error.message} The instance has its old size again, and is off.", remedy=_START) from None
    return Done(power_state=PowerState.RUNNING, message=message)


_START = "Start the instance to go on with its old size."
_PUT_BACK = ("The guest could not be started with its new size, and has its old one again. " + _START,)


async def _migrate(work: Work) -> str | None:
    """Make the root disk of the new size, with the guest off; what to tell people of how it was powered off."""
    _resized(work)  # refuses before anything is changed
    message = await shut_down(work)
    await settle_resize(work)
    await work.phase("resize_migrating")
    old, new = work.spec, _resized(work)
    if old.has_root:
        await make_disk(work)
        async with work.moving() as report:
            await work.hypervisor.copy_root_disk(work.permit, work.id, old, new, report)
    await work.keep(Kept(spec=new, prior_spec=old), phase="resize_migrated")
    return message


def _resized(work: Work) -> Spec:
    """The spec with its new size. Raises `Refused` if the root disk would shrink."""
    old, wanted = work.spec, work.request.parameters
    new = msgspec.structs.replace(old, **wanted, root=old.root + 1)
    if old.has_root and new.root_gib and new.root_gib * _GIB < smallest_root_bytes(old):
        raise Refused(
            f"The root disk has {smallest_root_bytes(old)} bytes, and {new.root_gib} GiB are fewer; a disk never "
            "shrinks, and nothing was changed.",
            remedy="Start the instance to go on with its old size.",
        )
    return new


def smallest_root_bytes(spec: Spec) -> int:
    """How large the root disk is, in bytes, and the next one must be at least."""
    return spec.root_gib * _GIB or (spec.image.size_bytes if spec.image.kind == "disk" else 0)


async def confirm(work: Work) -> Done:
    """Let go of what the instance was before; its guest runs on. What is left of one that has ended is removed."""
    await settle_resize(work)
    await work.refresh()
    if work.instance.executing:
        return Done()
    await work.hypervisor.power_off(work.permit, work.id)
    return Done(power_state=PowerState.NONE)


async def revert(work: Work) -> Done:
    """Bring back the size and the disk from before, and the state that held then."""
    if work.instance.prior_spec is not None:
        await _put_back(work)
    await settle_resize(work)
    return await bring_back(work)


async def _put_back(work: Work) -> None:
    """Know the instance by its old size again. What was plugged in since stays."""
    await work.hypervisor.power_off(work.permit, work.id)
    await work.release_strays()
    prior = work.instance.prior_spec
    assert prior is not None
    spec = msgspec.structs.replace(
        work.spec,
        vcpus=prior.vcpus,
        memory_mib=prior.memory_mib,
        root_gib=prior.root_gib,
        root=prior.root,
        root_is_whole=prior.root_is_whole,
    )
    await work.keep(Kept(spec=spec, prior_spec=None))
