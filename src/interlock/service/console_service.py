"""Guest access: serial console, VNC display and screenshots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from interlock.core.errors import GuestNotFound, NotFound, OperationRejected
from interlock.core.records import Instance
from interlock.core.roles import Role
from interlock.ports import Hypervisor, Stream
from interlock.service.auth import Caller
from interlock.service.instances import Instances

HISTORY_BYTES_MAX = 1024 * 1024
"""Maximum history sent when a console is opened."""
_SEAM_BYTES_MAX = 4096


class ConsoleService:
    """Gives callers access to the guests of their project."""

    def __init__(self, instances: Instances, hypervisor_of: Callable[[str], Hypervisor]) -> None:
        """`hypervisor_of` returns the hypervisor of a host by the host's name."""
        self._instances = instances
        self._hypervisor_of = hypervisor_of

    async def console(self, caller: Caller, reference: str, history_lines: int) -> tuple[bytes, Stream]:
        """Return the last lines of the serial console, and a live stream that continues after them.

        Raises:
            Forbidden: the caller is an agent.
            NotFound: the instance does not exist, or its guest does not run.
        """
        caller.require(Role.READER, "read a console")
        instance, hypervisor = await self._find(caller, reference)
        try:
            stream = await hypervisor.open_console(instance.id)
        except GuestNotFound as absent:
            raise _not_running(instance, "console") from absent
        try:
            written = await hypervisor.console_tail(instance.id, HISTORY_BYTES_MAX) if history_lines else None
        except BaseException:
            await stream.close()
            raise
        history = last_lines(written or b"", history_lines)
        live = _BufferedStream(stream)
        available = await live.read_available()
        live.put_back(available[_overlap(history, available) :])
        return history, live

    async def written(self, caller: Caller, reference: str, length: int) -> bytes:
        """Return the last `length` bytes of the serial console, whether the guest runs or not.

        Raises:
            NotFound: the instance does not exist, or has no console yet.
            NotResponding: its host cannot be reached now.
        """
        instance, hypervisor = await self._find(caller, reference)
        tail = await hypervisor.console_tail(instance.id, length)
        if tail is None:
            raise NotFound(f"The VM {instance.name} has no console yet.", remedy="Start it to create one.")
        return tail

    async def display(self, caller: Caller, reference: str) -> Stream:
        """Open a VNC connection to the guest's display. It accepts input, so readers may not use it.

        Raises:
            Forbidden: the caller is a reader.
            NotFound: as `console`, or the guest has no display.
        """
        caller.require(Role.MEMBER, "use a display, which accepts input")
        instance, hypervisor = await self._find(caller, reference)
        try:
            return await hypervisor.open_display(instance.id)
        except GuestNotFound as absent:
            raise _not_running(instance, "display") from absent
        except OperationRejected as refused:
            raise NotFound(refused.message, remedy=refused.remedy) from refused

    async def screenshot(self, caller: Caller, reference: str) -> bytes:
        """Return a PNG screenshot of the guest's display. Raises `NotFound` as `display`."""
        instance, hypervisor = await self._find(caller, reference)
        try:
            return await hypervisor.screenshot(instance.id)
        except GuestNotFound as absent:
            raise _not_running(instance, "screen") from absent
        except OperationRejected as refused:
            raise NotFound(refused.message, remedy=refused.remedy) from refused

    async def _find(self, caller: Caller, reference: str) -> tuple[Instance, Hypervisor]:
        instance = await self._instances.describe(caller, reference)
        return instance, self._hypervisor_of(instance.host)


class _BufferedStream:
    """A stream with pushback. Satisfies `ports.Stream`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting = b""
        self._reading: asyncio.Task[bytes] | None = None

    async def read_available(self) -> bytes:
        """Return what can be read without waiting."""
        self._reading = asyncio.create_task(self._stream.read())
        await asyncio.sleep(0)
        if not self._reading.done():
            return b""
        reading, self._reading = self._reading, None
        return reading.result()

    def put_back(self, data: bytes) -> None:
        self._waiting = data

    async def read(self) -> bytes:
        if self._waiting:
            waiting, self._waiting = self._waiting, b""
            return waiting
        if self._reading is not None:
            reading, self._reading = self._reading, None
            return await reading
        return await self._stream.read()

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        await self._stream.close()


def last_lines(text: bytes, lines: int) -> bytes:
    """Return the last `lines` lines of a text."""
    start = len(text) - 1 if text.endswith(b"\n") else len(text)
    for _ in range(lines):
        start = text.rfind(b"\n", 0, start)
        if start < 0:
            return text
    return text[start + 1 :]


def _overlap(history: bytes, live: bytes) -> int:
    """Return the length of the longest prefix of `live` that `history` ends with: output written between both reads."""
    for length in range(min(len(live), len(history), _SEAM_BYTES_MAX), 0, -1):
        if history.endswith(live[:length]):
            return length
    return 0


def _not_running(instance: Instance, what: str) -> NotFound:
    return NotFound(
        f"The VM {instance.name} has no live {what}: it is {instance.vm_state.value}, not running.",
        remedy="Start it; its earlier output is in the console history.",
    )
