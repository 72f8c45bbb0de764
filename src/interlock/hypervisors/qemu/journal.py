"""The event monitor of one QEMU: a pipe in which what it tells waits until somebody reads it, and what it means.

The command monitor drops events while nobody is connected. This one writes into a pipe that QEMU itself keeps open, so
that events survive us; 64 KiB of them wait there. It is the only source of events, live and kept alike, so that each is
told once. What is done about an event is not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any, Final

import msgspec

from interlock.core.records import GuestEvent

_READ_BYTES: Final = 65_536
_LINE_BYTES_MAX: Final = 1_048_576
_NEGOTIATE: Final = b'{"execute":"qmp_capabilities"}\n'


class QemuEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event, as QEMU tells it."""

    class Timestamp(msgspec.Struct, frozen=True, kw_only=True):
        seconds: int
        microseconds: int

    event: str
    timestamp: Timestamp
    data: dict[str, Any] = {}

    @property
    def at_ms(self) -> int:
        """When it happened, in milliseconds on QEMU's wall clock."""
        return self.timestamp.seconds * 1000 + self.timestamp.microseconds // 1000


class Journal:
    """Reads the pipe. Answers and anything that is no event are passed over."""

    def __init__(self, commands: int, events: int, listener: Callable[[QemuEvent], None]) -> None:
        """Take both descriptors, opened without blocking. `listener` gets each event, in order."""
        self._commands: int | None = commands
        self._events: int | None = events
        self._listener = listener
        self._rest = b""
        self._decoder = msgspec.json.Decoder(QemuEvent)
        self._loop = asyncio.get_running_loop()

    def negotiate(self) -> None:
        """Ask QEMU to tell events here. It is harmless where it does already."""
        if self._commands is not None:
            with contextlib.suppress(BlockingIOError):
                # A full pipe holds this very request many times over.
                os.write(self._commands, _NEGOTIATE)

    def watch(self) -> None:
        """From now on read events as they come."""
        if self._events is not None:
            self._loop.add_reader(self._events, self.drain)

    def drain(self) -> None:
        """Read everything that is there."""
        while self._events is not None:
            try:
                chunk = os.read(self._events, _READ_BYTES)
            except BlockingIOError:
                return
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > _LINE_BYTES_MAX:
                self._rest = b""
            for line in lines:
                with contextlib.suppress(msgspec.DecodeError):
                    self._listener(self._decoder.decode(line))

    def close(self) -> None:
        """Stop reading; what comes from now on waits for the next reader."""
        for descriptor in (self._commands, self._events):
            if descriptor is not None:
                self._loop.remove_reader(descriptor)
                os.close(descriptor)
        self._commands = self._events = None


class Meaning:
    """What a guest's events mean.

    The firmware resets the machine itself, up to a dozen times, after a reset by the guest or by us, and such a reset
    looks exactly like one by the guest. So resets that follow one another within the settling time are one, and those
    that follow ours are ours. A guest that reboots itself again and again within that time is told of once.
    """

    def __init__(self, settle_ms: int) -> None:
        self._settle_ms = settle_ms
        self._last_reset_ms: int | None = None
        self._no_room = False

    def halts_for_room(self, event: QemuEvent) -> bool:
        """Whether by this the guest stands still since QEMU found no room for what it wrote.

        Nothing of it is lost: QEMU keeps the writes, and does them when the guest is let go on.
        """
        match event.event:
            case "BLOCK_IO_ERROR":
                self._no_room = event.data.get("action") == "stop"
                return False
            case "STOP" | "RESUME":
                halted, self._no_room = self._no_room and event.event == "STOP", False
                return halted
            case _:
                return False

    def of(self, event: QemuEvent) -> GuestEvent | None:
        """The news in an event, or None."""
        match event.event:
            case "SHUTDOWN":
                return GuestEvent.STOPPED if event.data.get("reason") == "guest-shutdown" else None
            case "GUEST_PANICKED":
                return GuestEvent.CRASHED
            case "RESET":
                last, self._last_reset_ms = self._last_reset_ms, event.at_ms
                settling = last is not None and abs(event.at_ms - last) < self._settle_ms
                return GuestEvent.RESET if event.data.get("guest") is True and not settling else None
            case _:
                return None
