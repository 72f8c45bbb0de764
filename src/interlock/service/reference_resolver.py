"""Resolves names of images, volumes and networks in requests to ids, before the gate decides. Changes nothing."""

from __future__ import annotations

import contextlib
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NamedTuple

import msgspec

from interlock.core.errors import InterlockError, InUse, Invalid, not_found
from interlock.core.networks import NetworkKind
from interlock.core.operations import Operation
from interlock.core.parameters import Refers, check_host_address
from interlock.core.records import NO_FACTS, Facts, Forward, Image, Instance, Interface, Spec, Submission
from interlock.core.references import REFERENCES
from interlock.ports import Volume
from interlock.service.auth import Caller
from interlock.service.cloud_init import seed_of
from interlock.service.inventory import Inventory
from interlock.service.networks import Networks
from interlock.service.request_models import NewInstance


def check_memory(image: Image, memory_mib: int) -> None:
    """Raise `Invalid` if `memory_mib` is less than the image needs to boot."""
    if memory_mib < image.min_memory_mib:
        raise Invalid(
            f"memory_mib: {memory_mib} is too little for the image {image.name}, which needs at least "
            f"{image.min_memory_mib} MiB to boot.",
            remedy=f"Use `--memory {image.min_memory_mib}`.",
        )


def _check_forwards(new: NewInstance, interfaces: tuple[Interface, ...]) -> None:
    """Raise `Invalid` for a forward at no address, or to a guest on a bridge, which is reached at its own address."""
    for one in new.forwards:
        check_host_address(one.host_address)
    network = interfaces[0].network if interfaces else None
    if new.forwards and network is not None and network.kind is NetworkKind.BRIDGE:
        raise Invalid(
            f"forwards: the first network, {network.name}, is of the kind bridge, which has none.",
            remedy="Omit them: the guest is reached at its own address.",
        )


_NOTHING: Final = contextlib.nullcontext()


class ResolvedSubmission(NamedTuple):
    """A submission with its references resolved to ids."""

    reference: str
    instance_id: str
    submission: Submission
    targets: tuple[str, ...]
    """The hosts it may move the instance to."""
    unusable: InterlockError | None
    """Why the submission is invalid regardless of the gate; None if it is valid."""

    def check(self, caller: Caller, instance: Instance) -> None:
        """Raise `NotFound` for an instance of another project, and the error of an invalid submission."""
        if instance.project != caller.project:
            raise not_found("VM", self.reference)
        if self.unusable is not None:
            raise self.unusable

    @property
    def image_id(self) -> str | None:
        """The image that must not be deleted until this is decided."""
        return None if self.unusable is not None else self.submission.parameters.get("image")


class ReferenceResolver:
    """Resolves references to images, volumes and networks."""

    def __init__(self, inventory: Inventory, networks: Networks, memory_mib_max: int) -> None:
        self._inventory = inventory
        self._networks = networks
        self._memory_mib_max = memory_mib_max

    async def new_spec(self, caller: Caller, new: NewInstance) -> Spec:
        """Return the spec of a new instance, without leases. Raises `Invalid`, `NotFound` (image, network)."""
        if new.memory_mib > self._memory_mib_max:
            raise Invalid(f"memory_mib: {new.memory_mib} is more than this host allows ({self._memory_mib_max}).")
        taken = [one.host_port for one in new.forwards]
        if len(set(taken)) < len(taken):
            raise Invalid("forwards: duplicate host_port.", remedy="Use a different host_port for each forward.")
        image = await self._inventory.find_image(caller, new.image)
        if image.kind == "iso" and not new.root_gib:
            raise Invalid(
                f"root_gib: required for the ISO image {image.name}, which boots with an empty root disk.",
                remedy="Give its size: `--root-size GIB`, or root_gib.",
            )
        check_memory(image, new.memory_mib)
        interfaces = self._networks.wanted(caller, new.networks)
        _check_forwards(new, interfaces)
        return Spec(
            image=image,
            vcpus=new.vcpus,
            memory_mib=new.memory_mib,
            root_gib=new.root_gib,
            forwards=tuple(msgspec.convert(one, Forward, from_attributes=True) for one in new.forwards),
            primary=interfaces[0] if interfaces else None,
            interfaces=interfaces[1:],
            seed=seed_of(new),
        )

    def giving(self, image_id: str | None) -> AbstractAsyncContextManager[None]:
        """As `Inventory.giving`; None does nothing."""
        return _NOTHING if image_id is None else self._inventory.giving(image_id)

    async def parameters(
        self, caller: Caller, operation: Operation, instance_id: str, parameters: dict[str, Any]
    ) -> tuple[dict[str, Any], Facts]:
        """Replace names by ids in a request's parameters; return them with the facts about what they refer to.

        Raises:
            NotFound: the image, volume or network does not exist for this caller.
            InUse: the volume is attached to another instance.
            NameTaken: an image with that name exists or is being created.
            Invalid: memory exceeds the host's limit.
        """
        found = dict(parameters)
        volumes: list[Volume] = []
        image: Image | None = None
        for name, refers in REFERENCES[operation]:
            if name not in found:
                continue
            match refers:
                case Refers.VOLUME_IN | Refers.VOLUME_OUT:
                    volume = await self._inventory.find_volume(caller, found[name])
                    if refers is Refers.VOLUME_IN:
                        await self._require_free(volume, instance_id)
                    found[name] = volume.id
                    volumes.append(volume)
                case Refers.IMAGE:
                    image = await self._inventory.find_image(caller, found[name])
                    found[name] = image.id
                case Refers.NEW_IMAGE:
                    await self._inventory.check_image_name(caller, found[name])
                case Refers.HOST | Refers.INTERFACE_OUT | Refers.NETWORK:
                    pass  # chosen by the scheduler; an id already; see `_network_facts`
        if found.get("memory_mib", 0) > self._memory_mib_max:
            raise Invalid(f"memory_mib: {found['memory_mib']} is more than this host allows ({self._memory_mib_max}).")
        if image is None and not volumes:
            return found, self._network_facts(caller, operation, found)
        return found, Facts(
            claimed=frozenset(volume.id for volume in volumes if volume.attached_to == instance_id),
            volume_bytes={volume.id: volume.size_bytes for volume in volumes},
            volume_paths={volume.id: volume.path for volume in volumes},
            names={volume.id: volume.name for volume in volumes},
            image=image,
        )

    def _network_facts(self, caller: Caller, operation: Operation, found: dict[str, Any]) -> Facts:
        """Replace the name of a network by its id, and return the facts about it. Raises `NotFound`."""
        for name, refers in REFERENCES[operation]:
            if refers is Refers.NETWORK and name in found:
                network = self._networks.find(caller, found[name])
                found[name] = network.id
                return Facts(network=network, names={network.id: network.name})
        return NO_FACTS

    async def _require_free(self, volume: Volume, instance_id: str) -> None:
        if volume.attached_to not in {None, instance_id}:
            holder = await self._inventory.holder(volume)
            raise InUse(f"The volume {volume.name} is attached to {holder}.", remedy="Detach it there first.")
