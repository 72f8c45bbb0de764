"""Whether a recorded history keeps the laws, as far as events can show it.

The events of each instance are read in order into a book of what must be true after each; whatever cannot follow from
the book is a violation. It knows what the events mean and nothing of how the core came to them, so that stores, drivers
and doors are checked with it, after crashes too. What a policy would have answered is not judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from interlock.core.operations import BIT, CATALOGUE, Lane, Operation
from interlock.core.records import ENDS, SERVED, Event, Instance, Status
from interlock.core.states import NO_TASK, VmState

_BY_OWNER = frozenset({"cancelled", "interrupted"})
"""Why a request was cancelled that was not judged again."""
_AS_FORESEEN = frozenset({"request.succeeded", "request.cancelled", "instance.state"})
_OUTSTANDING = SERVED | {Status.QUEUED}
_CHANGES_NOTHING = frozenset({"request.denied", "request.redundant", "request.fenced"})
"""What is told under the generation of an earlier change, and is no part of it."""


class HistoryViolation(msgspec.Struct, frozen=True, kw_only=True):
    """A law that the history breaks, and the event that shows it."""

    law: int
    """Its number in `interlock.policies.laws`."""
    what: str
    instance_id: str
    request_id: str | None = None
    sequence: int | None = None
    """The event's place in the history; None for what shows only at the end."""


def check_history(
    events: Iterable[Event],
    final_instances: Iterable[Instance],
    *,
    acknowledged: Iterable[str] = (),
    settled: bool = False,
) -> list[HistoryViolation]:
    """Every violation of laws 1 to 5, 7 and 9 in the whole history of any number of instances, in the order found.

    `events` are all that were kept since the instances were created, by sequence. `acknowledged` are the ids of the
    requests that clients were told are admitted. With `settled`, everything was given the time to end, and what is
    still outstanding is stuck.
    """
    books: dict[str, _Book] = {}
    violations: list[HistoryViolation] = []
    last = 0
    for event in events:
        if event.sequence and event.sequence <= last:
            what = f"the sequence goes from {last} to {event.sequence}"
            violations.append(
                HistoryViolation(law=9, what=what, instance_id=event.instance_id, sequence=event.sequence)
            )
        last = max(last, event.sequence)
        books.setdefault(event.instance_id, _Book(event.instance_id, violations)).read(event)
    for instance in final_instances:
        books.setdefault(instance.id, _Book(instance.id, violations)).compare(instance, settled=settled)
    known = {request_id for book in books.values() for request_id in book.requests}
    violations.extend(
        HistoryViolation(law=9, what="an acknowledged request is not in the history", instance_id="", request_id=lost)
        for lost in acknowledged
        if lost not in known
    )
    return violations


class _Entry(msgspec.Struct):
    """What the book says of one request."""

    operation: Operation
    status: Status = Status.QUEUED
    phase: str | None = None
    fence: int = 0
    interrupted: bool = False
    promised: bool = True
    """False for one that ended while it was held: nothing was promised of it."""

    @property
    def lane(self) -> Lane:
        return CATALOGUE[self.operation].lane


