"""Fault injection of the simulated host: by rates and a seed, or scripted for the next calls.

* One seed, one history. The fault of a call depends on the seed, the instance and the number of its calls, and not on
  how the calls of different instances interleave.
* A call meets one fault at most, of those that apply to it (`APPLIES_TO`). Hard power-off and removal can only be slow:
  on a real host a signal that cannot be ignored does both.

The effects of faults are in `calls` and `host`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from random import Random  # noqa: TID251 - seeded by its owner; the ban protects the core
from typing import Final

import msgspec


class Method(StrEnum):
    """The calls of the port that can have a fault or a delay."""

    INSPECT = "inspect"
    DEFINE = "define"
    UNDEFINE = "undefine"
    POWER_ON = "power_on"
    POWER_OFF = "power_off"
    PRESS_POWER_BUTTON = "press_power_button"
    RESET = "reset"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    ATTACH_DISK = "attach_disk"
    DETACH_DISK = "detach_disk"
    SWAP_DISK = "swap_disk"
    COPY_DISK = "copy_disk"
    ATTACH_INTERFACE = "attach_interface"
    UPDATE_INTERFACE = "update_interface"
    DETACH_INTERFACE = "detach_interface"
    SAVE_MEMORY = "save_memory"
    RESTORE_MEMORY = "restore_memory"
    FORGET_MEMORY = "forget_memory"
    DUMP_MEMORY = "dump_memory"
    COPY_ROOT_DISK = "copy_root_disk"
    ROOT_DISK_FROM = "root_disk_from"
    DROP_ROOT_DISKS = "drop_root_disks"
    EXPORT_ROOT_DISK = "export_root_disk"
    ASK_SHUTDOWN = "ask_shutdown"
    SET_PASSWORD = "set_password"  # noqa: S105 - the name of a call


class Slow(msgspec.Struct, frozen=True):
    """The call takes longer, before its effect."""

    delay_ms: int


class Hangs(msgspec.Struct, frozen=True):
    """The guest's process stops before it reads the command, as after SIGSTOP."""

    thaw_after_ms: int | None = None
    """When it continues by itself; None: when it is thawed."""


class AnswerLost(msgspec.Struct, frozen=True):
    """The effect takes place, and the answer is lost."""


class Refuses(msgspec.Struct, frozen=True):
    """The hypervisor rejects the call, without an effect."""

    message: str = "The simulated hypervisor rejects this call."


class GuestPanics(msgspec.Struct, frozen=True):
    """The guest panics right after the effect."""


class GuestVanishes(msgspec.Struct, frozen=True):
    """The guest's process ends right before the effect; of a start, right after it."""


class GuestIgnores(msgspec.Struct, frozen=True):
    """The guest does not cooperate: it ignores its power button, or does not release the device."""


Fault = Slow | Hangs | AnswerLost | Refuses | GuestPanics | GuestVanishes | GuestIgnores

_TO_A_GUEST: Final = frozenset(
    {
        Method.PRESS_POWER_BUTTON,
        Method.RESET,
        Method.PAUSE,
        Method.UNPAUSE,
        Method.ATTACH_DISK,
        Method.DETACH_DISK,
        Method.POWER_ON,
        Method.SWAP_DISK,
        Method.ATTACH_INTERFACE,
        Method.UPDATE_INTERFACE,
        Method.DETACH_INTERFACE,
        Method.ASK_SHUTDOWN,
        Method.SET_PASSWORD,
        Method.RESTORE_MEMORY,
    }
)
_OF_ITS_MEMORY: Final = frozenset({Method.SAVE_MEMORY, Method.DUMP_MEMORY})
"""A paused guest does not panic, and there is none once its memory is saved."""
_OF_FILES: Final = frozenset(
    {
        Method.DEFINE,
        Method.COPY_DISK,
        Method.COPY_ROOT_DISK,
        Method.ROOT_DISK_FROM,
        Method.DROP_ROOT_DISKS,
        Method.EXPORT_ROOT_DISK,
    }
)

