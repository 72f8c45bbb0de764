"""The lease of an agent's session, which may be renewed in one thread and is ended in another."""

from __future__ import annotations

import threading
import time
from typing import Final

import msgspec

from interlock.hypervisors.remote.protocol import LeaseGranted, Renew, decode, encode

_RENEWAL_BYTES_MAX: Final = 256
"""No renewal is longer; longer messages need not be decoded to see that they are none."""


class SessionLease:
    """Whether the renewals of an agent are granted, and when the last one was.

    Every method may be called from any thread. A renewal and the end of the lease exclude each other: who ends it
    learns of every renewal that was granted before, and none is granted afterwards.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._renewed_s = 0.0

    @property
    def renewed_s(self) -> float:
        """When the last renewal was granted, in seconds of the monotonic clock; 0: never."""
        with self._lock:
            return self._renewed_s

    def renew(self, now_s: float) -> bool:
        """Grant a renewal, unless the lease has ended."""
        with self._lock:
            if not self._ended:
                self._renewed_s = max(self._renewed_s, now_s)
            return not self._ended

    def end(self, unless_after_s: float | None = None) -> bool:
        """Grant no more renewals, unless there was one after that time, or always for None. Return whether it ended."""
        with self._lock:
            if unless_after_s is None or self._renewed_s <= unless_after_s:
                self._ended = True
            return self._ended

    def resume(self) -> None:
        """Grant renewals again: what the lease was ended for was not recorded."""
        with self._lock:
            self._ended = False

    def reply(self, frame: bytes) -> bytes | None:
        """Return the grant for a renewal; None if the message is none, or the lease has ended."""
        if len(frame) > _RENEWAL_BYTES_MAX:
            return None
        try:
            message = decode(frame)
        except msgspec.DecodeError:
            return None  # reported by who receives it next
        if isinstance(message, Renew) and self.renew(time.monotonic()):
            return encode(LeaseGranted(number=message.number))
        return None
