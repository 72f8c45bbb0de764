"""Copies of images on the other hosts: those that nobody needs any more are removed.

A copy goes when the server does not have its image any more, or when for some time no instance there needed it. What a
guest boots, or a disk is a layer over, is the host's own to know, and is never removed by it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import structlog

from interlock.core.claims import claims_of
from interlock.core.errors import HypervisorError, StoreClosed, StoreError
from interlock.core.records import Image, Instance
from interlock.driver.hosts import Hosts
from interlock.ports import RemoteHost, Store, every_instance

_LOG = structlog.get_logger(__name__)
_LOOK_S_MAX: Final = 3600.0
"""How often the copies are looked at, at least, in seconds."""


class ImageCopies:
    """Looks at the copies of images on every host that can be asked, now and then, and whenever it is rung.

    Args:
        store: has the images, and the instances that need them.
        hosts: have the copies.
        unused_ms: how long a copy stays that no instance there needs, in milliseconds; 0: for as long as its image.
    """

    def __init__(self, store: Store, hosts: Hosts, unused_ms: int) -> None:
        self._store = store
        self._hosts = hosts
        self._unused_ms = unused_ms
        self._look_s = min(_LOOK_S_MAX, unused_ms / 2000) if unused_ms else _LOOK_S_MAX
        self._bell = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._hosts.listen(lambda _host: self.ring())
        self._task = asyncio.create_task(self._run(), name="copies of images on hosts")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def ring(self) -> None:
        """Have them looked at soon: an image was deleted, or a host has come."""
        self._bell.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._bell.wait()
            self._bell.clear()
            try:
                await self.sweep()
            except StoreClosed:
                return
            except StoreError as error:
                _LOG.error("the copies of images cannot be looked at", why=error.message)

    async def sweep(self) -> None:
        """Look once. A host that cannot be asked is passed over. Raises `StoreError`."""
        copies: dict[str, dict[str, int]] = {}
        for name, host in self._hosts.all_linked().items():
            # Before the store is: what is asked for from now on is kept by the host, whatever it is told to remove.
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
            _LOG.warning("copies of images stay on a host", host=name, why=error.message)
        else:
            _LOG.info("copies of images were removed", host=name, copies=dropped)

    async def _paths(self) -> tuple[set[str], dict[str, set[str]]]:
        """The files of every image that the server has, and of those that the instances of each host need."""
        images = {image.id: image for image in await self._store.images()}
        known = {path for image in images.values() for path in _files(image)}
        needed: dict[str, set[str]] = {}
        async for instance in every_instance(self._store):
            files = {path for image in _images(instance, images) for path in _files(image)}
            for host in {instance.host, *(claim.host for claim in claims_of(instance))}:
                needed.setdefault(host, set()).update(files)
        return known, needed


def _images(instance: Instance, images: dict[str, Image]) -> list[Image]:
    """The images of the instance as it is, was before a resize, and is to be."""
    specs = (spec for spec in (instance.spec, instance.prior_spec) if spec is not None)
    found = [image for spec in specs for image in (spec.image, spec.rescue_image) if image is not None]
    return found + [images[image_id] for image_id in instance.image_ids if image_id in images]


def _files(image: Image) -> tuple[str, ...]:
    return tuple(path for path in (image.path, image.initrd) if path is not None)
