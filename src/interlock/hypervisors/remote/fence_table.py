"""The highest fence that a host has seen of each instance, also before it restarted: smaller ones are rejected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import structlog

from interlock.core.errors import Fenced
from interlock.images.atomic_files import drafted

_LOG = structlog.get_logger(__name__)


class FenceTable:
    """The highest fence seen of each instance, kept in a folder of small files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._highest: dict[str, int] = {}

    def open(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in self._folder.iterdir():
            with contextlib.suppress(ValueError):
                self._highest[file.name] = int(file.read_text())

    def see(self, instance_id: str, fence: int) -> None:
        """Record a fence; from now on smaller ones are rejected."""
        if fence <= self._highest.get(instance_id, -1):
            return
        self._highest[instance_id] = fence
        try:
            with drafted(self._folder / instance_id) as draft:
                draft.write_text(str(fence))
        except OSError as error:
            # A full disk must not keep guests from being stopped or deleted. The server sends fences again.
            _LOG.warning("fence not persisted", instance=instance_id, why=error.strerror)

    def highest(self, instance_id: str) -> int:
        return self._highest.get(instance_id, -1)

    def forget(self, instance_id: str) -> None:
        """Delete its file, for an instance of which nothing exists here any more."""
        (self._folder / instance_id).unlink(missing_ok=True)


class HeldPermit:
    """A worker's right to act, as the host sees it. Implements `ports.Permit`.

    Args:
        fences: of this host.
        instance_id: on which it may act.
        fence: under which it acts.
        may_hold: raises if the host may not run guests now.
    """

    def __init__(self, fences: FenceTable, instance_id: str, fence: int, may_hold: Callable[[], None]) -> None:
        self._fences = fences
        self._instance_id = instance_id
        self.fence = fence
        self._may_hold = may_hold
        self._revoked = False

    def revoke(self) -> None:
        """Revoke it: its holder no longer waits."""
        self._revoked = True

    def check(self) -> None:
        """Raise `Fenced`, or `NotResponding` if the host may not run guests."""
        highest = self._fences.highest(self._instance_id)
        if self._revoked or highest > self.fence:
            raise Fenced(
                f"A worker of the instance {self._instance_id} was fenced: it holds {self.fence}, "
                f"and the host has seen {highest}."
            )
        self._may_hold()
