"""Rescue and unrescue: boot something else, with the instance's own disk beside it, and go back.

Which of the two it boots is in its spec: whoever performs one of them again finds there how far it came.
"""

from __future__ import annotations

import msgspec

from interlock.core.records import Image, Spec
from interlock.core.states import PowerState
from interlock.driver.operations.bringing import ask_guest, boot, bring_back, leave_rescue
from interlock.driver.work import Done, Work


async def rescue(work: Work) -> Done:
    """Shut the guest down, and boot the rescue image afresh, whatever a rescue that failed has left."""
    image = await _image(work)
    message = None
    if work.spec.rescue_image != image or not work.taken_up:
        message = await ask_guest(work)
        await work.hypervisor.power_off(work.permit, work.id)
        await work.release_strays()
        if work.spec.rescue_image is not None:
            await leave_rescue(work)
            await work.hypervisor.define(work.permit, work.id, work.spec)
        await work.keep_changed(lambda spec: _rescued(spec, image))
    await boot(work)
    return Done(power_state=PowerState.RUNNING, message=message)


async def unrescue(work: Work) -> Done:
    """End the rescue, and bring the instance to what it was before."""
    if work.spec.rescue_image is not None:
        await work.hypervisor.power_off(work.permit, work.id)
        await work.release_strays()
        await leave_rescue(work)
    await work.hypervisor.define(work.permit, work.id, work.spec)
    return await bring_back(work)


async def _image(work: Work) -> Image:
    """What is to be booted: the image that was asked for, or the instance's own."""
    wanted = work.request.parameters.get("image")
    if wanted is None:
        return work.spec.image
    if work.spec.rescue_image is not None and work.spec.rescue_image.id == wanted:
        return work.spec.rescue_image
    return await work.image(str(wanted))


def _rescued(spec: Spec, image: Image) -> Spec:
    return msgspec.structs.replace(spec, rescue_image=image)
