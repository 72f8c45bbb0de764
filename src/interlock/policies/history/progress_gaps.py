"""Progress gaps and durations of recorded operations, as `after` rules measure them.

A watch is what one rule measures of one operation in flight. Only requests that succeeded are measured; the others are
counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final

import msgspec

from interlock.core.operations import CATALOGUE, TASK_OPERATION, TASK_STATES, Lane, Operation
from interlock.core.policy import MeasuredFrom, Rule, Verdict
from interlock.core.states import NO_TASK

ServiceRow = tuple[str | None, str, int, str]
"""An event of a request in service: request id, event kind, time in ms, and data as JSON."""

_COMPONENTS: Final = frozenset(entry.operation for entry in CATALOGUE.values() if entry.lane is Lane.COMPONENT)
_ENDS: Final = {
    "request.failed": "failed",
    "request.cancelled": "cancelled",
    "request.superseded": "superseded",
}


class Watch(msgspec.Struct, frozen=True, order=True):
    """One operation in flight, in the phases in which a rule may take over from it."""

    operation: Operation
    phases: tuple[str, ...]
    """In the order of the catalogue."""
    measured_from: MeasuredFrom

    @property
    def whole(self) -> bool:
        """Whether it covers every phase of the operation."""
        entry = CATALOGUE[self.operation]
        return set(self.phases) == {*entry.phases, *entry.hard_phases}


def watches_of(rule: Rule) -> tuple[Watch, ...]:
    """Return the operations that an `after` rule takes over from, in the order of the catalogue."""
    if rule.verdict is not Verdict.AFTER:
        return ()
    found = dict[Operation, list[str]]()
    for phase in TASK_STATES:
        if rule.task_states is None or phase in rule.task_states:
            found.setdefault(TASK_OPERATION[phase], []).append(phase)
    if rule.task_states is None or NO_TASK in rule.task_states:
        # Without a state change in flight, the component change in flight is measured.
        named = _COMPONENTS & rule.outstanding if rule.outstanding else _COMPONENTS
        for operation in named or _COMPONENTS:
            found[operation] = list(CATALOGUE[operation].phases)
    return tuple(
        Watch(operation, tuple(found[operation]), rule.measured_from) for operation in Operation if operation in found
    )


class Measures:
    """Measurements of one watch: milliseconds of every request that succeeded, and counts of the others."""

    def __init__(self) -> None:
        self.values_ms = array("q")
        self.failed = 0
        self.cancelled = 0
        self.superseded = 0
        """Taken over or preempted, so that their outcome is unknown."""
        self.adopted = 0
        """Succeeded across a restart of the server, so that their duration is meaningless."""


class _EventData(msgspec.Struct, gc=False):
    operation: str = ""
    phase: str | None = None
    requests: tuple[str, ...] = ()


_decode: Final = msgspec.json.Decoder(_EventData).decode


class _Served:
    """A request in service, with its phase times."""

    __slots__ = ("adopted", "left_ms", "operation", "phase", "seen_ms", "silences_ms", "taken_ms")

    def __init__(self, operation: str, phase: str, at_ms: int) -> None:
        self.operation = operation
        self.phase = phase
        self.taken_ms = self.seen_ms = at_ms
        self.silences_ms: dict[str, int] = {}
        """The longest silence in each phase."""
        self.left_ms: dict[str, int] = {}
        """Time from take to the last progress in each phase."""
        self.adopted = False

    def alive(self, at_ms: int, phase: str | None) -> None:
        """Record a sign of life, which may start a phase."""
        silence_ms = at_ms - self.seen_ms
        if silence_ms >= self.silences_ms.get(self.phase, 0):
            self.silences_ms[self.phase] = silence_ms
        self.left_ms[self.phase] = at_ms - self.taken_ms
        self.seen_ms = at_ms
        if phase is not None:
            self.phase = phase


def measure(rows: Iterable[ServiceRow], watches: Iterable[Watch]) -> dict[Watch, Measures]:
    """Measure each watch from recorded events in order.

    Unchanged progress leaves no event, so that a measured silence is an upper bound of the true one.
    """
    measures = {watch: Measures() for watch in watches}
    by_operation: dict[str, list[tuple[Watch, Measures]]] = {}
    for watch, found in measures.items():
        by_operation.setdefault(watch.operation.value, []).append((watch, found))
    served: dict[str, _Served] = {}
    for request_id, kind, at_ms, data in rows:
        if kind == "instance.adopted":
            _adopt(served, at_ms, data)
        elif request_id is None:
            continue
        elif kind == "request.taken":
            taken = _decoded(data)
            if taken.operation in by_operation:
                served[request_id] = _Served(taken.operation, taken.phase or "", at_ms)
        elif (request := served.get(request_id)) is not None:
            if kind == "request.progress":
                request.alive(at_ms, _decoded(data).phase)
            else:
                del served[request_id]
                _end(request, kind, at_ms, by_operation[request.operation])
    return measures


def _adopt(served: dict[str, _Served], at_ms: int, data: str) -> None:
    """Restart the ages of adopted requests, as the gate does after a restart of the server."""
    for request_id in _decoded(data).requests:
        request = served.get(request_id)
        if request is not None:
            request.adopted = True
            request.seen_ms = at_ms


def _end(request: _Served, kind: str, at_ms: int, watches: list[tuple[Watch, Measures]]) -> None:
    request.alive(at_ms, None)
    for watch, found in watches:
        phases = [phase for phase in watch.phases if phase in request.silences_ms]
        if not phases:
            continue
        if kind in _ENDS:
            counter = _ENDS[kind]
            setattr(found, counter, getattr(found, counter) + 1)
        elif watch.measured_from is MeasuredFrom.LAST_PROGRESS:
            found.values_ms.append(max(request.silences_ms[phase] for phase in phases))
        elif request.adopted:
            found.adopted += 1
        else:
            found.values_ms.append(max(request.left_ms[phase] for phase in phases))


def _decoded(data: str) -> _EventData:
    try:
        return _decode(data)
    except msgspec.DecodeError:
        return _EventData()
