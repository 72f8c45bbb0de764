"""The verbs of looking at a guest and typing into it: its serial console, its screen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from interlock.core.errors import NotFound, NotThere, Refused
from interlock.core.records import Instance
from interlock.ports import Hypervisor, Role, Stream
from interlock.service.callers import Caller
from interlock.service.instances import Instances

HISTORY_BYTES_MAX = 1024 * 1024
"""How far back the history of a live console reaches at most."""
_SEAM_BYTES_MAX = 4096


class Seeing:
    """Looks at guests for callers, for whom only their own project's exist."""

    def __init__(self, instances: Instances, hypervisor_of: Callable[[str], Hypervisor]) -> None:
        """`hypervisor_of` gives what holds the guests of a host, by the host's name."""
        self._instances = instances
        self._hypervisor_of = hypervisor_of

    async def console(self, caller: Caller, reference: str, history_lines: int) -> tuple[bytes, Stream]:
        """The last lines that the guest wrote on its serial console, and the live console that goes on from there.

        Raises:
            Forbidden: the caller speaks for a host only.
            NotFound: there is no such instance, or no guest of it runs.
        """
        caller.require(Role.READER, "look at a console")
        instance, hypervisor = await self._find(caller, reference)
        try:
            stream = await hypervisor.open_console(instance.id)
        except NotThere as absent:
            raise _not_running(instance, "console") from absent
        try:
            written = await hypervisor.console_tail(instance.id, HISTORY_BYTES_MAX) if history_lines else None
        except BaseException:
            await stream.close()
            raise
        history = last_lines(written or b"", history_lines)
        begun = _Begun(stream)
        at_hand = await begun.at_hand()
        begun.put_back(at_hand[_overlap(history, at_hand) :])
        return history, begun

    async def written(self, caller: Caller, reference: str, length: int) -> bytes:
        """The last so many bytes that the guest wrote on its serial console, whether it runs or not.

        Raises:
            NotFound: there is no such instance, or it has no console yet.
            NotResponding: its host cannot be asked now.
        """
        instance, hypervisor = await self._find(caller, reference)
        tail = await hypervisor.console_tail(instance.id, length)
        if tail is None:
            raise NotFound(
                f"The instance {instance.name} has no console yet.", remedy="It gets one when it is started."
            )
        return tail

    async def display(self, caller: Caller, reference: str) -> Stream:
        """A connection that speaks VNC with the guest's screen. Who has it can type, so that readers have none.

        Raises:
            Forbidden: the caller is a reader.
            NotFound: as `console`, or the guest has no screen.
        """
        caller.require(Role.MEMBER, "use a display, which can be typed into")
        instance, hypervisor = await self._find(caller, reference)
        try:
            return await hypervisor.open_display(instance.id)
        except NotThere as absent:
            raise _not_running(instance, "display") from absent
        except Refused as refused:
            raise NotFound(refused.message, remedy=refused.remedy) from refused

    async def screenshot(self, caller: Caller, reference: str) -> bytes:
        """What the guest's screen shows, as PNG. Raises `NotFound` as `display`."""
        instance, hypervisor = await self._find(caller, reference)
        try:
            return await hypervisor.screenshot(instance.id)
        except NotThere as absent:
            raise _not_running(instance, "screen") from absent
        except Refused as refused:
            raise NotFound(refused.message, remedy=refused.remedy) from refused

    async def _find(self, caller: Caller, reference: str) -> tuple[Instance, Hypervisor]:
        instance = await self._instances.describe(caller, reference)
        return instance, self._hypervisor_of(instance.host)


class _Begun:
    """A stream of which something has been read already. Satisfies `ports.Stream`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting = b""
        self._reading: asyncio.Task[bytes] | None = None

    async def at_hand(self) -> bytes:
        """What can be read without waiting."""
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
    """The last so many lines of a text."""
    start = len(text) - 1 if text.endswith(b"\n") else len(text)
    for _ in range(lines):
        start = text.rfind(b"\n", 0, start)
        if start < 0:
            return text
    return text[start + 1 :]


def _overlap(history: bytes, live: bytes) -> int:
    """How much of the beginning of `live` the history ends with: it was written while both were fetched."""
    for length in range(min(len(live), len(history), _SEAM_BYTES_MAX), 0, -1):
        if history.endswith(live[:length]):
            return length
    return 0


def _not_running(instance: Instance, what: str) -> NotFound:
    return NotFound(
        f"The instance {instance.name} has no live {what}: no guest of it runs.",
        remedy=f"Start it; what it said before is in its console's history. It is {instance.vm_state.value}.",
    )
