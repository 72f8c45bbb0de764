"""Parser of rehearsal events: one JSON object per line, and the instance that one describes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec

from interlock.core.conditions import POWER_STATES
from interlock.core.durations import DURATION_MAX_MS, EXPECTED, parse_duration
from interlock.core.errors import Invalid
from interlock.core.operations import CATALOGUE, TASK_OPERATION, Lane, Operation
from interlock.core.records import Instance, Outcome, Request, Status
from interlock.core.roles import Role
from interlock.core.state_stack import Memory
from interlock.core.states import NO_TASK, PowerState, VmState
from interlock.core.views import power_in
from interlock.policies.language.vocabulary import OPERATIONS, TASKS, VM_STATES, nearest

WordT = TypeVar("WordT")

TAGS_MAX: Final = 64


class InstanceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`{"instance": {…}}`: start over with this instance."""

    vm_state: str = "building"
    in_flight: str | None = None
    task_state: str | None = None
    age: str | int | float = 0
    prior_vm_state: str | None = None
    further_vm_states: tuple[str, ...] = ()
    locked: bool = False
    lock_role: str = "member"
    """The role of who locked it."""
    tags: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    """Its own list of blocked operations."""
    role: str = "admin"
    """The default role of the submissions that follow."""
    host_reachable: bool = True
    at: str | None = None
    """The time of the wall clock, for time windows; None: submissions say which are open."""
    power_state: str | None = None
    """None: the one that belongs to its vm_state."""
    created: str | int | float | None = None
    """How long ago it was created; None: as `age`."""
    state_for: str | int | float | None = None
    """How long it has been in its vm_state; None: as `age`."""
    failures: dict[str, int] = {}
    """How often operations have failed since they last succeeded."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One event: exactly one of the first thirteen keys, and its options."""

    submit: str | None = None
    take: str | None = None
    finish: str | None = None
    observe: str | None = None
    cancel: str | None = None
    approve: str | None = None
    progress: str | None = None
    advance: str | int | float | None = None
    show: bool | None = None
    adopt: bool | None = None
    relabel: tuple[str, ...] | None = None
    host_reachable: bool | None = None
    """Its tags from now on."""
    instance: InstanceLine | None = None
    outcome: str | None = None
    arrived: bool | None = None
    phase: str | None = None
    parameters: dict[str, Any] | None = None
    hard: bool | None = None
    role: str | None = None
    requested_by: str | None = None
    """The name of the caller; `rehearsal` by default."""
    project: str | None = None
    groups: tuple[str, ...] | None = None
    windows: tuple[str, ...] | None = None
    """The time windows that are open, where no time is given."""
    approver: tuple[str, ...] | None = None
    """Roles and groups that count as having approved the request: `role:admin`, `group:ops`."""
    project_outstanding: int | None = None
    """How many requests are outstanding in the instance's project."""
    host_outstanding: int | None = None
    hold: str | int | float | None = None


VERBS: Final = (
    *("submit", "take", "finish", "observe", "cancel", "approve", "progress", "advance", "show"),
    *("adopt", "relabel", "host_reachable", "instance"),
)
_COMPANIONS: Final = {
    "outcome": "finish",
    "arrived": "finish",
    "phase": "progress",
    "parameters": "submit",
    "hard": "submit",
    "role": "submit or relabel or approve",
    "requested_by": "submit or approve",
    "project": "submit",
    "groups": "submit or approve",
    "windows": "submit",
    "approver": "submit",
    "project_outstanding": "submit",
    "host_outstanding": "submit",
    "hold": "submit",
}
"""The options of events."""
_ROLES: Final = {role.value: role for role in Role}
_OUTCOMES: Final = {outcome.value: outcome for outcome in Outcome}
LINE_LENGTH_MAX: Final = 64 * 1024
"""Longer lines are rejected unparsed."""
_decoder: Final = msgspec.json.Decoder(Line)


def read_line(line: bytes | str) -> tuple[str, Line]:
    """Return the verb and the event of a line.

    Raises:
        Invalid: not a JSON object, an unknown key, or not exactly one event.
    """
    if len(line) > LINE_LENGTH_MAX:
        raise Invalid(f"The line is longer than {LINE_LENGTH_MAX} bytes.")
    try:
        event = _decoder.decode(line)
    except msgspec.ValidationError as error:
        raise Invalid(f"Invalid event: {error}.", remedy=f"An event has one of {', '.join(VERBS)}.") from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Invalid(f"This is not JSON: {error}.") from error
    verbs = [verb for verb in VERBS if getattr(event, verb) is not None]
    if len(verbs) != 1:
        raise Invalid(f"An event has exactly one of {', '.join(VERBS)}; this has {' and '.join(verbs) or 'none'}.")
    verb = verbs[0]
    for key, owner in _COMPANIONS.items():
        if verb not in owner.split() and getattr(event, key) is not None:
            raise Invalid(f"{key} is valid only with {owner}.")
    return verb, event


def named_operation(name: str) -> Operation:
    """Return an operation by name, with hyphens or underscores. Raises `Invalid` with the nearest one."""
    return _word("operation", name, OPERATIONS.words)


