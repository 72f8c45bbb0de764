"""Removal of unused image copies on the other hosts.

A copy is removed when the server no longer has its image, or when no instance there has needed it for some time. The
host itself never removes a copy that a guest boots or that is a backing file.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import structlog

from interlock.core.errors import HypervisorError, StoreClosed, StoreError
from interlock.core.records import Image, Instance
from interlock.core.resource_claims import claims_of
from interlock.driver.host_registry import HostRegistry
from interlock.ports import RemoteHost, Store, every_instance

_LOG = structlog.get_logger(__name__)
_LOOK_S_MAX: Final = 3600.0
"""The longest interval between two sweeps, in seconds."""


class ImageCopies:
    """Sweeps the image copies of every connected host, at intervals and on request.

    Args:
        store: has the images, and the instances that need them.
        hosts: have the copies.
        unused_ms: how long an unused copy is kept, in milliseconds; 0: as long as its image.
    """

    def __init__(self, store: Store, hosts: HostRegistry, unused_ms: int) -> None:
        self._store = store
        self._hosts = hosts
        self._unused_ms = unused_ms
        self._look_s = min(_LOOK_S_MAX, unused_ms / 2000) if unused_ms else _LOOK_S_MAX
        self._wakeup = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._hosts.listen(lambda _host: self.ring())
        self._task = asyncio.create_task(self._run(), name="copies of images on hosts")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def ring(self) -> None:
        """Request a sweep, after an image was deleted or a host has connected."""
        self._wakeup.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._wakeup.wait()
            self._wakeup.clear()
            try:
                await self.sweep()
            except StoreClosed:
                return
            except StoreError as error:
                _LOG.error("image copy sweep failed", why=error.message)

    async def sweep(self) -> None:
        """Sweep once. Unreachable hosts are skipped. Raises `StoreError`."""
        copies: dict[str, dict[str, int]] = {}
        for name, host in self._hosts.all_linked().items():
            # Before reading the store: a host keeps copies that are used from now on, even if asked to remove them.
            with contextlib.suppress(HypervisorError):
                copies[name] = await host.image_copies()
        if not any(copies.values()):
            return
        known, needed = await self._paths()
        for name, ages in copies.items():
            host = self._hosts.remote(name)
            had = {host.copy_name(path) for path in known}
            kept = {host.copy_name(path) for path in needed.get(name, set())}
            gone = {copy for copy, age_ms in ages.items() if copy not in kept and self._is_over(copy in had, age_ms)}
            if gone:
                await self._drop(host, name, gone)

    def _is_over(self, known: bool, age_ms: int) -> bool:
        return not known or bool(self._unused_ms and age_ms >= self._unused_ms)

    async def _drop(self, host: RemoteHost, name: str, copies: set[str]) -> None:
        try:
            dropped = await host.drop_image_copies(copies)
        except HypervisorError as error:
            _LOG.warning("image copies not removed", host=name, why=error.message)
        else:
            _LOG.info("image copies removed", host=name, copies=dropped)

    async def _paths(self) -> tuple[set[str], dict[str, set[str]]]:
        """Return the files of every image on the server, and the files that the instances of each host need."""
        images = {image.id: image for image in await self._store.images.all()}
        known = {path for image in images.values() for path in _files(image)}
        needed: dict[str, set[str]] = {}
        async for instance in every_instance(self._store):
            files = {path for image in _images(instance, images) for path in _files(image)}
            for host in {instance.host, *(claim.host for claim in claims_of(instance))}:
                needed.setdefault(host, set()).update(files)
        return known, needed


def _images(instance: Instance, images: dict[str, Image]) -> list[Image]:
    """Return the images of the instance now, before a resize, and after its requests."""
    specs = (spec for spec in (instance.spec, instance.prior_spec) if spec is not None)
    found = [image for spec in specs for image in (spec.image, spec.rescue_image) if image is not None]
    return found + [images[image_id] for image_id in instance.image_ids if image_id in images]


def _files(image: Image) -> tuple[str, ...]:
    return tuple(path for path in (image.path, image.initrd) if path is not None)
