"""Packing an instance of the core into a word, and making an instance that a word stands for."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, NamedTuple

import msgspec

from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.records import SERVED, Instance, Request, Status
from interlock.core.request_queue import at_present
from interlock.policies.exploring.alphabet import Ages, Alphabet, Kind
from interlock.policies.exploring.layout import Field, Layout

NOW_MS: Final = 1_000_000_000_000
"""When instances that are made from words live; far enough from zero that any age fits before it."""
_ID: Final = "packed"

replace = msgspec.structs.replace


class Moment(NamedTuple):
    """Ages of what is served, in milliseconds: how long it was silent, and how long it has run."""

    silent_ms: int
    running_ms: int


class Packing:
    """The words of one walk, and the instances that they stand for."""

    def __init__(self, alphabet: Alphabet, layout: Layout) -> None:
        self._alphabet = alphabet
        self._layout = layout
        self._asked = {(ask.operation, ask.hard) for ask in alphabet.asks}

    # --------------------------------------------------------------------------------------------------------- packing

    def pack(self, instance: Instance, now_ms: int) -> int:
        """The word of an instance, as it is at `now_ms`."""
        layout, alphabet = self._layout, self._alphabet
        footing = alphabet.footing_number[alphabet.canonical(at_present(instance))]
        idle = bisect_right(alphabet.idle_ages, now_ms - instance.updated_at_ms)
        locked = layout.locked.ones if instance.locked_by is not None else 0
        word = footing << layout.footing.shift | idle << layout.idle.shift | locked << layout.locked.shift
        at = part_at = 0
        for request in instance.outstanding:
            is_part = request.lane is Lane.COMPONENT
            if request.status in SERVED:
                word |= self._part(request, now_ms) if is_part else self._task(request, now_ms)
            elif is_part:
                word |= self._kind(request) << (layout.part_queue.shift + part_at)
                part_at += layout.part_kind_bits
            else:
                word |= self._kind(request) << (layout.queue.shift + at)
                at += layout.kind_bits
        return word

    def _kind(self, request: Request) -> int:
        hard = request.hard and (request.operation, True) in self._asked
        return self._alphabet.kind_number[Kind(request.operation, hard, request.in_turn, request.preempts)]

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

    def _part(self, request: Request, now_ms: int) -> int:
        layout, alphabet = self._layout, self._alphabet
        silent, running = _classes(alphabet.part_ages, request, now_ms)
        stopping = layout.part_deadline.ones if request.interrupt_deadline_ms is not None else 0
        return (
            alphabet.part_number[request.operation] << layout.part.shift
            | silent << layout.part_silent.shift
            | running << layout.part_running.shift
            | stopping << layout.part_deadline.shift
        )

    # ------------------------------------------------------------------------------------------------------- unpacking

    def unpack(self, word: int, ripe: Field | None = None) -> Instance:
        """An instance at `NOW_MS` of which a word tells all that anything depends on.

        Its ages are the least that they can be; with `ripe`, that age is in its next class, or that deadline over, one
        millisecond later, and nothing else is.
        """
        layout, alphabet = self._layout, self._alphabet
        footing = alphabet.footings[layout.footing.one(word)]
        idle_ms = _least(alphabet.idle_ages, layout.idle.one(word))
        if ripe is layout.idle:
            idle_ms = alphabet.idle_ages[layout.idle.one(word)] - 1
        served = [self._served_task(word, idle_ms, ripe), self._served_part(word, idle_ms, ripe)]
        queue, part_queue = self._queue(word, Lane.STATE), self._queue(word, Lane.COMPONENT)
        waiting = [*queue, *part_queue]
        waiting.sort(key=lambda request: not request.preempts)
        outstanding = [request for request in (*served, *waiting) if request is not None]
        instance = Instance(
            id=_ID,
            name=_ID,
            project=_ID,
            host=_ID,
            fence=1,
            updated_at_ms=NOW_MS - idle_ms,
            launched_at_ms=0 if footing.launched else None,
            locked_by="someone" if layout.locked.one(word) else None,
            outstanding=tuple(replace(request, id=f"r{n}") for n, request in enumerate(outstanding, start=1)),
        )
        return instance.come_to(footing.vm_state, footing.memory)

    def _served_task(self, word: int, idle_ms: int, ripe: Field | None) -> Request | None:
        layout, alphabet = self._layout, self._alphabet
        number = layout.task.one(word)
        if not number:
            return None
        task = alphabet.tasks[number - 1]
        moment = _moment(alphabet.task_ages[number - 1], layout.silent, layout.running, word, idle_ms, ripe)
        hard = task.phase not in CATALOGUE[task.operation].phases
        request = _request(alphabet.role, task.operation, hard=hard)
        return _in_flight(request, task.phase, moment, _deadline(layout.deadline, word, ripe))

    def _served_part(self, word: int, idle_ms: int, ripe: Field | None) -> Request | None:
        layout, alphabet = self._layout, self._alphabet
        number = layout.part.one(word)
        if not number:
            return None
        operation = alphabet.parts[number - 1]
        moment = _moment(alphabet.part_ages, layout.part_silent, layout.part_running, word, idle_ms, ripe)
        phase = CATALOGUE[operation].phases[0]
        return _in_flight(
            _request(alphabet.role, operation, hard=False), phase, moment, _deadline(layout.part_deadline, word, ripe)
        )

    def _queue(self, word: int, lane: Lane) -> list[Request]:
        layout, alphabet = self._layout, self._alphabet
        if lane is Lane.STATE:
            queue, bits, kinds = layout.queue.one(word), layout.kind_bits, alphabet.kinds
        else:
            queue, bits, kinds = layout.part_queue.one(word), layout.part_kind_bits, alphabet.part_kinds
        waiting = []
        while queue:
            waiting.append(_request(alphabet.role, *kinds[(queue & ((1 << bits) - 1)) - 1]))
            queue >>= bits
        return waiting


def _classes(ages: Ages, request: Request, now_ms: int) -> tuple[int, int]:
    taken_at_ms = request.taken_at_ms or 0
    silent_ms = now_ms - (request.last_progress_at_ms or taken_at_ms)
    return bisect_right(ages.silent, silent_ms), bisect_right(ages.running, now_ms - taken_at_ms)


def _least(bounds: tuple[int, ...], number: int) -> int:
    return bounds[number - 1] if number else 0


def _moment(ages: Ages, silent: Field, running: Field, word: int, idle_ms: int, ripe: Field | None) -> Moment:
    silent_ms = max(idle_ms, _least(ages.silent, silent.one(word)))
    if ripe is silent:
        silent_ms = ages.silent[silent.one(word)] - 1
    running_ms = max(silent_ms, _least(ages.running, running.one(word)))
    if ripe is running:
        running_ms = ages.running[running.one(word)] - 1
    return Moment(silent_ms, running_ms)


def _deadline(field: Field, word: int, ripe: Field | None) -> int | None:
    if not field.one(word):
        return None
    return NOW_MS + (1 if ripe is field else 2)


def _request(role: str, operation: Operation, hard: bool, in_turn: bool = True, preempts: bool = False) -> Request:
    return Request(
        id="",
        instance_id=_ID,
        operation=operation,
        parameters={"hard": True} if hard else {},
        requested_by="someone",
        role=role,
        rule=_ID,
        admitted_at_ms=0,
        in_turn=in_turn,
        preempts=preempts,
    )


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
