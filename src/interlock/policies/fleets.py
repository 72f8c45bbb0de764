"""A fleet as columns: what the gate sees of each instance, one NumPy array for each thing it sees.

Only the columns, and how instances become them. What a policy answers for a fleet is in `fleet_gate`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from interlock.core.operations import BIT, TASK_STATES, Lane
from interlock.core.records import Instance, Status
from interlock.core.request_queue import foresee, kinds
from interlock.core.states import EXECUTING_STATES, NO_TASK, VmState

VM_STATES: Final[tuple[VmState, ...]] = tuple(VmState)
"""A vm_state's code is its place here."""
TASKS: Final[tuple[str, ...]] = (NO_TASK, *TASK_STATES)
"""A task_state's code is its place here; no task is 0."""
NOT_FORESEEN: Final = 255
"""Stands for the foreseen vm_state where no state change is outstanding."""

VM_STATE_CODE: Final = {state: code for code, state in enumerate(VM_STATES)}
TASK_CODE: Final = {state: code for code, state in enumerate(TASKS)}
_LAUNCHED_STATES: Final = np.array([state in EXECUTING_STATES for state in VM_STATES])

Codes = NDArray[np.uint8]
Masks = NDArray[np.uint64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.uint32]
Times = NDArray[np.int64]


class Fleet(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The columns of a fleet: arrays of one length, of which row i is instance i.

    A mask is the union of the bits of kinds of operations (`operations.BIT`). Ages are milliseconds and never negative.
    """

    vm_state: Codes
    task_state: Codes
    outstanding: Masks
    """The kinds queued or in flight."""
    outstanding_count: Numbers
    preempting: Masks
    """The kinds that wait at the front, having preempted, without their hard variants."""
    preempting_hard: Masks
    """The same for the hard variants."""
    foreseen_vm_state: Codes
    """Where everything outstanding leads, or `NOT_FORESEEN` where no state change is outstanding."""
    foreseen_launched: Flags
    held: Masks
    locked: Flags
    blocked: Masks
    """The operations that are blocked for the instance."""
    host_reachable: Flags
    launched: Flags
    silent_ms: Times
    """Since the last sign of life."""
    running_ms: Times
    """Since what is in flight was taken; without it, since the last sign of life."""
    tags: Numbers
    """Which of `tag_sets` the instance has."""
    tag_sets: tuple[frozenset[str], ...] = (frozenset(),)

    def __len__(self) -> int:
        return len(self.vm_state)

    @classmethod
    def of(
        cls, instances: Iterable[Instance], now_ms: int, unreachable_hosts: frozenset[str] | set[str] = frozenset()
    ) -> Self:
        """The fleet as it is at `now_ms`, in the order of `instances`."""
        tag_sets: dict[frozenset[str], int] = {frozenset(): 0}
        rows = [_row(instance, now_ms, tag_sets) for instance in instances]
        hosts = [instance.host not in unreachable_hosts for instance in instances] if unreachable_hosts else True
        columns = dict(zip(_ROW, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(_ROW, ())
        return cls.from_columns(**columns, host_reachable=hosts, tag_sets=tuple(tag_sets))

    @classmethod
    def from_columns(
        cls, vm_state: Any, *, tag_sets: tuple[frozenset[str], ...] = (frozenset(),), **columns: Any
    ) -> Self:
        """A fleet of arrays, or of what NumPy makes arrays of; a column that is one value holds for every row.

        Columns that are not given are those of an instance that is left alone: nothing outstanding, held, locked or
        blocked, the host reachable, launched as its vm_state tells, and without a sign of life for no time at all.

        Raises:
            ValueError: a column is unknown, of another length than `vm_state`, or holds what it cannot hold.
        """
        states = _array("vm_state", vm_state, None)
        unknown = columns.keys() - _TYPES.keys()
        if unknown:
            raise ValueError(f"A fleet has no column {min(unknown)!r}.")
        if states.max(initial=0) >= len(VM_STATES):
            raise ValueError(f"vm_state holds codes from 0 to {len(VM_STATES) - 1}.")
        given = {name: columns.get(name, value) for name, value in _ALONE.items()}
        given.setdefault("launched", columns.get("launched", _LAUNCHED_STATES[states]))
        given.setdefault("foreseen_launched", columns.get("foreseen_launched", given["launched"]))
        given.setdefault("running_ms", columns.get("running_ms", given["silent_ms"]))
        arrays = {name: _array(name, value, len(states)) for name, value in given.items()}
        if arrays["task_state"].max(initial=0) >= len(TASKS):
            raise ValueError(f"task_state holds codes from 0 to {len(TASKS) - 1}.")
        foreseen = arrays["foreseen_vm_state"]
        if np.any((foreseen >= len(VM_STATES)) & (foreseen != NOT_FORESEEN)):
            raise ValueError(f"foreseen_vm_state holds codes from 0 to {len(VM_STATES) - 1}, or {NOT_FORESEEN}.")
        if arrays["tags"].max(initial=0) >= len(tag_sets):
            raise ValueError(f"tags holds places in tag_sets, of which there are {len(tag_sets)}.")
        return cls(vm_state=states, tag_sets=tag_sets, **arrays)

    def rows(self, chosen: Any) -> Self:
        """The fleet of some rows: a slice, or the places of the rows."""
        return type(self)(tag_sets=self.tag_sets, **{name: getattr(self, name)[chosen] for name in _TYPES})


_TYPES: Final[dict[str, Any]] = {
    "vm_state": np.uint8,
    "task_state": np.uint8,
    "outstanding": np.uint64,
    "outstanding_count": np.uint32,
    "preempting": np.uint64,
    "preempting_hard": np.uint64,
    "foreseen_vm_state": np.uint8,
    "foreseen_launched": np.bool_,
    "held": np.uint64,
    "locked": np.bool_,
    "blocked": np.uint64,
    "host_reachable": np.bool_,
    "launched": np.bool_,
    "silent_ms": np.int64,
    "running_ms": np.int64,
    "tags": np.uint32,
}
"""Every column, and what it holds."""
_ALONE: Final[dict[str, Any]] = {
    "task_state": 0,
    "outstanding": 0,
    "outstanding_count": 0,
    "preempting": 0,
    "preempting_hard": 0,
    "foreseen_vm_state": NOT_FORESEEN,
    "held": 0,
    "locked": False,
    "blocked": 0,
    "host_reachable": True,
    "silent_ms": 0,
    "tags": 0,
}
_ROW: Final = tuple(name for name in _TYPES if name != "host_reachable")
"""The columns that `_row` gives, in its order."""


def _array(name: str, value: Any, length: int | None) -> NDArray[Any]:
    wanted = _TYPES[name]
    try:
        given = np.asarray(value)
        array = np.ascontiguousarray(given, dtype=wanted)
        fits = given.dtype == wanted or bool(np.all(array == given))
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot hold that: {error}.") from error
    if not fits or (wanted is np.int64 and array.min(initial=0) < 0):
        raise ValueError(f"{name} holds a value that it cannot hold.")
    if length is not None and given.ndim == 0:
        array = np.full(length, array.reshape(()), dtype=wanted)
    if array.ndim != 1 or (length is not None and len(array) != length):
        raise ValueError(f"{name} must be one row of {'values' if length is None else f'{length} values'}.")
    return array


def _row(instance: Instance, now_ms: int, tag_sets: dict[frozenset[str], int]) -> tuple[Any, ...]:
    """What the gate sees of one instance, as `admission.look` does, and what it asks of its queue."""
    silent_since = running_since = instance.updated_at_ms
    task, preempting, preempting_hard = NO_TASK, 0, 0
    foreseen_vm_state, foreseen_launched = NOT_FORESEEN, instance.launched
    if instance.outstanding:
        serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
        if serving is not None:
            running_since = serving.taken_at_ms or 0
            silent_since = serving.last_progress_at_ms or running_since
        task = instance.task_state
        for request in instance.outstanding:
            if request.preempts and request.status is Status.QUEUED:
                if request.hard:
                    preempting_hard |= BIT[request.operation]
                else:
                    preempting |= BIT[request.operation]
        if any(request.lane is Lane.STATE for request in instance.outstanding):
            there = foresee(instance)
            foreseen_vm_state, foreseen_launched = VM_STATE_CODE[there.vm_state], there.launched
    return (
        VM_STATE_CODE[instance.vm_state],
        TASK_CODE[task],
        kinds(instance.outstanding),
        len(instance.outstanding),
        preempting,
        preempting_hard,
        foreseen_vm_state,
        foreseen_launched,
        kinds(instance.held),
        instance.locked_by is not None,
        sum(BIT[operation] for operation in frozenset(instance.blocked_operations)),
        instance.launched,
        max(0, now_ms - silent_since),
        max(0, now_ms - running_since),
        tag_sets.setdefault(frozenset(instance.tags), len(tag_sets)) if instance.tags else 0,
    )
