"""What its owner wants done about a guest that ends by itself, and the count of what was done.

Values only: when they apply to an instance is decided in `restarting`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from interlock.core.errors import Invalid

BACKOFF_S_MAX: Final = 60
"""The longest that a restart is put off, in seconds."""


class OnCrash(StrEnum):
    """What becomes of a guest that panicked, or whose process ended."""

    LEAVE = "leave"
    """It stays in error, for its owner to look at."""
    RESTART = "restart"
    STOP = "stop"
    """It is powered off, so that it holds no memory of the host."""


class OnPowerOff(StrEnum):
    """What becomes of a guest that powered itself off."""

    LEAVE = "leave"
    RESTART = "restart"


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done about a guest that ends by itself. What somebody asked for is never undone by it."""

    on_crash: OnCrash = OnCrash.LEAVE
    on_power_off: OnPowerOff = OnPowerOff.LEAVE
    restarts_max: Annotated[int, Meta(ge=1, le=1000)] = 5
    """How often it is restarted within `window_s`; then it is left as it is."""
    window_s: Annotated[int, Meta(ge=1, le=604_800)] = 600
    """Counted from the first end of the guest, in seconds; an end after it begins another count."""
    backoff_s: Annotated[int, Meta(ge=1, le=BACKOFF_S_MAX)] = 1
    """How long the first restart is put off, in seconds; doubled for each further one, up to a minute."""

    def pause_s(self, count: int) -> int:
        """For how long a restart is put off that comes after `count` others, in seconds."""
        return min(BACKOFF_S_MAX, self.backoff_s << min(count, BACKOFF_S_MAX))

    @property
    def pauses_s(self) -> int:
        """For how long all restarts together are put off, in seconds."""
        return sum(map(self.pause_s, range(self.restarts_max)))


def check_limit(policy: RestartPolicy | None) -> None:
    """Raise `Invalid` if the policy's window is over before its limit can be reached, so that nothing is limited."""
    if policy is not None and policy.window_s <= policy.pauses_s:
        raise Invalid(
            f"restart: window_s is {policy.window_s}, and restarts_max would never be reached: the pauses before "
            f"{policy.restarts_max} restarts take {policy.pauses_s} s together.",
            remedy=f"Let window_s be more than {policy.pauses_s}, with room for what the guest does in between.",
        )


class Restarts(msgspec.Struct, frozen=True, kw_only=True):
    """What was done lately about a guest that ends by itself, and what is due."""

    count: int = 0
    """How often it was restarted since `window_since_ms`."""
    window_since_ms: int = 0
    """When the guest first ended, of those ends that are counted together."""
    due_at_ms: int | None = None
    """When it is restarted or stopped next; None if it is not."""
    asked_down: bool = False
    """Whether somebody asked for it to be taken down and that came to no end: an end of the guest is their doing."""

    def at_end(self, policy: RestartPolicy, now_ms: int) -> Restarts:
        """The count as it stands when the guest ends now: afresh if the window has passed."""
        over = not self.window_since_ms or now_ms - self.window_since_ms >= policy.window_s * 1000
        return Restarts(window_since_ms=now_ms) if over else msgspec.structs.replace(self, due_at_ms=None)

    def put_off_ms(self, policy: RestartPolicy) -> int:
        """For how long the next restart is put off, in milliseconds."""
        return policy.pause_s(self.count) * 1000