class _Book:
    """What must be true of one instance after the events read so far."""

    def __init__(self, instance_id: str, violations: list[HistoryViolation]) -> None:
        self.instance_id = instance_id
        self.requests: dict[str, _Entry] = {}
        self._violations = violations
        self._vm_state: VmState | None = None
        self._fence = 0
        self._generation = 0
        self._change: list[Event] = []
        """The events of the change that is being read: those of one generation."""
        ends: dict[str, Callable[[Event], None]] = {f"request.{end.value}": self._ended for end in ENDS}
        self._read: dict[str, Callable[[Event], None]] = ends | {
            "request.admitted": self._admitted,
            "request.held": self._held,
            "request.denied": self._refused,
            "request.redundant": self._refused,
            "request.taken": self._taken,
            "request.progress": self._acted,
            "request.unknown": self._acted,
            "request.interrupting": self._interrupting,
            "instance.fenced": self._fenced,
            "instance.adopted": self._fenced,
            "instance.state": self._moved,
        }

    def read(self, event: Event) -> None:
        if event.generation < self._generation:
            self._found(4, f"the generation goes from {self._generation} to {event.generation}", event)
        if event.generation != self._generation:
            self._close_change()
        self._generation = max(event.generation, self._generation)
        if event.kind not in _CHANGES_NOTHING:
            self._change.append(event)
        reader = self._read.get(event.kind)
        if reader is not None:
            reader(event)

    def compare(self, instance: Instance, *, settled: bool) -> None:
        """Hold the book against the instance as it is at the end."""
        self._close_change()
        left = {identity for identity, entry in self.requests.items() if entry.status not in ENDS}
        outstanding = {request.id for request in (*instance.outstanding, *instance.held)}
        for lost in sorted(left - outstanding):
            self._found(3, f"{self.requests[lost].operation.value} has no end and is not outstanding", None, lost)
        for extra in sorted(outstanding - left):
            self._found(3, "a request is outstanding that was never admitted, or has ended", None, extra)
        if self._vm_state is not None and instance.vm_state is not self._vm_state:
            self._found(7, f"the instance is {instance.vm_state.value}, and its history ends in {self._vm_state.value}")
        if instance.fence < self._fence:
            self._found(4, f"the fence is {instance.fence}, and was {self._fence}")
        for request in instance.outstanding:
            if request.status in SERVED and request.fence != instance.fence:
                self._found(1, f"{request.operation.value} is served under an old fence", None, request.id)
            if settled:
                self._found(5, f"{request.operation.value} never came to an end", None, request.id)

    def _found(self, law: int, what: str, event: Event | None = None, request_id: str | None = None) -> None:
        self._violations.append(
            HistoryViolation(
                law=law,
                what=what,
                instance_id=self.instance_id,
                request_id=event.request_id if event is not None else request_id,
                sequence=None if event is None else event.sequence,
            )
        )

    # -------------------------------------------------------------------------------------------- asking

    def _admitted(self, event: Event) -> None:
        known = self.requests.get(event.request_id or "")
        if event.request_id is None or (known is not None and known.status is not Status.HELD):
            self._found(3, "a request is admitted twice, or without an id", event)
            return
        if not event.data.get("supersedes") and not event.data.get("cancels"):
            # Otherwise what it was judged on is changed already by the events of the same change.
            self._judged_on(event)
        self.requests[event.request_id] = _Entry(Operation(event.data["operation"]))

    def _held(self, event: Event) -> None:
        if event.request_id is None or event.request_id in self.requests:
            self._found(3, "a request is held twice, or without an id", event)
            return
        self._judged_on(event)
        self.requests[event.request_id] = _Entry(Operation(event.data["operation"]), status=Status.HELD)

    def _refused(self, event: Event) -> None:
        self._judged_on(event)

    def _judged_on(self, event: Event) -> None:
        """Law 7: what a submission was judged on is what the history says was true then."""
        view: dict[str, Any] = event.data.get("view") or {}
        if not view:
            return
        name, vm_state = event.data["operation"], VmState(view["vm_state"])
        if self._vm_state is None:
            self._vm_state = vm_state
        if vm_state is not self._vm_state:
            self._found(7, f"{name} was judged in {vm_state.value}, and the instance is {self._vm_state.value}", event)
        kinds = 0
        for entry in self.requests.values():
            kinds |= BIT[entry.operation] if entry.status in _OUTSTANDING else 0
        ghosts = _names(view["outstanding"] & ~kinds)
        if ghosts:
            self._found(7, f"{name} was judged with {ghosts} outstanding, which has ended", event)
        unseen = _names(kinds & ~view["outstanding"])
        if unseen:
            self._found(2, f"{name} was judged without {unseen}, which is outstanding", event)
        if view["task_state"] != self._task_state():
            self._found(7, f"{name} was judged in task {view['task_state']}, and it is {self._task_state()}", event)

    def _task_state(self) -> str:
        serving = (entry for entry in self.requests.values() if entry.status in SERVED and entry.lane is Lane.STATE)
        return next((entry.phase or NO_TASK for entry in serving), NO_TASK)

    # ------------------------------------------------------------------------------------------- serving

    def _taken(self, event: Event) -> None:
        entry = self._outstanding(event)
        if entry is None:
            return
        if entry.status is not Status.QUEUED:
            self._found(1, f"{entry.operation.value} is taken twice", event)
        for other in self.requests.values():
            if other is not entry and other.status in SERVED and other.lane is entry.lane:
                self._found(1, f"{entry.operation.value} is taken while {other.operation.value} is served", event)
        fence = int(event.data.get("fence", 0))
        if fence < self._fence:
            self._found(4, f"{entry.operation.value} is taken under fence {fence}, and it is {self._fence}", event)
        self._fence = max(fence, self._fence)
        entry.status, entry.phase, entry.fence = Status.IN_FLIGHT, event.data.get("phase"), fence

    def _acted(self, event: Event) -> None:
        """Progress, or an outcome that cannot be known: only of what is served."""
        entry = self._outstanding(event)
        if entry is None:
            return
        if entry.status not in SERVED:
            self._found(1, f"{entry.operation.value} is acted on and was not taken", event)
        elif entry.fence != self._fence:
            self._found(4, f"a worker acts under fence {entry.fence}, and it is {self._fence}", event)
        if event.kind == "request.progress":
            entry.phase = event.data.get("phase")
        else:
            entry.status = Status.UNKNOWN

    def _interrupting(self, event: Event) -> None:
        entry = self._outstanding(event)
        if entry is not None:
            entry.interrupted = True

    def _ended(self, event: Event) -> None:
        entry = self._outstanding(event)
        if entry is None:
            return
        status = Status(event.kind.removeprefix("request."))
        entry.promised = entry.status is not Status.HELD
        was_queued = entry.status in (Status.QUEUED, Status.HELD) and entry.lane is not Lane.RECORD
        if was_queued and status is not Status.CANCELLED:
            self._found(3, f"{entry.operation.value} ends as {status.value} and was not taken", event)
        entry.status = status

    def _outstanding(self, event: Event) -> _Entry | None:
        """The request that an event is about, which must be admitted and not ended (law 3)."""
        entry = self.requests.get(event.request_id or "")
        if entry is None:
            self._found(3, f"{event.kind} of a request that was never admitted", event)
            return None
        if entry.status in ENDS:
            self._found(3, f"{event.kind} of {entry.operation.value}, which has ended as {entry.status.value}", event)
            return None
        return entry

    # ------------------------------------------------------------------------------------- the instance

    def _fenced(self, event: Event) -> None:
        fence = int(event.data["fence"])
        if fence <= self._fence:
            self._found(4, f"the fence goes from {self._fence} to {fence}", event)
        self._fence = max(fence, self._fence)
        if event.kind == "instance.adopted":
            for entry in self.requests.values():
                if entry.status in SERVED:
                    entry.status, entry.fence = Status.UNKNOWN, fence

    def _moved(self, event: Event) -> None:
        before = VmState(event.data["before"])
        if self._vm_state not in (None, before):
            self._found(7, f"the instance leaves {before.value}, and is {self._vm_state}", event)
        self._vm_state = VmState(event.data["vm_state"])

    def _close_change(self) -> None:
        """Judge what shows only when all that happened in one change is known."""
        kinds = {event.kind for event in self._change}
        for event in self._change:
            entry = self.requests.get(event.request_id or "")
            if entry is None:
                continue
            name = entry.operation.value
            if event.kind == "request.superseded" and not entry.interrupted and "instance.fenced" not in kinds:
                self._found(4, f"{name} is superseded and its worker is not fenced", event)
            judged_again = event.kind == "request.cancelled" and event.data.get("reason") not in _BY_OWNER
            foreseen = "request.succeeded" in kinds and kinds <= _AS_FORESEEN and entry.lane is Lane.STATE
            if judged_again and foreseen and entry.promised:
                self._found(2, f"{name} is cancelled although what came before it succeeded", event)
        self._change = []


def _names(kinds: int) -> str:
    return ", ".join(operation.value for operation in Operation if BIT[operation] & kinds)
