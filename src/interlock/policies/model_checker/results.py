"""Result records of the model checker: states explored, counterexamples, and exits of each task."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

import msgspec

from interlock.core.operations import Lane, Operation
from interlock.core.records import Instance
from interlock.core.roles import Role
from interlock.core.states import VmState

_STATES_NAMED: Final = 5
"""How many states a sentence names."""


class Breach(msgspec.Struct, frozen=True):
    """A law that a step violated, and how. `what` names no ids, so that the same mistake always has the same text."""

    law: int
    what: str


CANDIDATES_MAX: Final = 8
"""How many states are kept for one breach: the first that can be replayed becomes the counterexample."""


class Candidate(NamedTuple):
    """A state in which a law is violated, and the action that violates it, if one does."""

    state: int
    action: int | None


class Breaches:
    """Each distinct breach, with the first states that show it."""

    def __init__(self) -> None:
        self.found: dict[Breach, list[Candidate]] = {}

    def add(self, breach: Breach, state: int, action: int | None = None) -> None:
        known = self.found.setdefault(breach, [])
        if len(known) < CANDIDATES_MAX:
            known.append(Candidate(state, action))


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """A violated law, with the shortest counterexample found."""

    law: int
    what: str
    story: tuple[str, ...]
    """The counterexample: events of `interlock rehearse`, one JSON object each. The last violates the law, or leads to
    the state that does."""


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """What is admitted in one vm_state and task_state if its worker never reports again."""

    vm_state: VmState
    task_state: str
    takeovers: tuple[Operation, ...]
    """Operations that take over or preempt the task, without deletions and `reset_state`."""
    queued: tuple[Operation, ...]
    """Operations that are admitted and then wait behind the task for ever."""


class OutOfTime(Exception):
    """The time limit of an exploration has passed."""


def check_time(until_s: float) -> None:
    """Raise `OutOfTime` if the monotonic clock has reached a time."""
    if time.monotonic() >= until_s:
        raise OutOfTime


class RolePromise(msgspec.Struct, frozen=True, kw_only=True):
    """The second promise of law 5: callers of one role can always reach the goal. It may be broken on purpose."""

    role: Role
    cannot: tuple[str, ...] = ()
    """The states from which they cannot although callers of another role can, as text."""

    @property
    def sentence(self) -> str:
        """Say what callers with the role alone can do; `cannot` has all states."""
        if not self.cannot:
            return f"Callers with the role {self.role} can always delete, soft or not."
        more = f", and {len(self.cannot) - _STATES_NAMED} more" if len(self.cannot) > _STATES_NAMED else ""
        states = "; ".join(self.cannot[:_STATES_NAMED])
        return f"Callers with the role {self.role} alone cannot always delete, others can: {states}{more}."


class Exploration(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one exploration."""

    states: int
    transitions: int
    """Transitions followed, to known states and new ones."""
    complete: bool
    """False if the search ended at its bound of states or time."""
    operations: tuple[Operation, ...]
    """The operations submitted, one for each symmetry class."""
    outstanding_max: int
    violations: tuple[Violation, ...]
    """One for each kind of violation, shortest counterexample first."""
    undecided: tuple[str, ...] = ()
    """Possible violations in states for which no counterexample was found; `complete` is then false."""
    seconds: float = 0.0
    """Duration of the search and the liveness check."""
    depth: int = 0
    """Steps from an initial state to the farthest state."""
    assumptions: tuple[str, ...] = ()
    """What the search held fixed, one sentence each."""
    until_silence: tuple[str, ...] = ()
    """The states in which a deletion is refused as long as a worker makes progress, be it for ever, as text: only its
    silence or `reset_state` leads on."""
    weaker: RolePromise | None = None
    """What callers of one role alone can do; None if it was not determined."""
    exits: tuple[Exit, ...] = ()
    """For every reached vm_state and task_state of a state change that does not lead to the goal."""


class SearchProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a search."""

    states: int
    waiting: int
    """States found and not expanded yet."""
    depth: int
    seconds: float


OnProgress: TypeAlias = Callable[[SearchProgress], None]


def describe(instance: Instance) -> str:
    """Describe the state of an instance: its vm_state and the requests in service."""
    serving = (instance.served(Lane.STATE), instance.served(Lane.COMPONENT))
    served = [request.operation.value for request in serving if request is not None]
    return instance.vm_state.value + (f" while {' and '.join(served)} is served" if served else "")
