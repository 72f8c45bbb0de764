"""Rescue and unrescue: boot a rescue image with the root disk as a second disk, and return.

`spec.rescue_image` says which disk it boots, and so how far an earlier attempt came.
"""

from __future__ import annotations

import msgspec

from interlock.core.records import Image, Spec
from interlock.core.states import PowerState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import ask_guest, boot, bring_back, define, leave_rescue


async def rescue(work: OperationContext) -> Done:
    """Shut the guest down, and boot the rescue image with a new rescue disk."""
    image = await _image(work)
    message = None
    if work.spec.rescue_image != image or not work.taken_up:
        message = await ask_guest(work)
        await work.hypervisor.power_off(work.permit, work.id)
        await work.release_strays()
        if work.spec.rescue_image is not None:
            await leave_rescue(work)
            await define(work)
        await work.keep_changed(lambda spec: _rescued(spec, image))
    await boot(work)
    return Done(power_state=PowerState.RUNNING, message=message)


async def unrescue(work: OperationContext) -> Done:
    """End the rescue, and return the instance to its state before."""
    if work.spec.rescue_image is not None:
        await work.hypervisor.power_off(work.permit, work.id)
        await work.release_strays()
        await leave_rescue(work)
    await define(work)
    return await bring_back(work)


async def _image(work: OperationContext) -> Image:
    """Return the image to boot: the request's, or the instance's own."""
    wanted = work.request.parameters.get("image")
    if wanted is None:
        return work.spec.image
    if work.spec.rescue_image is not None and work.spec.rescue_image.id == wanted:
        return work.spec.rescue_image
    return await work.image(str(wanted))


def _rescued(spec: Spec, image: Image) -> Spec:
    return msgspec.structs.replace(spec, rescue_image=image)
