"""The store's monotonic time, and its offset to the wall clock. The stores read no other clock.

All ages are measured in the store's time. It follows CLOCK_BOOTTIME, so that setting the wall clock changes no age.
Between two processes it advances by the time that the machine certainly ran: by CLOCK_BOOTTIME within a boot, by the
uptime after a reboot, and never by more than the wall clock. So ages may be too small by the time that the machine was
off, but never too large.

Times are stored in the store's time and shown with an offset that follows the wall clock. A correction of the wall
clock corrects all times since the boot; older times keep their offset, because time off is unknown to the store's time.
"""

from __future__ import annotations

import bisect
import time
from pathlib import Path
from typing import Final, Self

import msgspec

from interlock.ports import Clock, Jump

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
JUMP_MS: Final = 10_000
GRACE_MS: Final = 600_000
"""Defaults of `StoreClock`."""
FOLLOWED_MS: Final = 1_000
"""The difference from which the offset follows the wall clock: clocks are also slewed."""


class SystemClock:
    """The machine's own clocks."""

    def __init__(self) -> None:
        try:
            self._boot = _BOOT_ID.read_text(encoding="ascii").strip()
        except OSError:
            self._boot = ""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000  # noqa: TID251  (the one place where the wall clock is read)

    def running_ms(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def boot(self) -> str:
        return self._boot


class KeptTime(msgspec.Struct, frozen=True, kw_only=True):
    """The persistent state of a store's clock."""

    seen_ms: int = 0
    """The latest store time that was written; 0 if none."""
    boot: str = ""
    """The boot id of the last process."""
    booted_ms: int = 0
    """The store's time minus the uptime of that boot."""
    cautious_until_ms: int = 0
    """Irreversible scheduled actions are delayed until then."""
    jump: Jump | None = None
    """The last jump of the wall clock."""


class Offsets:
    """Offsets from the store's time to displayed time: pairs of start (store time) and offset, in ms."""

    def __init__(self, kept: tuple[tuple[int, int], ...] = ()) -> None:
        self.kept: tuple[tuple[int, int], ...] = kept or ((0, 0),)

    @property
    def now_ms(self) -> int:
        """The present offset."""
        return self.kept[-1][1]

    def shown_ms(self, at_ms: int) -> int:
        """Convert store time to displayed time."""
        if at_ms >= self.kept[-1][0]:
            return at_ms + self.kept[-1][1]  # as nearly all are
        place = bisect.bisect_right(self.kept, at_ms, key=lambda one: one[0])
        return at_ms + self.kept[max(0, place - 1)][1]

    def shown_sql(self, column: str) -> str:
        """Return `shown_ms` of a column as an SQL expression."""
        (_, first), *later = self.kept
        cases = "".join(f" WHEN {column} >= {from_ms} THEN {offset_ms}" for from_ms, offset_ms in reversed(later))
        return f"{column} + CASE{cases} ELSE {first} END" if later else f"{column} + {first}"

    def stored_ms(self, shown_ms: int) -> int:
        """Return the first store time that is displayed as `shown_ms` or later."""
        for place, (from_ms, offset_ms) in enumerate(self.kept):
            until_ms = self.kept[place + 1][0] if place + 1 < len(self.kept) else None
            at_ms = max(from_ms, shown_ms - offset_ms) if place else shown_ms - offset_ms
            if until_ms is None or at_ms < until_ms:
                return at_ms
        raise AssertionError("the last offset has no end")

    def corrected(self, by_ms: int) -> Offsets:
        """Return a copy with the offset since the boot corrected."""
        (from_ms, offset_ms) = self.kept[-1]
        return Offsets((*self.kept[:-1], (from_ms, offset_ms + by_ms)))

    def continued(self, from_ms: int, by_ms: int) -> Offsets:
        """Return a copy with an additional offset from `from_ms` on."""
        return Offsets((*self.kept, (from_ms, self.now_ms + by_ms)))


class ClockState(msgspec.Struct, frozen=True, kw_only=True):
    """What a store keeps of its clock, so that the time goes on in the next process."""

    time: KeptTime = KeptTime()
    offsets: tuple[tuple[int, int], ...] = ()


class StoreClock:
    """The time of an open store: one that never goes back, and that no setting of the wall clock changes (law 6).

    A program that uses the library makes one with `StoreClock.resumed`, takes every `now_ms` from it, and writes its
    `state` in the transaction of every change. One process at a time may do so for one store.

    Args:
        clock: the machine's clocks.
        kept: the persistent state.
        offsets: the offsets to displayed time.
        jump_ms: the minimum difference that counts as a jump.
        grace_ms: how long irreversible scheduled actions are delayed after a forward jump.
    """

    def __init__(
        self, clock: Clock, kept: KeptTime, offsets: Offsets, *, jump_ms: int = JUMP_MS, grace_ms: int = GRACE_MS
    ) -> None:
        self._clock: Final = clock
        self._jump_ms: Final = jump_ms
        self._grace_ms: Final = grace_ms
        self.offsets = offsets
        running_ms, wall_ms, boot = clock.running_ms(), clock.wall_ms(), clock.boot()
        same_boot = bool(boot) and boot == kept.boot and running_ms + kept.booted_ms >= kept.seen_ms
        if kept.seen_ms:
            ran_ms = running_ms + kept.booted_ms - kept.seen_ms if same_boot else running_ms
            elapsed_ms = max(0, min(ran_ms, wall_ms - offsets.shown_ms(kept.seen_ms)))
            self._last_ms = kept.seen_ms + elapsed_ms
        else:
            elapsed_ms = 0
            self._last_ms = wall_ms
        self.kept = KeptTime(
            seen_ms=self._last_ms,
            boot=boot,
            booted_ms=self._last_ms - running_ms,
            # The grace period counts only while a server runs, so that an operator can react.
            cautious_until_ms=kept.cautious_until_ms + elapsed_ms if kept.cautious_until_ms > kept.seen_ms else 0,
            jump=kept.jump,
        )
        self.jump_at_opening: Final = self.look(between_boots=not same_boot)

    @classmethod
    def resumed(cls, state: ClockState | None = None, clock: Clock | None = None) -> Self:
        """Return the clock of a store that kept `state`; None for a new store. `clock`: by default the system's."""
        kept = state or ClockState()
        return cls(clock or SystemClock(), kept.time, Offsets(kept.offsets))

    @property
    def state(self) -> ClockState:
        """What to write with the records that have times of this clock."""
        self.look()
        time_now = msgspec.structs.replace(self.kept, seen_ms=self.now_ms())
        return ClockState(time=time_now, offsets=self.offsets.kept)

    def shown_ms(self, at_ms: int) -> int:
        """Convert a time of the store to wall-clock time for display, in milliseconds since the Unix epoch."""
        return self.offsets.shown_ms(at_ms)

    def now_ms(self) -> int:
        """Return the store's time, which never decreases. Thread-safe."""
        now_ms = self._clock.running_ms() + self.kept.booted_ms
        if now_ms < self._last_ms:
            return self._last_ms
        self._last_ms = now_ms
        return now_ms

    def look(self, *, between_boots: bool = False) -> Jump | None:
        """Update the offset from the wall clock; return the jump since the last call, if any."""
        now_ms = self.now_ms()
        by_ms = self._clock.wall_ms() - now_ms - self.offsets.now_ms
        if abs(by_ms) < min(FOLLOWED_MS, self._jump_ms):
            return None
        if between_boots and by_ms > 0:
            self.offsets = self.offsets.continued(now_ms, by_ms)
        else:
            self.offsets = self.offsets.corrected(by_ms)
        if abs(by_ms) < self._jump_ms:
            return None
        jump = Jump(at_ms=now_ms, by_ms=by_ms, between_boots=between_boots)
        cautious_ms = max(self.kept.cautious_until_ms, now_ms + self._grace_ms) if by_ms > 0 else 0
        self.kept = msgspec.structs.replace(
            self.kept, jump=jump, cautious_until_ms=max(self.kept.cautious_until_ms, cautious_ms)
        )
        return jump
