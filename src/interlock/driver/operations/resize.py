"""Resize, confirm and revert.

A resize always copies the root disk, even if only vCPUs or memory change: the guest writes to the copy, and a revert
returns to the original. Until it is confirmed the record has both specs, `spec` and `prior_spec`, and both disks exist.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.records import InstanceUpdate, Spec
from interlock.core.states import PowerState, VmState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import (
    boot,
    bring_back,
    define,
    make_disk,
    settle_resize,
    shut_down,
    with_root,
)

_DONE = frozenset({"resize_migrated", "resize_finish"})
"""The phases in which the record has the new size."""


async def resize(work: OperationContext) -> Done:
    """Resize the instance; if its guest does not start with the new size, return to the old one."""
    runs = work.instance.vm_state is VmState.ACTIVE
    message = None
    if work.request.phase not in _DONE:
        message = await _migrate(work)
    await work.phase("resize_finish")
    if work.instance.prior_spec is None:
        raise OperationRejected(*_PUT_BACK)
    if not runs:
        await define(work)
        return Done(power_state=PowerState.NONE, message=message)
    try:
        await boot(work)
    except OperationRejected as error:
        await _put_back(work)
        raise OperationRejected(
            f"{error.message} The VM has its old size again, and is powered off.", remedy=_START
        ) from None
    return Done(power_state=PowerState.RUNNING, message=message)


_START = "Start the VM to continue with its old size."
_PUT_BACK = ("The guest failed to start with its new size, and has its old one again. " + _START,)


async def _migrate(work: OperationContext) -> str | None:
    """Shut the guest down, and create the root disk of the new size; return a message about the shutdown."""
    message = await shut_down(work)
    await settle_resize(work)
    await work.phase("resize_migrating")
    old, new = work.spec, _resized(work)
    if old.has_root:
        await make_disk(work)
    if old.has_root or new.has_root:
        async with work.moving() as report:
            await work.hypervisor.copy_root_disk(work.permit, work.id, old, new, report)
    await work.keep(InstanceUpdate(spec=with_root(new), prior_spec=work.spec), phase="resize_migrated")
    return message


def _resized(work: OperationContext) -> Spec:
    """Return the spec with its new size; `preconditions` ensures that the disk does not shrink."""
    return msgspec.structs.replace(work.spec, **work.request.parameters, root=work.spec.root + 1)


async def confirm(work: OperationContext) -> Done:
    """Remove the old root disk; a running guest is not affected, and the QEMU process of an ended one is removed."""
    await settle_resize(work)
    await work.refresh()
    if work.instance.executing:
        return Done()
    await work.hypervisor.power_off(work.permit, work.id)
    return Done(power_state=PowerState.NONE)


async def revert(work: OperationContext) -> Done:
    """Restore the old size, disk and state."""
    if work.instance.prior_spec is not None:
        await _put_back(work)
    await settle_resize(work)
    return await bring_back(work)


async def _put_back(work: OperationContext) -> None:
    """Restore the old size in the record. Devices attached since stay."""
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
    await work.keep(InstanceUpdate(spec=spec, prior_spec=None))
