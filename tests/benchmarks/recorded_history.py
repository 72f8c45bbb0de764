"""Databases with a recorded history, made in seconds: instances that are asked for things, and workers that do them.

Every decision is the core's own, and every row is written through the store's own statements; only the fleet, its
callers and its workers are made up, by a seed. What takes how long is an argument, so that whoever measures durations
knows what should come out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

import apsw
import msgspec

from interlock.core.admission import admit
from interlock.core.lifecycle import expire, finish, next_deadline_ms, progress, take
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Change, Event, Instance, Outcome, Request, Submission
from interlock.core.states import VmState
from interlock.stores import row_codec, statements
from interlock.stores.schema import upgrade
from interlock.stores.write_batch import Transaction

START_MS: Final = 1_790_000_000_000
"""When recorded histories begin, in ms since the Unix epoch."""
PROJECTS: Final = ("blue", "green", "red")

Durations = Callable[[Request, Random], int]
"""How long each phase of a request takes, in ms."""

_O = Operation
_ASKED_FOR: Final = (
    (_O.START, 20),
    (_O.STOP, 20),
    (_O.REBOOT, 25),
    (_O.PAUSE, 6),
    (_O.UNPAUSE, 6),
    (_O.SNAPSHOT, 8),
    (_O.REBUILD, 3),
    (_O.SUSPEND, 3),
    (_O.RESUME, 3),
    (_O.ATTACH_VOLUME, 4),
    (_O.DETACH_VOLUME, 3),
    (_O.LOCK, 1),
    (_O.UNLOCK, 5),
)
"""What callers ask for, and how often each."""
_TYPICAL_MS: Final[Mapping[Operation, int]] = {
    _O.SNAPSHOT: 20_000,
    _O.REBUILD: 12_000,
    _O.SUSPEND: 8_000,
    _O.PAUSE: 300,
}


def typical(request: Request, chance: Random) -> int:
    """Durations as they are found in the field: some seconds, with a long tail."""
    return max(1, round(_TYPICAL_MS.get(request.operation, 3_000) * chance.lognormvariate(0, 0.6)))


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a recorded history is to hold."""

    submissions: int
    """At least so many of them."""
    instances: int = 200
    seed: int = 1
    durations: Durations = typical
    between_ms: int = 60_000
    """How long it is between two submissions for one instance, on average."""
    hangs: float = 0.002
    """The share of requests whose worker is lost once it has begun."""
    fails: float = 0.01
    asked_for: tuple[tuple[Operation, int], ...] = _ASKED_FOR
    repeat: int = 1
    """How often the whole is written, each time for instances of its own and after the time before. Repeats hold
    instances and events only: they make a large history quickly."""


