"""The server's side of the copies of images that a host has: sent when a guest needs them, listed, and removed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from interlock.core.records import Spec
from interlock.hypervisors.remote import files
from interlock.hypervisors.remote.session import Session
from interlock.ports import Permit


class ImageCalls:
    """The part of `RemoteHypervisor` about images."""

    def __init__(self) -> None:
        self._sending: dict[str, asyncio.Lock] = {}

    def _there(self) -> Session:
        """The connection. Raises `NotResponding` while there is none."""
        raise NotImplementedError

    async def _send_images(self, permit: Permit, spec: Spec) -> None:
        """Send the image files that the host has not."""
        for path in files.image_files(spec):
            async with self._sending.setdefault(path, asyncio.Lock()):
                await files.send_image(self._there(), permit, path)

    def copy_name(self, path: str) -> str:
        return files.cached_name(path)

    async def image_copies(self) -> dict[str, int]:
        found: dict[str, int] = await self._there().call("image_copies", "", (), dict[str, int])
        return found

    async def drop_image_copies(self, names: Collection[str]) -> tuple[str, ...]:
        words = (frozenset(names),)
        gone: tuple[str, ...] = await self._there().call("drop_image_copies", "", words, tuple[str, ...])
        return gone
