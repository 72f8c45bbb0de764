"""What a walk found, as records: how much it saw, which laws do not hold, and where only a deletion helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from interlock.core.operations import Operation
from interlock.core.states import VmState


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """A law that does not hold, and the shortest story that shows it."""

    law: int
    what: str
    story: tuple[str, ...]
    """Events of `interlock rehearse`, one JSON object a line; the last one breaks the law, or leads to where it
    does not hold."""


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """What is possible in one vm_state and task_state if the worker there never reports again."""

    vm_state: VmState
    task_state: str
    takeovers: tuple[Operation, ...]
    """What ends the task: by taking over, or by preempting it. Deletions and `reset_state` are left out."""
    queued: tuple[Operation, ...]
    """What is admitted, and then waits behind the task for ever."""


class Exploration(msgspec.Struct, frozen=True, kw_only=True):
    """What a walk found."""

    states: int
    transitions: int
    """How many steps were followed to a state, known or new."""
    complete: bool
    """False if the walk ended at its bound of states or time; what lies behind was then not looked at."""
    operations: tuple[Operation, ...]
    """Those that were submitted, one for each group that nothing tells apart."""
    outstanding_max: int
    violations: tuple[Violation, ...]
    """The first story of each way in which a law was broken, shortest first."""
    undecided: tuple[str, ...] = ()
    """What may be broken, in states of which no story was found: the walk is then not complete."""
    seconds: float = 0.0
    """How long the walk took, with the search for a way out of every state."""
    depth: int = 0
    """How many steps the farthest state is from the start."""
    exits: tuple[Exit, ...] = ()
    """For every vm_state and task_state that was reached while a state change was being served that does not lead to
    the goal."""
    compared: int = 0
    """How many states were walked with the core's own objects too, to check the laws about its records."""


class Advance(msgspec.Struct, frozen=True, kw_only=True):
    """How far a walk has come."""

    states: int
    waiting: int
    """How many of them are not looked at yet."""
    depth: int
    seconds: float


OnAdvance: TypeAlias = Callable[[Advance], None]
