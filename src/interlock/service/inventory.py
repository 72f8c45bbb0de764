"""Images and volumes: create, list, delete."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from interlock.core.errors import InUse, Invalid, NameTaken, NotFound, not_found
from interlock.core.parameters import check_name
from interlock.core.records import ENDS, Image, Instance, Request
from interlock.core.roles import Role
from interlock.ports import ImageFiles, SmallForm, Store, Tally, Volume, VolumeFiles, every_instance
from interlock.service.auth import Caller
from interlock.service.capacity import Capacity
from interlock.service.request_models import NewVolume

MIB = 1024 * 1024


class Inventory:
    """Operations on images and volumes.

    Volumes and images made from instances belong to a project; images that an admin adds are public.
    """

    def __init__(
        self,
        store: Store,
        image_files: ImageFiles,
        volume_files: VolumeFiles,
        new_id: Callable[[], str],
        capacity: Capacity,
        volume_gib_max: int,
        image_deleted: Callable[[], None],
    ) -> None:
        self._store = store
        self._image_files = image_files
        self._volume_files = volume_files
        self._new_id = new_id
        self._capacity = capacity
        self._volume_gib_max = volume_gib_max
        self._image_deleted = image_deleted
        # Guards against a deletion while an instance with the image is being committed, and the other way round.
        self._in_use: Counter[str] = Counter()
        self._deleting: set[str] = set()

    # ----------------------------------------------------------------------------------------------------- images

    async def sweep(self) -> None:
        """Delete the files of unfinished images whose requests have ended.

        Called at the start, before requests are served. Unknown files are left alone: they may be newer than a
        restored database.
        """
        found = await self._image_files.ids() - {image.id for image in await self._store.images.all()}
        for image_id in sorted(found):
            request = await self._store.request(image_id)
            if request is not None and request.status in ENDS and not await self._is_shelved(request):
                await self._image_files.discard(image_id)

    async def _is_shelved(self, request: Request) -> bool:
        """Whether the image that a request made is the shelved image of its instance."""
        instance = await self._store.instance(request.instance_id)
        return instance is not None and instance.shelved_image is not None and instance.shelved_image.id == request.id

    async def add_disk_image(
        self,
        caller: Caller,
        name: str,
        disk: Path,
        sha256: str | None = None,
        *,
        claimed: str | None = None,
        min_memory_mib: int | None = None,
    ) -> Image:
        """Inspect and add a disk image. Raises `Invalid`, `NameTaken`, `Forbidden`, `StoreFull`."""
        await self.check_new_image(caller, name)
        brought = await self._image_files.bring_disk(self._new_id(), name, disk, sha256, claimed=claimed)
        return await self._keep(brought, min_memory_mib)

    async def add_kernel_image(
        self,
        caller: Caller,
        name: str,
        kernel: Path,
        initrd: Path | None,
        cmdline: str,
        min_memory_mib: int | None = None,
    ) -> Image:
        """Add a kernel for direct boot. Raises as `add_disk_image`."""
        await self.check_new_image(caller, name)
        brought = await self._image_files.bring_kernel(self._new_id(), name, kernel, initrd, cmdline)
        return await self._keep(brought, min_memory_mib)

    async def build_small_image(self, caller: Caller, name: str, form: SmallForm = "kernel") -> Image:
        """Build the small guest from the distribution's packages. Raises also `Unavailable`."""
        await self.check_new_image(caller, name)
        return await self._keep(await self._image_files.build_small(self._new_id(), name, form))

    async def has_image(self, image_id: str) -> bool:
        """Whether an image with that id exists, in any project."""
        return any(image.id == image_id for image in await self._store.images.all())

    async def check_new_image(self, caller: Caller, name: str) -> None:
        """Raise `Forbidden`, `Invalid` or `NameTaken` if the caller may not add an image of that name."""
        caller.require(Role.ADMIN, "add images")
        check_name(name, "name")
        await self.check_image_name(caller, name)

    async def check_image_name(self, caller: Caller, name: str) -> None:
        """Raise `NameTaken` if an image of the project or a public one has that name, or is being created with it."""
        if any(image.name == name for image in await self._store.images.all() if _of(image, caller.project)):
            raise NameTaken(f"An image named {name} already exists.", remedy="Choose another name.")
        for instance in await self._store.unsettled():
            for request in (*instance.outstanding, *instance.held):
                if instance.project == caller.project and request.image_name == name:
                    raise NameTaken(
                        f"A {request.operation.value} of {instance.name} named {name} is being created.",
                        remedy="Choose another name.",
                    )

    async def _keep(self, image: Image, min_memory_mib: int | None = None) -> Image:
        """Store the record; `min_memory_mib` overrides the value detected from the files."""
        least_mib = image.min_memory_mib if min_memory_mib is None else min_memory_mib
        image = msgspec.structs.replace(image, created_at_ms=self._store.now_ms(), min_memory_mib=least_mib)
        try:
            await self._store.images.put(image)
        except BaseException:
            await self._image_files.remove(image)
            raise
        return image

    async def images(self, caller: Caller) -> tuple[Image, ...]:
        """Return the images of the caller's project and the public ones; for an admin, all."""
        found = await self._store.images.all()
        return tuple(image for image in found if caller.role is Role.ADMIN or _of(image, caller.project))

    async def find_image(self, caller: Caller, reference: str) -> Image:
        """Return the caller's image by id or name; its project's own before a public one. Raises `NotFound`."""
        found = [image for image in await self.images(caller) if reference in {image.id, image.name}]
        found = [image for image in found if image.id == reference or _of(image, caller.project)]
        if not found:
            raise not_found("Image", reference)
        return min(found, key=lambda image: image.project is None)

    async def image_file(self, caller: Caller, reference: str, part: str | None) -> Path:
        """Return the file of an image: the disk, or a kernel's `kernel` or `initrd`. Raises `NotFound`, `Forbidden`."""
        caller.require(Role.MEMBER, "download images")
        image = await self.find_image(caller, reference)
        path = image.initrd if part == "initrd" else image.path
        if path is None or (part is not None and image.kind != "kernel"):
            raise NotFound(f"The image {image.name} ({image.kind}) has no {part}.")
        if not await self._image_files.holds(image):
            raise NotFound(f"The file of the image {image.name} was not found: {path}.", remedy="Restore it.")
        return Path(path)

    async def delete_image(self, caller: Caller, reference: str) -> None:
        """Delete an unused image. Raises `NotFound`, `InUse`, `Forbidden`."""
        caller.require(Role.MEMBER, "delete images")
        image = await self.find_image(caller, reference)
        if image.project is None:
            caller.require(Role.ADMIN, "delete public images")
        if self._in_use[image.id]:
            raise InUse(f"The image {image.name} is in use by a new VM.", remedy="Delete the VM first.")
        self._deleting.add(image.id)
        try:
            if self._store.tally(Tally.IMAGES, image.id):
                user = await self._user(image, caller)
                raise InUse(f"The image {image.name} is in use by {user}.", remedy="Delete the VM first.")
            await self._store.images.delete(image.id)
            await self._image_files.remove(image)
        finally:
            self._deleting.discard(image.id)
        self._image_deleted()

    async def _user(self, image: Image, caller: Caller) -> str:
        async for instance in every_instance(self._store):
            if image.id in instance.image_ids:
                return _named(instance, caller)
        return "a VM"

    @contextlib.asynccontextmanager
    async def giving(self, image_id: str) -> AsyncIterator[None]:
        """Prevent the deletion of an image while an instance with it is committed.

        Raises:
            NotFound: it was or is being deleted.
        """
        self._in_use[image_id] += 1
        try:
            if image_id in self._deleting or all(image.id != image_id for image in await self._store.images.all()):
                raise NotFound("Image not found: it is being deleted.", remedy="List them with `interlock image list`.")
            yield
        finally:
            self._in_use[image_id] -= 1
            if not self._in_use[image_id]:
                del self._in_use[image_id]

    # ---------------------------------------------------------------------------------------------------- volumes

    async def make_volume(self, caller: Caller, new: NewVolume) -> Volume:
        """Create an empty volume.

        Raises `Invalid`, `NameTaken`, `InsufficientCapacity`, `QuotaExceeded`, `StoreFull`.
        """
        caller.require(Role.MEMBER, "create volumes")
        check_name(new.name, "name")
        if new.size_mib > self._volume_gib_max * 1024:
            raise Invalid(f"size_mib: {new.size_mib} exceeds the limit of {self._volume_gib_max * 1024}.")
        if any(volume.name == new.name for volume in await self._store.volumes.all(caller.project)):
            raise NameTaken(f"A volume named {new.name} already exists.", remedy="Choose another name.")
        volume_id = self._new_id()
        self._capacity.claim_volume(volume_id, new.name, new.size_mib * MIB, caller.project)
        try:
            return await self._make_volume(caller, new, volume_id)
        except BaseException:
            self._capacity.release_volume(volume_id)
            raise

    async def _make_volume(self, caller: Caller, new: NewVolume, volume_id: str) -> Volume:
        path = await self._volume_files.make(volume_id, new.size_mib * MIB)
        volume = Volume(
            id=volume_id,
            name=new.name,
            project=caller.project,
            path=str(path),
            size_bytes=new.size_mib * MIB,
            created_at_ms=self._store.now_ms(),
        )
        try:
            await self._store.volumes.put(volume)
        except BaseException:
            await self._volume_files.remove(volume_id)
            raise
        return volume

    async def volumes(self, caller: Caller) -> tuple[Volume, ...]:
        return await self._store.volumes.all(caller.project)

    async def find_volume(self, caller: Caller, reference: str) -> Volume:
        """Return the caller's volume by id or name. Raises `NotFound`."""
        for volume in await self._store.volumes.all(caller.project):
            if reference in {volume.id, volume.name}:
                return volume
        raise not_found("Volume", reference)

    async def holder(self, volume: Volume) -> str:
        """Describe the VM to which the volume is attached, for error messages."""
        held = await self._store.volumes.get(volume.id)
        found = None if held is None or held.attached_to is None else await self._store.instance(held.attached_to)
        return "a VM" if found is None else f"the VM {found.name}"

    async def delete_volume(self, caller: Caller, reference: str) -> None:
        """Delete a detached volume. Raises `NotFound`, `InUse`."""
        caller.require(Role.MEMBER, "delete volumes")
        volume = await self.find_volume(caller, reference)
        if not await self._store.volumes.delete(volume.id):
            holder = await self.holder(volume)
            raise InUse(f"The volume {volume.name} is attached to {holder}.", remedy="Detach it first.")
        await self._volume_files.remove(volume.id)
        self._capacity.release_volume(volume.id)


def _of(image: Image, project: str) -> bool:
    """Whether the image is the project's own or public."""
    return image.project is None or image.project == project


def _named(instance: Instance, caller: Caller) -> str:
    return f"the VM {instance.name}" if instance.project == caller.project else "a VM of another project"
