"""Evacuate: an instance is taken up on another host once its own is lost, and its guest there has ended for certain."""

from __future__ import annotations

import msgspec

from interlock.core.errors import HypervisorError, NotResponding, Refused
from interlock.core.records import Kept, Spec
from interlock.core.states import PowerState, VmState
from interlock.driver.work import Done, Work


async def evacuate(work: Work) -> Done:
    """Make the instance anew on another host, and start it if it ran.

    Its root disk was on the host that is lost: it begins as its image again. From the moment that the record names the
    other host, whatever the lost one still has of it is removed when it comes back.
    """
    target = str(work.request.parameters.get("host", work.hosts.own))
    if work.instance.host != target:
        await work.keep(Kept(host=target, spec=await _prepare(work, target)))
    await work.hypervisor.define(work.permit, work.id, work.spec)
    if work.instance.vm_state is VmState.STOPPED:
        return Done(power_state=PowerState.NONE)
    await work.hypervisor.power_on(work.permit, work.id, work.spec)
    return Done(power_state=PowerState.RUNNING)


async def _prepare(work: Work, target: str) -> Spec:
    """Make the instance's files on the target, with a root disk that is another one from now on; what it then is."""
    spec = work.spec
    if spec.has_root and not work.request.parameters.get("from_image"):
        raise Refused(
            f"The root disk of {work.instance.name} was on the host {work.instance.host}.",
            remedy="Ask for it with from_image, which begins with its image again.",
        )
    fresh = msgspec.structs.replace(spec, root=spec.root + 1, root_is_whole=False) if spec.has_root else spec
    hypervisor = work.hosts.of(target)
    try:
        await hypervisor.define(work.permit, work.id, fresh)
    except NotResponding:
        raise
    except HypervisorError:
        await hypervisor.undefine(work.permit, work.id)
        raise
    return fresh
