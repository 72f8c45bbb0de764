"""Images and volumes: bring in, list, remove."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from interlock.core.errors import InUse, Invalid, NameTaken, NotFound
from interlock.core.records import Image, Instance
from interlock.ports import ImageFiles, Role, SmallForm, Store, Volume, VolumeFiles, every_instance
from interlock.service.callers import Caller
from interlock.service.capacity import Capacity
from interlock.service.wishes import NewVolume, check_name

MIB = 1024 * 1024


class Inventory:
    """The verbs on images and volumes.

    A volume belongs to a project; so does an image that was made of an instance. What an admin brings in is for all.
    """

    def __init__(
        self,
        store: Store,
        image_files: ImageFiles,
        volume_files: VolumeFiles,
        new_id: Callable[[], str],
        capacity: Capacity,
        volume_gib_max: int,
    ) -> None:
        self._store = store
        self._image_files = image_files
        self._volume_files = volume_files
        self._new_id = new_id
        self._capacity = capacity
        self._volume_gib_max = volume_gib_max
        # Between looking and keeping there is a wait; of one who gives an image away and one who deletes it, one loses.
        self._wanted: Counter[str] = Counter()
        self._going: set[str] = set()
        self.image_deleted: Callable[[], None] = _nobody
        """Called whenever an image has been deleted."""

    # ----------------------------------------------------------------------------------------------------- images

    async def sweep(self) -> None:
        """Remove what is left of images that were being made for requests that have ended without keeping one.

        Called at the start, before anything is served. Files that nothing here knows of are left alone: they may be
        younger than a database that was put back.
        """
        found = await self._image_files.ids() - {image.id for image in await self._store.images()}
        if not found:
            return
        async for instance in every_instance(self._store):
            found -= {request.id for request in (*instance.outstanding, *instance.held)}
            if instance.shelved_image is not None:
                found -= {instance.shelved_image.id}
        for image_id in sorted(found):
            if await self._store.request(image_id) is not None:
                await self._image_files.discard(image_id)

    async def add_disk_image(self, caller: Caller, name: str, disk: Path, sha256: str | None = None) -> Image:
        """Inspect a disk image and bring it in. Raises `Invalid`, `NameTaken`, `Forbidden`, `StoreFull`."""
        await self._check_new_image(caller, name)
        return await self._keep(await self._image_files.bring_disk(self._new_id(), name, disk, sha256))

    async def add_kernel_image(
        self, caller: Caller, name: str, kernel: Path, initrd: Path | None, cmdline: str
    ) -> Image:
        """Bring in a kernel that is booted directly. Raises as `add_disk_image`."""
        await self._check_new_image(caller, name)
        return await self._keep(await self._image_files.bring_kernel(self._new_id(), name, kernel, initrd, cmdline))

    async def build_small_image(self, caller: Caller, name: str, form: SmallForm = "kernel") -> Image:
        """Build the small guest from the distribution's packages. Raises also `Unavailable`."""
        await self._check_new_image(caller, name)
        return await self._keep(await self._image_files.build_small(self._new_id(), name, form))

    async def _check_new_image(self, caller: Caller, name: str) -> None:
        caller.require(Role.ADMIN, "add images")
        check_name(name, "name")
        await self.check_image_name(caller, name)

    async def check_image_name(self, caller: Caller, name: str) -> None:
        """Raise `NameTaken` if an image of the project, or of all, has that name or is being made under it."""
        if any(image.name == name for image in await self._store.images() if _of(image, caller.project)):
            raise NameTaken(f"There is an image named {name} already.", remedy="Choose another name.")
        for instance in await self._store.unsettled():
            for request in (*instance.outstanding, *instance.held):
                if instance.project == caller.project and request.image_name == name:
                    raise NameTaken(
                        f"A {request.operation.value} of {instance.name} named {name} is being made.",
                        remedy="Choose another name.",
                    )

    async def _keep(self, image: Image) -> Image:
        image = msgspec.structs.replace(image, created_at_ms=self._store.now_ms())
        try:
            await self._store.put_image(image)
        except BaseException:
            await self._image_files.remove(image)
            raise
        return image

    async def images(self, caller: Caller) -> tuple[Image, ...]:
        """The images that the caller may use: those of its project and of all; an admin's are those of everybody."""
        found = await self._store.images()
        return tuple(image for image in found if caller.role is Role.ADMIN or _of(image, caller.project))

    async def find_image(self, caller: Caller, reference: str) -> Image:
        """The caller's image of that id or name; its project's own comes before that of all. Raises `NotFound`."""
        found = [image for image in await self.images(caller) if reference in {image.id, image.name}]
        found = [image for image in found if image.id == reference or _of(image, caller.project)]
        if not found:
            raise NotFound(f"There is no image {reference[:80]}.", remedy="List them with `interlock image list`.")
        return min(found, key=lambda image: image.project is None)

    async def delete_image(self, caller: Caller, reference: str) -> None:
        """Remove an image that no instance uses. Raises `NotFound`, `InUse`, `Forbidden`."""
        caller.require(Role.MEMBER, "delete images")
        image = await self.find_image(caller, reference)
        if image.project is None:
            caller.require(Role.ADMIN, "delete images that every project may use")
        if self._wanted[image.id]:
            raise InUse(f"The image {image.name} is being given to an instance.", remedy="Delete that first.")
        self._going.add(image.id)
        try:
            async for user in every_instance(self._store):
                if image.id in user.image_ids:
                    which = _named(user, caller)
                    raise InUse(f"The image {image.name} is used by {which}.", remedy="Delete that first.")
            await self._store.delete_image(image.id)
            await self._image_files.remove(image)
        finally:
            self._going.discard(image.id)
        self.image_deleted()

    @contextlib.asynccontextmanager
    async def giving(self, image_id: str | None) -> AsyncIterator[None]:
        """Keep the image, if it is one, from being deleted until an instance that has it is kept.

        Raises:
            NotFound: it is being deleted, or was.
        """
        if image_id is None:
            yield
            return
        self._wanted[image_id] += 1
        try:
            if image_id in self._going or all(image.id != image_id for image in await self._store.images()):
                raise NotFound("The image is being deleted.", remedy="List them with `interlock image list`.")
            yield
        finally:
            self._wanted[image_id] -= 1
            if not self._wanted[image_id]:
                del self._wanted[image_id]

    # ---------------------------------------------------------------------------------------------------- volumes

    async def make_volume(self, caller: Caller, wish: NewVolume) -> Volume:
        """Make an empty volume. Raises `Invalid`, `NameTaken`, `NoRoom`, `StoreFull`."""
        caller.require(Role.MEMBER, "make volumes")
        check_name(wish.name, "name")
        if wish.size_mib > self._volume_gib_max * 1024:
            raise Invalid(f"size_mib: {wish.size_mib} is more than is allowed here ({self._volume_gib_max * 1024}).")
        if any(volume.name == wish.name for volume in await self._store.volumes(caller.project)):
            raise NameTaken(f"There is a volume named {wish.name} already.", remedy="Choose another name.")
        volume_id = self._new_id()
        async with self._capacity.deciding(volume_id):
            self._capacity.claim_volume(volume_id, wish.name, wish.size_mib * MIB)
        try:
            return await self._make_volume(caller, wish, volume_id)
        except BaseException:
            self._capacity.release_volume(volume_id)
            raise

    async def _make_volume(self, caller: Caller, wish: NewVolume, volume_id: str) -> Volume:
        path = await self._volume_files.make(volume_id, wish.size_mib * MIB)
        volume = Volume(
            id=volume_id,
            name=wish.name,
            project=caller.project,
            path=str(path),
            size_bytes=wish.size_mib * MIB,
            created_at_ms=self._store.now_ms(),
        )
        try:
            await self._store.put_volume(volume)
        except BaseException:
            await self._volume_files.remove(volume_id)
            raise
        return volume

    async def volumes(self, caller: Caller) -> tuple[Volume, ...]:
        return await self._store.volumes(caller.project)

    async def find_volume(self, caller: Caller, reference: str) -> Volume:
        """The caller's volume of that id or name. Raises `NotFound`."""
        for volume in await self._store.volumes(caller.project):
            if reference in {volume.id, volume.name}:
                return volume
        raise NotFound(f"There is no volume {reference[:80]}.", remedy="List them with `interlock volume list`.")

    async def holder(self, volume: Volume) -> str:
        """The instance that has the volume, which is of the same project, by its name where that is known."""
        held = await self._store.volume(volume.id)
        found = None if held is None or held.attached_to is None else await self._store.instance(held.attached_to)
        return "an instance" if found is None else f"the instance {found.name}"

    async def delete_volume(self, caller: Caller, reference: str) -> None:
        """Remove a volume that no instance has. Raises `NotFound`, `InUse`."""
        caller.require(Role.MEMBER, "delete volumes")
        volume = await self.find_volume(caller, reference)
        if not await self._store.delete_volume(volume.id):
            holder = await self.holder(volume)
            raise InUse(f"The volume {volume.name} is attached to {holder}.", remedy="Detach it first.")
        await self._volume_files.remove(volume.id)
        self._capacity.release_volume(volume.id)


def _nobody() -> None:
    """Hears of deleted images while nobody else does."""


def _of(image: Image, project: str) -> bool:
    """Whether the image is the project's own, or of all."""
    return image.project is None or image.project == project


def _named(instance: Instance, caller: Caller) -> str:
    """The instance by its name, for whom it exists."""
    return f"the instance {instance.name}" if instance.project == caller.project else "an instance of another project"
