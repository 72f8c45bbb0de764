"""What the names in a wish stand for: images and volumes are found here, once, before anything is asked of the gate.

Nothing here looks at the state of an instance, and nothing is changed.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from interlock.core.errors import InUse, Invalid
from interlock.core.operations import Operation
from interlock.core.records import Forward, Spec
from interlock.ports import Volume
from interlock.service.callers import Caller
from interlock.service.inventory import Inventory
from interlock.service.seeding import seed_of
from interlock.service.wishes import NewInstance


class Resolving:
    """Finds what wishes name among what the server keeps."""

    def __init__(self, inventory: Inventory, memory_mib_max: int) -> None:
        self._inventory = inventory
        self._memory_mib_max = memory_mib_max

    async def new_spec(self, caller: Caller, wish: NewInstance) -> Spec:
        """What a hypervisor is to know of the new instance. Raises `Invalid`, `NotFound` (image)."""
        if wish.memory_mib > self._memory_mib_max:
            raise Invalid(f"memory_mib: {wish.memory_mib} is more than this host allows ({self._memory_mib_max}).")
        taken = [one.host_port for one in wish.forwards]
        if len(set(taken)) < len(taken):
            raise Invalid("forwards: the same host_port is named twice.", remedy="Give each forward one of its own.")
        image = await self._inventory.find_image(caller, wish.image)
        if image.kind == "iso" and not wish.root_gib:
            raise Invalid(
                f"The image {image.name} is an ISO, and is booted beside an empty root disk.",
                remedy="Say how large that is to be: `--root-size GIB`, or root_gib.",
            )
        return Spec(
            image=image,
            vcpus=wish.vcpus,
            memory_mib=wish.memory_mib,
            root_gib=wish.root_gib,
            forwards=tuple(Forward(host_port=one.host_port, guest_port=one.guest_port) for one in wish.forwards),
            seed=seed_of(wish),
        )

    def giving(self, image_id: str | None) -> AbstractAsyncContextManager[None]:
        """As `Inventory.giving`."""
        return self._inventory.giving(image_id)

    async def parameters(
        self, caller: Caller, operation: Operation, instance_id: str, parameters: dict[str, Any]
    ) -> dict[str, Any]:
        """The parameters of a request with ids for the names of what they refer to.

        Raises:
            NotFound: there is no such image or volume for this caller.
            InUse: another instance has the volume.
            NameTaken: an image of that name is there, or is being made.
            Invalid: it is more than the host allows.
        """
        found = dict(parameters)
        for name in ("volume", "old", "new"):
            if name in found:
                volume = await self._inventory.find_volume(caller, found[name])
                if name == "new" or operation is Operation.ATTACH_VOLUME:
                    await self._require_free(volume, instance_id)
                found[name] = volume.id
        if operation is Operation.SNAPSHOT:
            await self._inventory.check_image_name(caller, found["name"])
        if found.get("memory_mib", 0) > self._memory_mib_max:
            raise Invalid(f"memory_mib: {found['memory_mib']} is more than this host allows ({self._memory_mib_max}).")
        if "image" in found:
            found["image"] = (await self._inventory.find_image(caller, found["image"])).id
        return found

    async def _require_free(self, volume: Volume, instance_id: str) -> None:
        if volume.attached_to not in {None, instance_id}:
            holder = await self._inventory.holder(volume)
            raise InUse(f"The volume {volume.name} is attached to {holder}.", remedy="Detach it there first.")
