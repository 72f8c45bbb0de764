"""Downloads of images from URLs: start, list, cancel. Each runs as a task of this process.

`ports.ImageDownloads` keeps partial files, so that a fetch repeated after a restart resumes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import structlog

from interlock.core.errors import InterlockError, Invalid, NotFound
from interlock.core.parameters import check_name
from interlock.core.records import Image
from interlock.core.roles import Role
from interlock.ports import ImageDownloads
from interlock.service.auth import Caller
from interlock.service.inventory import Inventory
from interlock.service.request_models import NewImageFetch

_KEPT_MAX = 100
"""Number of completed fetches that are kept in the list."""
_log = structlog.get_logger(__name__)

FetchStatus = Literal["running", "succeeded", "failed", "cancelled"]


class Fetch:
    """One fetch and its progress."""

    def __init__(self, fetch_id: str, request: NewImageFetch, now_ms: int) -> None:
        self.id = fetch_id
        self.request = request
        self.begun_at_ms = now_ms
        self.status: FetchStatus = "running"
        self.phase: Literal["downloading", "inspecting"] = "downloading"
        self.received_bytes = 0
        self.total_bytes: int | None = None
        self.image: Image | None = None
        self.error: InterlockError | None = None
        self.task: asyncio.Task[None] | None = None

    def note(self, received: int, total: int | None) -> None:
        """Update the progress of the download."""
        self.received_bytes, self.total_bytes = received, total


class ImageFetches:
    """Starts and cancels fetches. For admins only: the server can reach its internal network."""

    def __init__(
        self, inventory: Inventory, downloads: ImageDownloads, new_id: Callable[[], str], now_ms: Callable[[], int]
    ) -> None:
        self._inventory = inventory
        self._downloads = downloads
        self._new_id = new_id
        self._now_ms = now_ms
        self._fetches: dict[str, Fetch] = {}

    async def begin(self, caller: Caller, request: NewImageFetch) -> Fetch:
        """Start to fetch an image; return the same fetch if it runs, or has succeeded and its image still exists.

        Raises:
            Invalid, Forbidden, NameTaken.
        """
        caller.require(Role.ADMIN, "add images")
        check_name(request.name, "name")
        self._downloads.check(request.url, "url")
        if request.checksum_url is not None:
            self._downloads.check(request.checksum_url, "checksum_url")
            if request.sha256 is not None:
                raise Invalid("checksum_url: mutually exclusive with sha256.", remedy="Give one of them.")
        proof = request.checksum_url or ("https:" if request.sha256 else request.url)
        if not proof.lower().startswith("https:"):
            raise Invalid(
                "url: http is not allowed without a checksum: the data could be changed in transit.",
                remedy="Use https, or give the SHA-256 (`--sha256`), or a checksum file over https.",
            )
        for earlier in self._fetches.values():
            if earlier.request == request and (earlier.status == "running" or await self._still_there(earlier)):
                return earlier
            if earlier.status == "running" and request.url == earlier.request.url:
                raise Invalid(f"url: already being fetched as {earlier.request.name}.", remedy="Wait until it ends.")
        await self._inventory.check_new_image(caller, request.name)
        fetch = Fetch(self._new_id(), request, self._now_ms())
        self._forget_old()
        self._fetches[fetch.id] = fetch
        fetch.task = asyncio.create_task(self._run(caller, fetch), name=f"fetch of the image {request.name}")
        return fetch

    def list(self, caller: Caller) -> tuple[Fetch, ...]:
        """Return the running and recently ended fetches, oldest first."""
        caller.require(Role.ADMIN, "list image fetches")
        return tuple(self._fetches.values())

    def find(self, caller: Caller, fetch_id: str) -> Fetch:
        """Return a fetch by id. Raises `NotFound`, `Forbidden`."""
        caller.require(Role.ADMIN, "see image fetches")
        found = self._fetches.get(fetch_id)
        if found is None:
            raise NotFound(f"Fetch not found: {fetch_id[:80]}.", remedy="Start it again: it resumes where it stopped.")
        return found

    async def cancel(self, caller: Caller, fetch_id: str) -> Fetch:
        """Cancel a fetch and delete its partial file; a fetch that has ended is unchanged. Raises `NotFound`."""
        fetch = self.find(caller, fetch_id)
        if fetch.task is not None and not fetch.task.done():
            fetch.task.cancel()
            await asyncio.wait([fetch.task])
            if fetch.status in {"running", "cancelled"}:
                fetch.status = "cancelled"
                await asyncio.to_thread(self._downloads.discard, fetch.request.url)
        return fetch

    async def close(self) -> None:
        """Stop all fetches; their partial files are kept."""
        tasks = [fetch.task for fetch in self._fetches.values() if fetch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, caller: Caller, fetch: Fetch) -> None:
        request = fetch.request
        try:
            fetch.image = await self._fetched(caller, fetch)
            fetch.status = "succeeded"
            await asyncio.to_thread(self._downloads.discard, request.url)
        except asyncio.CancelledError:
            fetch.status = "cancelled"
            raise
        except InterlockError as error:
            fetch.status, fetch.error = "failed", error
        except Exception as error:  # noqa: BLE001 - reported in the fetch's status
            _log.exception("image fetch failed", image=request.name)
            fetch.status = "failed"
            fetch.error = InterlockError(f"Internal error: {type(error).__name__}.")

    async def _fetched(self, caller: Caller, fetch: Fetch) -> Image:
        request = fetch.request
        expected = ("sha256", request.sha256.lower()) if request.sha256 else None
        if request.checksum_url is not None:
            expected = await self._downloads.checksum(request.checksum_url, request.url)
        path = await self._downloads.fetch(request.url, fetch.note)
        fetch.phase = "inspecting"
        if expected is not None:
            try:
                await asyncio.to_thread(_check_sum, path, *expected)
            except Invalid:
                self._downloads.discard(request.url)
                raise
        return await self._inventory.add_disk_image(
            caller, request.name, path, claimed=request.format, min_memory_mib=request.min_memory_mib
        )

    async def _still_there(self, fetch: Fetch) -> bool:
        image = fetch.image
        return image is not None and await self._inventory.has_image(image.id)

    def _forget_old(self) -> None:
        ended = [fetch.id for fetch in self._fetches.values() if fetch.status != "running"]
        for fetch_id in ended[: max(0, len(ended) - _KEPT_MAX + 1)]:
            del self._fetches[fetch_id]


def _check_sum(path: Path, algorithm: str, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise Invalid(
            f"{path.name}: its {algorithm.upper()} is {found}, not {expected}.",
            remedy="Fetch the image again, and take the checksum from its publisher.",
        )
