"""The situations of a fleet: which of its rows no policy of these rules could tell apart.

A million instances are in a few thousand situations at most. Two rows are in one situation if they are equal in every
column that a rule can ask about, where an age counts only by which of the policy's times it has passed, and tags only
if the policy names them. What is decided for one row of a situation holds for all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from interlock.core.policy import CompiledPolicy, MeasuredFrom, Rule
from interlock.policies.fleets import NOT_FORESEEN, TASKS, VM_STATES, Fleet

TABLE_SIZE_MAX: Final = 1 << 22
"""Up to how many possible values a column is told apart by a table of them all; beyond, by sorting."""

Places = NDArray[np.intp]


class Marks(NamedTuple):
    """What of a policy decides which rows it can tell apart."""

    silent_ms: tuple[int, ...]
    """The times since the last sign of life that some rule asks about, ascending."""
    running_ms: tuple[int, ...]
    """The same since something in flight was taken."""
    tags: frozenset[str]
    held: bool
    """Whether any rule asks what is held."""
    outstanding_max: int


class Situations(NamedTuple):
    """A fleet, told in fewer rows."""

    rows: Fleet
    """One row for each situation, ordered by vm_state and task_state."""
    of: Places
    """Which of them each instance is in."""


def marks(policy: CompiledPolicy) -> Marks:
    """What `policy` can tell rows apart by."""
    silent, running = set[int](), set[int]()
    tags = set[str]()
    for rule in policy.rules:
        tags |= rule.tags or frozenset()
        if rule.silent_ms_min is not None:
            silent.add(rule.silent_ms_min)
        if rule.threshold_ms is not None:
            (silent if rule.measured_from is MeasuredFrom.LAST_PROGRESS else running).add(rule.threshold_ms)
    held = any(rule.held is not None for rule in policy.rules)
    return Marks(tuple(sorted(silent)), tuple(sorted(running)), frozenset(tags), held, policy.outstanding_max)


def situations(fleet: Fleet, marked: Marks) -> Situations:
    """The situations of `fleet` under the policy whose marks these are."""
    fleet = _with_named_tags(fleet, marked.tags)
    code, size = _key(fleet), len(VM_STATES) * len(TASKS)
    for column, values in _columns(fleet, marked):
        if size * values > TABLE_SIZE_MAX:
            code, size = _dense(code, size)
        code, size = code * values + column, size * values
    code, size = _dense(code, size)
    first = np.empty(size, dtype=np.intp)
    first[code] = np.arange(len(code))
    rows = fleet.rows(first)
    order = np.argsort(_key(rows), kind="stable")
    place = np.empty(size, dtype=np.intp)
    place[order] = np.arange(size)
    return Situations(rows.rows(order), place[code])


def parts(rows: Fleet) -> Iterator[tuple[int, int, slice]]:
    """The runs of rows of one vm_state and task_state, given as codes, of rows that are ordered by them."""
    key = _key(rows)
    if not len(key):
        return
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(key)], strict=True):
        yield *divmod(int(key[start]), len(TASKS)), slice(start, end)


def tag_table(tag_sets: Iterable[frozenset[str]], rule: Rule) -> NDArray[np.bool_]:
    """For each set of tags, whether it has any that the rule asks for."""
    wanted = rule.tags or frozenset()
    return np.array([not wanted.isdisjoint(tags) for tags in tag_sets], dtype=np.bool_)


def _key(fleet: Fleet) -> Places:
    return fleet.vm_state.astype(np.intp) * len(TASKS) + fleet.task_state


def _columns(fleet: Fleet, marked: Marks) -> Iterator[tuple[NDArray[Any], int]]:
    """What may tell rows apart, as small numbers, each with how many values it may have."""
    flags = fleet.locked * np.uint8(8) + fleet.host_reachable * np.uint8(4)
    flags += fleet.launched * np.uint8(2) + fleet.foreseen_launched
    yield flags, 16
    foreseen = np.where(fleet.foreseen_vm_state == NOT_FORESEEN, np.uint8(len(VM_STATES)), fleet.foreseen_vm_state)
    yield foreseen, len(VM_STATES) + 1
    yield fleet.outstanding_count >= marked.outstanding_max, 2
    for age, times in ((fleet.silent_ms, marked.silent_ms), (fleet.running_ms, marked.running_ms)):
        if times:
            yield np.searchsorted(np.array(times, dtype=np.int64), age, side="right"), len(times) + 1
    yield fleet.tags, len(fleet.tag_sets)
    for mask in (fleet.outstanding, fleet.blocked, fleet.preempting, fleet.preempting_hard):
        yield _mask(mask)
    if marked.held:
        yield _mask(fleet.held)


def _with_named_tags(fleet: Fleet, named: frozenset[str]) -> Fleet:
    """The same fleet, without the tags that the policy does not name."""
    found: dict[frozenset[str], int] = {frozenset(): 0}
    table = np.array([found.setdefault(tags & named, len(found)) for tags in fleet.tag_sets], dtype=np.uint32)
    return msgspec.structs.replace(fleet, tags=table[fleet.tags], tag_sets=tuple(found))


def _mask(mask: NDArray[np.uint64]) -> tuple[NDArray[Any], int]:
    """A mask as a small number. Most instances have nothing in any, and are not sorted."""
    there = np.flatnonzero(mask)
    small = np.zeros(len(mask), dtype=np.intp)
    values, inverse = np.unique(mask[there], return_inverse=True)
    small[there] = inverse + 1
    return small, len(values) + 1


def _dense(code: Places, size: int) -> tuple[Places, int]:
    """The same numbers without the gaps between them, and how many there are."""
    if size > TABLE_SIZE_MAX:
        values, inverse = np.unique(code, return_inverse=True)
        return inverse, len(values)
    there = np.zeros(size, dtype=np.bool_)
    there[code] = True
    places = np.cumsum(there) - 1
    return places[code], int(there.sum())
