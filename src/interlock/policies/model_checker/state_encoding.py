"""Encoding of core instances as 63-bit words, and decoding of words to representative instances.

From the lowest bit: the queue in the order of service, its head lowest, then the fields of the instance and of the
requests in service. A field with only one possible value takes no bits.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from interlock.core.errors import Invalid
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.records import SERVED, Instance, Request, Status
from interlock.core.request_queue import in_service_order
from interlock.core.roles import Role
from interlock.core.views import at_present
from interlock.policies.model_checker.actions import PACKED_ID, Ages, Alphabet, RequestKind, request_of

NOW_MS: Final = 1_000_000_000_000
"""The current time of decoded instances; far enough from zero for any age."""

replace = msgspec.structs.replace


class Moment(NamedTuple):
    """Ages of the request in service."""

    silent_ms: int
    running_ms: int


class StateEncoding:
    """Encodes and decodes the states of one search."""

    def __init__(self, alphabet: Alphabet, layout: Layout) -> None:
        self._alphabet = alphabet
        self._layout = layout
        self._submitted = {(submission.operation, submission.hard) for submission in alphabet.submissions}

    # --------------------------------------------------------------------------------------------------------- packing

    def pack(self, instance: Instance, now_ms: int, *, host_reachable: bool = True) -> int:
        """Return the word of an instance at `now_ms`."""
        layout, alphabet = self._layout, self._alphabet
        base = alphabet.base_number[alphabet.canonical(at_present(instance, host_reachable=host_reachable))]
        idle = bisect_right(alphabet.idle_ages, now_ms - instance.updated_at_ms)
        level = alphabet.lock_level(instance.lock_role) if instance.locked_by is not None else 0
        locked = level if layout.locked.bits else 0
        held = self._held(instance) << layout.held.shift
        word = base << layout.base.shift | idle << layout.idle.shift | locked << layout.locked.shift
        word |= held
        at = layout.queue.shift
        for request in in_service_order(instance):
            if request.status not in SERVED:
                word |= self._kind(request) << at
                at += layout.kind_bits
            elif request.lane is Lane.COMPONENT:
                word |= self._component(request, now_ms)
            else:
                word |= self._task(request, now_ms)
        return word

    def _held(self, instance: Instance) -> int:
        """Return the number of the held request; 0 for none, or one that is not explored."""
        known = [self._alphabet.submissions[number] for number in self._alphabet.held]
        for request in instance.held:
            for number, submission in enumerate(known, start=1):
                if (submission.operation, submission.hard) == (request.operation, request.hard):
                    return number
        return 0

    def _unpacked_held(self, number: int) -> tuple[Request, ...]:
        if not number:
            return ()
        submission = self._alphabet.submissions[self._alphabet.held[number - 1]]
        kind = RequestKind(submission.operation, submission.caller, submission.hard, in_turn=True, preempts=False)
        return (replace(request_of(kind), id="held", status=Status.HELD, held_until_ms=2 * NOW_MS),)

    def _kind(self, request: Request) -> int:
        hard = request.hard and (request.operation, True) in self._submitted
        caller = self._alphabet.caller_of(request)
        kind = RequestKind(request.operation, caller, hard, request.in_turn, request.preempts)
        return self._alphabet.kind_number[kind]

    def _task(self, request: Request, now_ms: int) -> int:
        layout, alphabet = self._layout, self._alphabet
        task = alphabet.task_of(request.operation, request.phase or "")
        silent, running = _classes(alphabet.task_ages[task - 1], request, now_ms)
        stopping = layout.deadline.ones if request.interrupt_deadline_ms is not None else 0
        return (
            task << layout.task.shift
            | silent << layout.silent.shift
            | running << layout.running.shift
            | stopping << layout.deadline.shift
        )

    def _component(self, request: Request, now_ms: int) -> int:
        layout, alphabet = self._layout, self._alphabet
        silent, running = _classes(alphabet.component_ages, request, now_ms)
        stopping = layout.component_deadline.ones if request.interrupt_deadline_ms is not None else 0
        return (
            alphabet.component_number[request.operation] << layout.component.shift
            | silent << layout.component_silent.shift
            | running << layout.component_running.shift
            | stopping << layout.component_deadline.shift
        )

    # ------------------------------------------------------------------------------------------------------- unpacking

    def host_reachable(self, word: int) -> bool:
        """Return whether the host of the instance is reachable in a state."""
        return self._alphabet.bases[self._layout.base.one(word)].host_reachable

    def unpack(self, word: int, expiring: Field | None = None) -> Instance:
        """Return an instance at `NOW_MS` that the word represents.

        Its ages are the least of their classes. With `ripe`, only that age changes class, or that deadline passes, one
        millisecond later.
        """
        layout, alphabet = self._layout, self._alphabet
        base, locked = alphabet.bases[layout.base.one(word)], layout.locked.one(word)
        idle_ms = _lower_bound(alphabet.idle_ages, layout.idle.one(word))
        if expiring is layout.idle:
            idle_ms = alphabet.idle_ages[layout.idle.one(word)] - 1
        served = [self._served_task(word, idle_ms, expiring), self._served_component(word, idle_ms, expiring)]
        outstanding = [request for request in (*served, *self._queue(word)) if request is not None]
        instance = Instance(
            id=PACKED_ID,
            name=PACKED_ID,
            project=PACKED_ID,
            host=PACKED_ID,
            fence=1,
            host_fenced=not base.host_reachable,
            updated_at_ms=NOW_MS - idle_ms,
            launched_at_ms=0 if base.launched else None,
            tags=base.tags,
            held=self._unpacked_held(layout.held.one(word)),
            locked_by="someone" if locked else None,
            lock_role=alphabet.lock_levels[locked - 1] if locked else Role.MEMBER,
            outstanding=tuple(replace(request, id=f"r{n}") for n, request in enumerate(outstanding, start=1)),
        )
        return instance.come_to(base.vm_state, base.memory)

    def _served_task(self, word: int, idle_ms: int, expiring: Field | None) -> Request | None:
        layout, alphabet = self._layout, self._alphabet
        number = layout.task.one(word)
        if not number:
            return None
        task = alphabet.tasks[number - 1]
        moment = _moment(alphabet.task_ages[number - 1], layout.silent, layout.running, word, idle_ms, expiring)
        hard = task.phase not in CATALOGUE[task.operation].phases
        return _in_flight(
            self._served(task.operation, hard=hard), task.phase, moment, _deadline(layout.deadline, word, expiring)
        )

    def _served_component(self, word: int, idle_ms: int, expiring: Field | None) -> Request | None:
        layout, alphabet = self._layout, self._alphabet
        number = layout.component.one(word)
        if not number:
            return None
        operation = alphabet.components[number - 1]
        moment = _moment(
            alphabet.component_ages, layout.component_silent, layout.component_running, word, idle_ms, expiring
        )
        phase = CATALOGUE[operation].phases[0]
        return _in_flight(
            self._served(operation, hard=False),
            phase,
            moment,
            _deadline(layout.component_deadline, word, expiring),
        )

    def _served(self, operation: Operation, *, hard: bool) -> Request:
        """Return a request in service: who asked for it affects no decision any more."""
        caller = self._alphabet.callers(operation)[0]
        return request_of(RequestKind(operation, caller, hard, in_turn=True, preempts=False))

    def _queue(self, word: int) -> list[Request]:
        layout = self._layout
        queue = layout.queue.one(word)
        waiting = []
        while queue:
            waiting.append(request_of(self._alphabet.kinds[(queue & layout.queue_first) - 1]))
            queue >>= layout.kind_bits
        return waiting


def _classes(ages: Ages, request: Request, now_ms: int) -> tuple[int, int]:
    taken_at_ms = request.taken_at_ms or 0
    silent_ms = now_ms - (request.last_progress_at_ms or taken_at_ms)
    return bisect_right(ages.silent, silent_ms), bisect_right(ages.running, now_ms - taken_at_ms)


def _lower_bound(bounds: tuple[int, ...], number: int) -> int:
    return bounds[number - 1] if number else 0


def _moment(ages: Ages, silent: Field, running: Field, word: int, idle_ms: int, expiring: Field | None) -> Moment:
    silent_ms = max(idle_ms, _lower_bound(ages.silent, silent.one(word)))
    if expiring is silent:
        silent_ms = ages.silent[silent.one(word)] - 1
    running_ms = max(silent_ms, _lower_bound(ages.running, running.one(word)))
    if expiring is running:
        running_ms = ages.running[running.one(word)] - 1
    return Moment(silent_ms, running_ms)


def _deadline(field: Field, word: int, expiring: Field | None) -> int | None:
    if not field.one(word):
        return None
    return NOW_MS + (1 if expiring is field else 2)


def _in_flight(request: Request, phase: str, moment: Moment, deadline_ms: int | None) -> Request:
    return replace(
        request,
        status=Status.IN_FLIGHT,
        phase=phase,
        fence=1,
        taken_at_ms=NOW_MS - moment.running_ms,
        last_progress_at_ms=NOW_MS - moment.silent_ms,
        interrupt_at_ms=None if deadline_ms is None else NOW_MS,
        interrupt_deadline_ms=deadline_ms,
    )


Words = NDArray[np.int64]
WORD_BITS = 63


class Field(NamedTuple):
    """A bit field of a word."""

    shift: int
    bits: int

    @property
    def ones(self) -> int:
        """The largest value, which is the unshifted mask."""
        return (1 << self.bits) - 1

    @property
    def mask(self) -> int:
        return self.ones << self.shift

    def of(self, words: Words) -> Words:
        return (words >> self.shift) & self.ones

    def one(self, word: int) -> int:
        return (word >> self.shift) & self.ones


class Layout:
    """The fields of one search's words."""

    def __init__(self, alphabet: Alphabet, outstanding_max: int, *, locks: bool, faults_max: int | None) -> None:
        self.slots = outstanding_max + 1
        """Capacity of the queue: one operation that leads to the goal may exceed the bound."""
        self.kind_bits = len(alphabet.kinds).bit_length()
        self._used = 0
        self.queue = self._next((1 << (self.kind_bits * self.slots)) - 1)
        self.base = self._next(len(alphabet.bases) - 1)
        self.task = self._next(len(alphabet.tasks))
        self.silent = self._next(max((len(ages.silent) for ages in alphabet.task_ages), default=0))
        self.running = self._next(max((len(ages.running) for ages in alphabet.task_ages), default=0))
        self.deadline = self._next(1 if any(kind.preempts for kind in alphabet.kinds) else 0)
        """Whether the request in service was interrupted, and is fenced at its deadline."""
        self.component = self._next(len(alphabet.components))
        self.component_silent = self._next(len(alphabet.component_ages.silent) if alphabet.components else 0)
        self.component_running = self._next(len(alphabet.component_ages.running) if alphabet.components else 0)
        self.component_deadline = self._next(self.deadline.ones if alphabet.components else 0)
        self.idle = self._next(len(alphabet.idle_ages))
        """The age class of an instance with nothing in service."""
        self.locked = self._next(len(alphabet.lock_levels) if locks else 0)
        self.held = self._next(len(alphabet.held))
        """The number in `Alphabet.held`, plus 1, of the submission that is held."""
        self.faults = self._next(faults_max or 0)
        if self._used > WORD_BITS:
            raise Invalid(
                f"States do not fit into {WORD_BITS} bits: {outstanding_max} outstanding requests of "
                f"{len(alphabet.operations)} operations need {self._used}.",
                remedy="Use fewer outstanding requests, or fewer different times or names of callers in the rules.",
            )
        self.served = self.task.mask | self.silent.mask | self.running.mask | self.deadline.mask
        self.component_served = (
            self.component.mask
            | self.component_silent.mask
            | self.component_running.mask
            | self.component_deadline.mask
        )
        self.queue_first = (1 << self.kind_bits) - 1

    def _next(self, largest: int) -> Field:
        field = Field(self._used, largest.bit_length())
        self._used += field.bits
        return field

    @property
    def bits(self) -> int:
        return self._used