APPLIES_TO: Final[Mapping[type[Fault], frozenset[Method]]] = {
    Slow: frozenset(Method),
    Hangs: _TO_A_GUEST | _OF_ITS_MEMORY | {Method.INSPECT},
    AnswerLost: _TO_A_GUEST | _OF_ITS_MEMORY | _OF_FILES,
    Refuses: _TO_A_GUEST | _OF_ITS_MEMORY | _OF_FILES,
    GuestPanics: _TO_A_GUEST,
    GuestVanishes: _TO_A_GUEST | _OF_ITS_MEMORY,
    GuestIgnores: frozenset(
        {Method.PRESS_POWER_BUTTON, Method.ASK_SHUTDOWN, Method.DETACH_DISK, Method.DETACH_INTERFACE}
    ),
}
"""The calls that a fault applies to."""


class FaultRates(msgspec.Struct, frozen=True, kw_only=True):
    """The rate of each fault as a share of all calls; their sum is 1 at most."""

    slow: float = 0.0
    hangs: float = 0.0
    answer_lost: float = 0.0
    refuses: float = 0.0
    panics: float = 0.0
    vanishes: float = 0.0
    ignores: float = 0.0
    delay_ms_max: int = 100
    """Maximum delay of a slow call."""
    thaw_after_ms_max: int | None = None
    """Maximum time that a guest hangs; None: until it is thawed."""

    def __post_init__(self) -> None:
        """Raise ValueError for invalid rates."""
        shares = self.shares()
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"Invalid fault rates {shares}: expected shares of all calls, from 0, whose sum is 1 at most."
            )

    def shares(self) -> tuple[float, ...]:
        """Return the rate of each fault, in the order of `fault`."""
        return (self.slow, self.hangs, self.answer_lost, self.refuses, self.panics, self.vanishes, self.ignores)

    def fault(self, number: int, random: Random) -> Fault:
        """Return the fault with that index in `shares`, with random parameters."""
        if number == 0:
            return Slow(random.randint(0, self.delay_ms_max))
        if number == 1:
            longest = self.thaw_after_ms_max
            return Hangs(None if longest is None else random.randint(0, longest))
        return (AnswerLost(), Refuses(), GuestPanics(), GuestVanishes(), GuestIgnores())[number - 2]


class FaultPlan:
    """Decides the fault of each call."""

    def __init__(self, seed: int = 0, rates: FaultRates | None = None) -> None:
        self._seed = seed
        self._rates = rates or FaultRates()
        self._drawn: dict[str, Random] = {}
        self._scripted: dict[tuple[str, Method], deque[Fault]] = {}
        self.quiet = not any(self._rates.shares())
        """Whether no call can meet a fault now. Then `next` need not be called."""

    def script(self, instance_id: str, method: Method, *faults: Fault) -> None:
        """Let the next calls of `method` on the instance meet these faults, one each, before any by rate.

        Raises:
            ValueError: the fault does not apply to the method.
        """
        for fault in faults:
            if method not in APPLIES_TO[type(fault)]:
                raise ValueError(f"The fault {type(fault).__name__} does not apply to {method}.")
        self._scripted.setdefault((instance_id, method), deque()).extend(faults)
        self.quiet = False

    def calm(self) -> None:
        """Inject no faults from now on, scripted or by rate."""
        self._rates = FaultRates()
        self._scripted.clear()
        self.quiet = True

    def next(self, instance_id: str, method: Method) -> Fault | None:
        """Return the fault of this call, or None."""
        scripted = self._scripted.get((instance_id, method))
        if scripted:
            fault = scripted.popleft()
            if not scripted:
                del self._scripted[instance_id, method]
                self.quiet = not self._scripted and not any(self._rates.shares())
            return fault
        return self._draw(instance_id, method)

    def _draw(self, instance_id: str, method: Method) -> Fault | None:
        random = self._drawn.get(instance_id)
        if random is None:
            random = self._drawn[instance_id] = Random(f"{self._seed}/{instance_id}")  # noqa: S311 - not for secrets
        point = random.random()
        for number, share in enumerate(self._rates.shares()):
            if point < share:
                fault = self._rates.fault(number, random)
                return fault if method in APPLIES_TO[type(fault)] else None
            point -= share
        return None
