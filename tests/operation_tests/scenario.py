"""What a proof of one operation is: how to come to where it can be asked for, and how to see what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from interlock.core.operations import CATALOGUE, Operation
from operation_tests.stage import Stage

VM: Final = "vm"
SECOND: Final = "second"
"""What is made from a copy of `VM`."""
WRITTEN: Final = "written before"


class Before(msgspec.Struct, frozen=True, kw_only=True):
    """What was true just before the operation was asked for."""

    status: dict[str, Any] | None
    """What the guest said of itself, if it answered."""
    instance: dict[str, Any]
    console: int
    """How much was on its console."""
    process: int | None

    def goes_on(self, now: dict[str, Any]) -> None:
        """Hold that it is the same guest that never stopped counting. Raises AssertionError."""
        assert self.status is not None
        assert now["boot_id"] == self.status["boot_id"], "it was booted anew"
        assert now["counter"] >= self.status["counter"], "its memory was set back"

    def booted_anew(self, now: dict[str, Any]) -> None:
        """Hold that it is another boot. Raises AssertionError."""
        assert self.status is None or now["boot_id"] != self.status["boot_id"], "it was never booted anew"


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One operation, and its proof."""

    operation: Operation
    proof: str
    """What proves it, as a sentence for people."""
    prepare: Callable[[Stage], None]
    """Makes the instance `VM` and brings it to where the operation can be asked for."""
    verify: Callable[[Stage, Before], None]
    """Raises AssertionError unless the operation did what it says."""
    parameters: dict[str, Any] = {}
    chosen: Callable[[Stage], dict[str, Any]] | None = None
    """The parameters, where they are known only once it is prepared."""
    answers: bool = True
    """Whether the guest answers just before it."""
    forgotten: bool = False
    """Whether what was asked for is in memory only, so that the next server fails it and leaves the guest alone."""
    exists: bool = True
    """Whether there is an instance before it; all but its creation need one."""

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that it goes through."""
        entry = CATALOGUE[self.operation]
        return entry.hard_phases if self.parameters.get("hard") else entry.phases

    def before(self, stage: Stage) -> Before:
        """Look at what is true now."""
        if not self.exists:
            return Before(status=None, instance={}, console=0, process=None)
        return Before(
            status=stage.status(VM) if self.answers else None,
            instance=stage.instance(VM),
            console=len(stage.console(VM)),
            process=stage.process(VM),
        )
