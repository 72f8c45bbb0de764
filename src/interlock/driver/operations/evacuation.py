"""Evacuation: recreate an instance on another host once its own is fenced."""

from __future__ import annotations

import msgspec

from interlock.core.errors import HypervisorError, NotResponding, OperationRejected
from interlock.core.evacuation import image_only, loses_root, losses
from interlock.core.operations import Operation
from interlock.core.records import Evacuated, InstanceUpdate, Spec
from interlock.core.state_stack import resolve_target
from interlock.core.states import EXECUTING_STATES, VmState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import bring_to, define, drop_shared_disks, settle_resize, with_root
from interlock.driver.operations.live_migration import drop_there, require_root


async def evacuate(work: OperationContext) -> Done:
    """Recreate the instance on the target host, and start it there if it ran.

    A root disk in a shared folder is reused, and one on the lost host is created from its image again. Once the record
    names the target, the lost host's data is removed when that host comes back. Until then a failure changes nothing.
    """
    target = str(work.request.parameters.get("host", work.hosts.own))
    after, memory = resolve_target(Operation.EVACUATE, work.instance.vm_state, work.instance.state_stack)
    if work.instance.host != target:
        await _bring(work, target)
    work.untouched = True
    if not work.hosts.reachable(target):
        raise OperationRejected(f"Host {target} was lost meanwhile.", remedy="Evacuate the VM again.")
    work.untouched = after is work.instance.vm_state and after not in EXECUTING_STATES
    if not image_only(work.instance):
        await define(work)
        await settle_resize(work)
    done = await bring_to(work, after, memory)
    lost = () if work.instance.evacuated is None else work.instance.evacuated.lost
    return msgspec.structs.replace(done, message=" ".join(lost) or None)


async def _bring(work: OperationContext, target: str) -> None:
    """Create the instance on the target, and record it there."""
    instance = work.instance
    work.untouched, work.awaited_host = True, target
    _require_lost(work, target)
    lost = losses(instance, from_image=_from_image(work))
    spec = await _prepare(work, target)
    _require_lost(work, target)
    if instance.left_host not in {None, target, instance.host}:
        await drop_there(work, str(instance.left_host))  # its guest was paused for a migration
    evacuated = Evacuated(from_host=instance.host, at_ms=work.store.now_ms(), lost=lost)
    kept = InstanceUpdate(host=target, left_host=None, spec=spec, prior_spec=None, evacuated=evacuated)
    if image_only(instance) and spec.root != work.spec.root:
        kept = msgspec.structs.replace(kept, shelved_image=None)
    await work.keep(kept)
    work.awaited_host = None


def _require_lost(work: OperationContext, target: str) -> None:
    """Raise `OperationRejected` if the instance's host is not fenced: its guest may still be running there."""
    host = work.instance.host
    if work.hosts.reachable(host):
        raise OperationRejected(
            f"Host {host} is not fenced, so the guest of {work.instance.name} may still run there.",
            remedy="Migrate the VM instead.",
        )
    if not work.hosts.reachable(target):
        raise OperationRejected(f"Target host {target} is fenced.", remedy="Evacuate the VM to another host.")


def _from_image(work: OperationContext) -> bool:
    return bool(work.request.parameters.get("from_image"))


async def _prepare(work: OperationContext, target: str) -> Spec:
    """Create what the instance needs on the target; return its spec there."""
    hypervisor = work.hosts.of(target)
    # Remove a guest that an earlier migration left there.
    await hypervisor.undefine(work.permit, work.id)
    spec = _left(work)
    if image_only(work.instance):
        return await _prepare_image(work, spec)
    if loses_root(work.instance) and not _from_image(work):
        raise OperationRejected(
            f"The root disk of {work.instance.name} was on host {work.instance.host} and is lost.",
            remedy="Use from_image to create the root disk from its image again.",
        )
    # A root disk that was never written to equals its image.
    unwritten = spec.shared is None and not work.instance.launched
    again = spec.has_root and (_from_image(work) or unwritten)
    fresh = _begun_anew(spec) if again else spec
    try:
        if again and spec.shared is not None:
            # One of that number may be left over from a resize or rebuild.
            await hypervisor.drop_root_disks(work.permit, work.id, spec, _known_roots(work))
        if not again:
            await require_root(work, hypervisor)
        await hypervisor.define(work.permit, work.id, fresh)
    except NotResponding:
        raise
    except HypervisorError:
        await hypervisor.undefine(work.permit, work.id)
        raise
    return with_root(fresh)


async def _prepare_image(work: OperationContext, spec: Spec) -> Spec:
    """Check the image of a shelved instance, whose root disk is created from it by unshelve."""
    image = work.instance.shelved_image
    if image is None or await work.images.holds(image):
        await drop_shared_disks(work)
        return spec
    if not _from_image(work):
        raise OperationRejected(
            f"The shelved image of {work.instance.name} was not found.",
            remedy="Use from_image to create the root disk from its original image again.",
        )
    return _begun_anew(spec)


def _left(work: OperationContext) -> Spec:
    """Return the spec, without a rescue that ends with the evacuation."""
    after, memory = resolve_target(Operation.EVACUATE, work.instance.vm_state, work.instance.state_stack)
    if VmState.RESCUED in (after, *memory):
        return work.spec
    return msgspec.structs.replace(work.spec, rescue_image=None)


def _begun_anew(spec: Spec) -> Spec:
    return msgspec.structs.replace(spec, root=spec.root + 1, root_is_whole=False, root_made=False)


def _known_roots(work: OperationContext) -> frozenset[int]:
    return frozenset(spec.root for spec in (work.instance.spec, work.instance.prior_spec) if spec is not None)
