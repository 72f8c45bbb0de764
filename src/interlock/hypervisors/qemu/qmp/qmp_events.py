"""The QMP event log of one QEMU process: a pipe that keeps events until they are read, and what the events mean.

The command monitor drops events while nobody is connected. This monitor writes into a pipe that QEMU itself keeps open,
so that up to 64 KiB of events outlive the server. It is the only source of events, past and present, so that each is
reported once. Liveness probes are sent here too: that costs one line each way, and nobody waits for the answer.
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
_PROBE_ID: Final = b"liveness-probe"
_PROBE: Final = b'{"execute":"query-status","id":"%s"}\n' % _PROBE_ID


class QemuEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One QMP event."""

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


class QmpEventLog:
    """Reads the pipe. Lines that are neither events nor answers to a probe are skipped."""

    def __init__(
        self, commands: int, events: int, on_event: Callable[[QemuEvent], None], on_probe_answer: Callable[[], None]
    ) -> None:
        """Take over both descriptors, which are non-blocking.

        `on_event` gets each event, in order; `on_probe_answer` is called at each answer to `send_probe`.
        """
        self._commands: int | None = commands
        self._events: int | None = events
        self._on_event = on_event
        self._on_probe_answer = on_probe_answer
        self._rest = b""
        self._decoder = msgspec.json.Decoder(QemuEvent)
        self._loop = asyncio.get_running_loop()

    def negotiate(self) -> None:
        """Have QEMU send events. Idempotent."""
        # A full pipe holds this very command many times over.
        self._send(_NEGOTIATE)

    def send_probe(self) -> None:
        """Send a liveness probe, which QEMU answers when it comes to it."""
        self._send(_PROBE)

    def _send(self, line: bytes) -> None:
        if self._commands is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._commands, line)

    def watch(self) -> None:
        """Read events as they come from now on."""
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
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            event = self._decoder.decode(line)
        except msgspec.DecodeError:
            if _PROBE_ID in line:
                self._on_probe_answer()
        else:
            self._on_event(event)

    def close(self) -> None:
        """Stop reading; later events wait for the next reader."""
        for descriptor in (self._commands, self._events):
            if descriptor is not None:
                self._loop.remove_reader(descriptor)
                os.close(descriptor)
        self._commands = self._events = None


class LivenessProbe:
    """Probes one QEMU process; reports once when it stops responding, and once when it responds again."""

    def __init__(self, send: Callable[[], None], report: Callable[[GuestEvent], None]) -> None:
        """`send` sends a probe, which `responded` answers; `report` gets `NOT_RESPONDING` and `RESPONDING`."""
        self._send = send
        self._report = report
        self._rounds: int | None = None
        """Rounds since the outstanding probe was sent; None if none is outstanding."""
        self._reported = False

    def start_round(self, rounds_max: int) -> None:
        """Send a probe unless one is outstanding; report the process if it has been for `rounds_max` rounds."""
        if self._rounds is None:
            self._rounds = 0
            self._send()
            return
        self._rounds += 1
        if self._rounds >= rounds_max and not self._reported:
            self._reported = True
            self._report(GuestEvent.NOT_RESPONDING)

    def responded(self) -> None:
        """Note the answer to a probe."""
        self._rounds = None
        if self._reported:
            self._reported = False
            self._report(GuestEvent.RESPONDING)


class EventInterpreter:
    """Translates QMP events to guest events.

    The firmware itself resets the machine up to a dozen times after a reset, and such a reset looks exactly like one by
    the guest. So resets within the settling time after another reset, requested or not, are part of that one. A guest
    that reboots again and again within the settling time is reported once.
    """

    def __init__(self, settle_ms: int) -> None:
        self._settle_ms = settle_ms
        self._last_reset_ms: int | None = None
        self._failed: GuestEvent | None = None

    def halt(self, event: QemuEvent) -> GuestEvent | None:
        """Return why the guest is halted by this event: no space for what it wrote, or a disk error; else None.

        No data is lost: QEMU keeps the writes, and retries them when the guest is resumed.
        """
        match event.event:
            case "BLOCK_IO_ERROR" if event.data.get("action") == "stop":
                self._failed = GuestEvent.NO_SPACE if event.data.get("nospace") else GuestEvent.IO_ERROR
                return None
            case "STOP" | "RESUME":
                halted, self._failed = self._failed if event.event == "STOP" else None, None
                return halted
            case _:
                return None

    def interpret(self, event: QemuEvent) -> GuestEvent | None:
        """Return what the guest did by itself, or None."""
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
