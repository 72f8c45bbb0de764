"""Restart and evacuation settings of an instance, and the count of its automatic restarts.

Values only: `restarts` applies them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from interlock.core.errors import Invalid

BACKOFF_S_MAX: Final = 60
"""The longest restart delay, in seconds."""


class Evacuate(StrEnum):
    """Whether an instance is evacuated automatically once its host is fenced."""

    NEVER = "never"
    """Only on request."""
    AUTO = "auto"
    """If its root disk is not lost: it is in a shared folder, or there is none."""
    FROM_IMAGE = "from-image"
    """Also if its root disk is lost with the host: it is then created from its image again."""


class OnCrash(StrEnum):
    """The action after a guest panicked or its QEMU process ended."""

    LEAVE = "leave"
    """Stay in error, for its owner to inspect."""
    RESTART = "restart"
    STOP = "stop"
    """Power it off, so that it frees the host's memory."""


class OnPowerOff(StrEnum):
    """The action after a guest powered itself off."""

    LEAVE = "leave"
    RESTART = "restart"


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done when a guest ends on its own. A requested stop is never undone."""

    on_crash: OnCrash = OnCrash.LEAVE
    on_power_off: OnPowerOff = OnPowerOff.LEAVE
    restarts_max: Annotated[int, Meta(ge=1, le=1000)] = 5
    """The number of restarts within `window_s`, after which it is left as it is."""
    window_s: Annotated[int, Meta(ge=1, le=604_800)] = 600
    """In seconds, from the first end of the guest; an end after it starts a new count."""
    backoff_s: Annotated[int, Meta(ge=1, le=BACKOFF_S_MAX)] = 1
    """The delay of the first restart, in seconds; doubled for each further one, up to a minute."""

    def pause_s(self, count: int) -> int:
        """Return the delay of a restart that follows `count` others, in seconds."""
        return min(BACKOFF_S_MAX, self.backoff_s << min(count, BACKOFF_S_MAX))

    @property
    def pauses_s(self) -> int:
        """Return the sum of all restart delays, in seconds."""
        return sum(map(self.pause_s, range(self.restarts_max)))


def check_limit(policy: RestartPolicy | None) -> None:
    """Raise `Invalid` if the restart delays take longer than the window, so that the limit is never reached."""
    if policy is not None and policy.window_s <= policy.pauses_s:
        raise Invalid(
            f"Invalid restart.window_s {policy.window_s}: restarts_max would never be reached, because the delays "
            f"before {policy.restarts_max} restarts take {policy.pauses_s} s together.",
            remedy=f"Set window_s to more than {policy.pauses_s} plus the time that the guest runs in between.",
        )


class Restarts(msgspec.Struct, frozen=True, kw_only=True):
    """Recent automatic restarts of a guest, and the next one."""

    count: int = 0
    """The number of restarts since `window_since_ms`."""
    window_since_ms: int = 0
    """When the guest first ended in this window."""
    due_at_ms: int | None = None
    """When it is restarted or stopped next; None if it is not."""
    asked_down: bool = False
    """Whether a requested stop did not complete: an end of the guest is then attributed to it."""

    def at_end(self, policy: RestartPolicy, now_ms: int) -> Restarts:
        """Return the count for a guest that ends now: a new one if the window has passed."""
        over = not self.window_since_ms or now_ms - self.window_since_ms >= policy.window_s * 1000
        return Restarts(window_since_ms=now_ms) if over else msgspec.structs.replace(self, due_at_ms=None)

    def put_off_ms(self, policy: RestartPolicy) -> int:
        """Return the delay of the next restart, in milliseconds."""
        return policy.pause_s(self.count) * 1000