def named_role(name: str) -> Role:
    """Return a role by name. Raises `Invalid`."""
    return _word("role", name, _ROLES)


def length_of_time_ms(value: str | float) -> int:
    """Return milliseconds from text as in a policy, or from a number of seconds. Raises `Invalid`."""
    if isinstance(value, str):
        parsed = parse_duration(value)
    else:
        parsed = round(value * 1_000) if 0 <= value <= DURATION_MAX_MS / 1_000 else None
    if parsed is None:
        raise Invalid(f"Invalid duration {value!r}: expected {EXPECTED}, or a number of seconds.")
    return parsed


def wall_clock_ms(text: str) -> int:
    """Return milliseconds from an ISO 8601 time with its offset. Raises `Invalid`."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise Invalid(f"Invalid time {text!r}: expected one such as 2026-03-28T23:30:00+01:00, or with Z.")
    return round(at.timestamp() * 1000)


def made_instance(line: InstanceLine, now_ms: int) -> Instance:
    """Build the instance of an event, at `now_ms`; a request in flight has the id `r1`. Raises `Invalid`."""
    vm_state = _word("vm_state", line.vm_state, VM_STATES.words)
    since_ms = now_ms - length_of_time_ms(line.age)
    check_tags(line.tags)
    serving = _in_flight(line, since_ms)
    instance = Instance(
        id="rehearsed",
        name="rehearsed",
        project="rehearsal",
        host="rehearsal",
        created_at_ms=since_ms if line.created is None else now_ms - length_of_time_ms(line.created),
        state_since_ms=since_ms if line.state_for is None else now_ms - length_of_time_ms(line.state_for),
        failures={named_operation(name): count for name, count in line.failures.items()},
        updated_at_ms=since_ms,
        locked_by="owner" if line.locked else None,
        lock_role=named_role(line.lock_role),
        blocked_operations=tuple(named_operation(name) for name in line.blocked),
        tags=line.tags,
        # Without `launched`, an instance that is not building counts as launched.
        launched_at_ms=None if vm_state is VmState.BUILDING else since_ms,
        error="It was so at the beginning." if vm_state is VmState.ERROR else None,
        outstanding=() if serving is None else (serving,),
    )
    instance = instance.come_to(vm_state, _memory(line))
    return msgspec.structs.replace(instance, power_state=_power_state(line, instance))


def _power_state(line: InstanceLine, instance: Instance) -> PowerState:
    if line.power_state is None:
        return power_in(instance.vm_state, instance.state_stack)
    return PowerState(_word("power_state", line.power_state, {name: name for name in POWER_STATES}))


def check_tags(tags: tuple[str, ...]) -> None:
    """Raises `Invalid` for more tags than an instance can have."""
    if len(tags) > TAGS_MAX:
        raise Invalid(f"An instance has at most {TAGS_MAX} tags.")


def _memory(line: InstanceLine) -> Memory:
    prior = () if line.prior_vm_state is None else (_word("prior_vm_state", line.prior_vm_state, VM_STATES.words),)
    return (*prior, *(_word("vm_state", name, VM_STATES.words) for name in line.further_vm_states))


def _in_flight(line: InstanceLine, since_ms: int) -> Request | None:
    operation, phase = _operation_and_phase(line)
    if operation is None:
        return None
    return Request(
        id="r1",
        instance_id="rehearsed",
        operation=operation,
        parameters={"hard": True} if phase in CATALOGUE[operation].hard_phases else {},
        requested_by="rehearsal",
        role=Role.ADMIN,
        rule="rehearsal",
        admitted_at_ms=since_ms,
        status=Status.IN_FLIGHT,
        phase=phase,
        taken_at_ms=since_ms,
        last_progress_at_ms=since_ms,
    )


def _operation_and_phase(line: InstanceLine) -> tuple[Operation | None, str | None]:
    operation = None if line.in_flight is None else named_operation(line.in_flight)
    phase = None if line.task_state is None else line.task_state.replace("-", "_")
    if phase == NO_TASK:
        phase = None
    if operation is None:
        return (None, None) if phase is None else (TASK_OPERATION[_word("task_state", phase, TASKS.words)], phase)
    entry = CATALOGUE[operation]
    if entry.lane is Lane.RECORD:
        raise Invalid(f"{operation.value} changes only the record, and is never in flight.")
    known = entry.phases + entry.hard_phases
    if phase is None:
        return operation, known[0]
    if phase not in known:
        raise Invalid(f"{operation.value} has no phase {phase!r}; expected one of {', '.join(known)}.")
    return operation, phase


def named_outcome(name: str | None) -> Outcome:
    """Return the outcome; succeeded by default. Raises `Invalid`."""
    return Outcome.SUCCEEDED if name is None else _word("outcome", name, _OUTCOMES)


def _word(noun: str, name: str, words: Mapping[str, WordT]) -> WordT:
    word = name.replace("-", "_")
    if word not in words:
        raise Invalid(f"Unknown {noun} {name!r}. {nearest(word, words)}")
    return words[word]