class _Machine:
    """One instance, its callers and its workers, until the plan is fulfilled."""

    def __init__(self, number: int, plan: Plan, policy: CompiledPolicy) -> None:
        self.number = number
        self._plan = plan
        self._policy = policy
        self._chance = Random(plan.seed * 1_000_003 + number)
        self.instance = Instance(
            id=f"instance-{number}",
            name=f"vm-{number}",
            project=PROJECTS[number % len(PROJECTS)],
            host="recorded",
            vm_state=VmState.ACTIVE,
            launched_at_ms=START_MS,
            created_at_ms=START_MS,
            updated_at_ms=START_MS,
        )
        self.requests: dict[str, Request] = {}
        self.events: list[Event] = []
        self._due: list[tuple[int, int, Callable[[int], None]]] = []
        self._count = 0
        self._asked = 0

    def run(self, submissions: int) -> None:
        self._later(START_MS + self._pause_ms(), self._submit)
        while self._asked < submissions and self._due:
            at_ms, _, act = heapq.heappop(self._due)
            deadline_ms = next_deadline_ms(self.instance)
            if deadline_ms is not None and deadline_ms <= at_ms:
                self._keep(expire(self.instance, self._policy, deadline_ms))
                self._serve(deadline_ms)
            act(at_ms)
            self._serve(at_ms)

    def _later(self, at_ms: int, act: Callable[[int], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (at_ms, self._count, act))

    def _pause_ms(self) -> int:
        return 1 + round(self._chance.expovariate(1 / self._plan.between_ms))

    def _keep(self, change: Change[Any]) -> Any:
        self.instance = change.instance
        self.requests.update((request.id, request) for request in change.requests)
        self.events += change.events
        return change.answer

    def _submit(self, now_ms: int) -> None:
        self._asked += 1
        operations, weights = zip(*self._plan.asked_for, strict=True)
        operation = self._chance.choices(operations, weights)[0]
        hard = operation in {_O.REBOOT, _O.STOP} and self._chance.random() < 0.1
        submission = Submission(
            request_id=f"request-{self.number}-{self._asked}",
            operation=operation,
            parameters={"hard": True} if hard else {},
            requested_by="somebody",
        )
        self._keep(admit(self.instance, submission, self._policy, now_ms))
        self._later(now_ms + self._pause_ms(), self._submit)

    def _serve(self, now_ms: int) -> None:
        while (taken := self._keep(take(self.instance, None, now_ms))) is not None:
            if self._chance.random() < self._plan.hangs:
                continue
            entry = CATALOGUE[taken.operation]
            phases = entry.hard_phases if taken.hard and entry.hard_phases else entry.phases
            at_ms = now_ms
            for phase in phases[1:]:
                at_ms += self._plan.durations(taken, self._chance)
                self._later(at_ms, self._worker(taken, phase))
            at_ms += self._plan.durations(taken, self._chance)
            self._later(at_ms, self._worker(taken, None))

    def _worker(self, taken: Request, phase: str | None) -> Callable[[int], None]:
        """What a worker reports at some later moment: a new phase, or None for its end."""

        def report(now_ms: int) -> None:
            if phase is not None:
                self._keep(progress(self.instance, taken.id, taken.fence, now_ms, phase=phase))
                return
            failed = self._chance.random() < self._plan.fails
            outcome = Outcome.FAILED if failed else Outcome.SUCCEEDED
            self._keep(finish(self.instance, taken.id, taken.fence, outcome, self._policy, now_ms))

        return report


def record_history(path: Path, policy: CompiledPolicy, plan: Plan) -> int:
    """Make a database at `path` and record in it what `plan` says; how many submissions that are."""
    upgrade(path)
    machines = [_Machine(number, plan, policy) for number in range(1, plan.instances + 1)]
    share = -(-plan.submissions // plan.repeat // plan.instances)
    for machine in machines:
        machine.run(share)
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "off")
        with Transaction(connection):
            _write(connection, machines)
            _repeat(connection, plan)
    finally:
        connection.close()
    return share * plan.instances * plan.repeat


def _write(connection: apsw.Connection, machines: list[_Machine]) -> None:
    last_requests: dict[int, int] = {}
    statements.NEW_INSTANCE.run(
        connection,
        [value for machine in machines for value in _instance_row(machine, last_requests)],
    )
    numbered = enumerate(((machine, one) for machine in machines for one in machine.requests.values()), 1)
    statements.NEW_REQUEST.run(
        connection,
        [value for seq, (machine, one) in numbered for value in _request_row(seq, machine, one, last_requests)],
    )
    connection.executemany(
        "UPDATE instances SET last_request = ? WHERE seq = ?", [(seq, number) for number, seq in last_requests.items()]
    )
    ordered = heapq.merge(*(_recorded(machine) for machine in machines), key=lambda recorded: recorded[0].at_ms)
    for piece in _pieces(ordered):
        statements.EVENT.run(connection, piece)
    connection.execute(statements.SEEN, (max(machine.instance.updated_at_ms for machine in machines),))


def _instance_row(machine: _Machine, last_requests: dict[int, int]) -> tuple[Any, ...]:
    one = machine.instance
    always = (machine.number, one.generation, one.fence, one.updated_at_ms, last_requests.get(machine.number))
    return (*always, row_codec.body(one), one.id, one.project, *row_codec.filed(one))


def _request_row(seq: int, machine: _Machine, one: Request, last_requests: dict[int, int]) -> tuple[Any, ...]:
    previous = last_requests.get(machine.number)
    last_requests[machine.number] = seq
    searched = (one.operation.value, one.status.value, one.admitted_at_ms)
    return (seq, one.id, machine.number, previous, *searched, row_codec.body(one))


def _recorded(machine: _Machine) -> Iterator[tuple[Event, _Machine]]:
    return ((event, machine) for event in machine.events)


def _pieces(ordered: Iterator[tuple[Event, _Machine]], size: int = 20_000) -> Iterator[list[Any]]:
    """The values of the events' rows, in the order in which they happened, some thousands of rows at a time."""
    piece: list[Any] = []
    for sequence, (event, machine) in enumerate(ordered, 1):
        piece += (sequence, machine.number, machine.instance.project, event.request_id)
        piece += (event.kind, event.at_ms, event.generation, row_codec.body(event.data))
        if sequence % size == 0:
            yield piece
            piece = []
    yield piece


_REPEAT: Final = (
    """
    INSERT INTO instances (seq, id, project, name, vm_state, host, task_state, unsettled, generation, fence,
                           updated_at_ms, body)
    SELECT seq + :place * :instances, id || '-' || :place, project, name || '-' || :place, vm_state, host, task_state,
           unsettled, generation, fence, updated_at_ms + :place * :lasts_ms, body
    FROM instances WHERE seq <= :instances
    """,
    """
    INSERT INTO events (sequence, instance_seq, project, request_id, kind, at_ms, generation, data)
    SELECT sequence + :place * :events, instance_seq + :place * :instances, project, request_id || '-' || :place,
           kind, at_ms + :place * :lasts_ms, generation, data
    FROM events WHERE sequence <= :events
    """,
)


def _repeat(connection: apsw.Connection, plan: Plan) -> None:
    row = connection.execute("SELECT max(sequence), max(at_ms) - min(at_ms) + 1 FROM events").fetchone()
    events, lasts_ms = row if row is not None else (0, 0)
    for place in range(1, plan.repeat):
        values = {"place": place, "instances": plan.instances, "events": events, "lasts_ms": lasts_ms}
        for statement in _REPEAT:
            connection.execute(statement, values)
