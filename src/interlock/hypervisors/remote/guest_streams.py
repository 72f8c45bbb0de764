"""Consoles and displays of guests, agent side: open streams by number."""

from __future__ import annotations

import itertools

from interlock.core.errors import GuestNotFound
from interlock.ports import Hypervisor, Stream


class GuestStreams:
    """The streams that a server has opened. Implements `methods.StreamCalls`."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)

    async def open_console(self, instance_id: str) -> int:
        return self._add(await self._hypervisor.open_console(instance_id))

    async def open_display(self, instance_id: str) -> int:
        return self._add(await self._hypervisor.open_display(instance_id))

    def _add(self, stream: Stream) -> int:
        number = next(self._numbers)
        self._streams[number] = stream
        return number

    def _stream(self, number: int) -> Stream:
        try:
            return self._streams[number]
        except KeyError:
            raise GuestNotFound("The stream was closed.") from None

    async def stream_read(self, number: int) -> bytes:
        return await self._stream(number).read()

    async def stream_write(self, number: int, data: bytes) -> None:
        await self._stream(number).write(data)

    async def stream_close(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            await stream.close()

    async def close(self) -> None:
        """Close all streams."""
        for number in tuple(self._streams):
            await self.stream_close(number)
