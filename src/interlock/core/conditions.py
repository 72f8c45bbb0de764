# ruff: noqa: PLC0414 - the description of a condition is imported from here
"""The conditions of a rule, each described once: key, value, test, values to analyse, and words.

The gate compiles the tests; the analyses of policies, the parser, the JSON Schema, the API, explanations and the
documentation read the same descriptions. A condition is a field of `Conditions` and an entry of `CONDITIONS`. The value
that it tests is a field of `views.View`; how it is tested is one of the kinds in `condition_kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import msgspec

from interlock.core.condition_definition import Condition as Condition
from interlock.core.condition_definition import Subject as Subject
from interlock.core.condition_kinds import (
    AllTexts,
    AnyOperation,
    AnyText,
    AtLeast,
    AtMost,
    Belongs,
    Flag,
    Name,
    Takes,
    Test,
    Unless,
    Word,
)
from interlock.core.durations import short_time
from interlock.core.operations import Operation
from interlock.core.roles import Role
from interlock.core.states import PowerState
from interlock.core.time_windows import WINDOW
from interlock.core.views import View, power_in

POWER_STATES: Final = tuple(state.value for state in PowerState if state is not PowerState.UNKNOWN)
"""What a record can have; `unknown` is only shown."""


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """The conditions of a rule. One that is None always holds."""

    outstanding: frozenset[Operation] | None = None
    """Holds if any of these operations is queued or in flight; empty: if none is."""
    held: frozenset[Operation] | None = None
    """Holds if a request with any of these operations is held; empty: if none is."""
    roles: frozenset[Role] | None = None
    requested_by: frozenset[str] | None = None
    """Names of callers; one that ends with `*` stands for all that begin so."""
    projects: frozenset[str] | None = None
    """Projects of callers, written as names are."""
    groups: frozenset[str] | None = None
    """Holds if the caller is in any of these groups, and in none of those with `!`."""
    within: frozenset[str] | None = None
    """Holds if any of these time windows is open at the submission, and none of those with `!`."""
    unless_approved_by: frozenset[str] | None = None
    """Roles and groups, `role:admin` or `group:ops`: holds until a caller with one of them has approved the request."""
    project_outstanding_min: int | None = None
    """Holds if at least so many requests are outstanding in the instance's project."""
    host_outstanding_min: int | None = None
    """Holds if at least so many requests are outstanding on the instance's host."""
    locked: bool | None = None
    locked_above: bool | None = None
    blocked: bool | None = None
    """Whether the instance's blocked operations include the operation."""
    tags: frozenset[str] | None = None
    """Holds if the instance has any of these tags, and none of those that begin with `!`."""
    tags_all: frozenset[str] | None = None
    """Holds if the instance has all of these tags."""
    host_reachable: bool | None = None
    power_state: frozenset[str] | None = None
    launched: bool | None = None
    """Whether the instance's guest has ever run."""
    hard: bool | None = None
    """Whether the request is for the hard variant of its operation."""
    vcpus_min: int | None = None
    vcpus_max: int | None = None
    memory_mib_min: int | None = None
    memory_mib_max: int | None = None
    root_gib_min: int | None = None
    root_gib_max: int | None = None
    target_hosts: frozenset[str] | None = None
    """Names of hosts; one that ends with `*` stands for all that begin so."""
    images: frozenset[str] | None = None
    """Names of images, as of hosts."""
    failures_min: int | None = None
    """Holds if the operation has failed at least so often since it last succeeded."""
    age_ms_min: int | None = None
    age_ms_max: int | None = None
    in_state_ms_min: int | None = None
    """Holds if the instance has been in its vm_state for at least this time."""
    silent_ms_min: int | None = None
    """Holds if the request in flight has made no progress for at least this time."""


_GROUP: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_TAGS: Final = "tags, none of them empty"
_TEXT: Final = r"[^!\x00-\x08\x0b-\x1f\x7f-\x9f][^\x00-\x08\x0b-\x1f\x7f-\x9f]{0,999}"

_EVER_MS: Final = 1 << 60
_TARGET: Final = "host that the request names as its target, also if the server has chosen it for `any`."
_IMAGE: Final = "image that the request names: of a rebuild or a rescue."


def _size(field: str, what: str, example: int) -> Iterator[Condition]:
    """Yield the two conditions on one part of the size that a request asks for."""
    for end, kind, bound in (
        ("min", AtLeast(Takes.COUNT, given=False), "at least"),
        ("max", AtMost(Takes.COUNT, given=False), "at most"),
    ):
        yield Condition(
            key=f"{field}_{end}",
            field=f"{field}_{end}",
            reads=field,
            subject=Subject.PARAMETERS,
            kind=kind,
            meaning=f"Holds if the request asks for a size with a {what} of {bound} this.",
            example=example,
            title=f"{field} {bound}",
            because=lambda value: f"with {field} {value}" if value else f"with no {field}",
            assumed=lambda _: 0,
            assumption=f"No request asks for a size (`{field}_{end}`).",
        )


CONDITIONS: Final = (
    Condition(
        key="outstanding",
        field="outstanding",
        reads="outstanding",
        subject=Subject.QUEUE,
        kind=AnyOperation(),
        meaning='Holds if any of these operations is queued or in flight; `["none"]` if nothing is.',
        example=["@same"],
        title="outstanding",
        because=lambda operation: f"{operation.value} is outstanding",
    ),
    Condition(
        key="held",
        field="held",
        reads="held",
        subject=Subject.QUEUE,
        kind=AnyOperation(),
        meaning='Holds if a request for any of these operations is held until the policy admits it; `["none"]` if '
        "none is.",
        example=["stop"],
        title="held",
        because=lambda operation: f"{operation.value} is held",
    ),
    Condition(
        key="roles",
        field="roles",
        reads="role",
        subject=Subject.CALLER,
        kind=Word(tuple(Role), usual=Role.MEMBER),
        meaning="The caller's role.",
        example=["member"],
        title="role",
        option="Role of the caller.",
        because=lambda role: f"by {'an' if role[0] == 'a' else 'a'} {role}",
    ),
    Condition(
        key="requested_by",
        field="requested_by",
        reads="requested_by",
        subject=Subject.CALLER,
        kind=Name(),
        meaning="The caller's name: that of the token, or `interlock` for what the server requests itself. `ci-*` "
        "stands for every name that begins with `ci-`.",
        example=["alice", "ci-*"],
        title="requested by",
        option="Name of the caller.",
        because=lambda name: f"by {name}" if name else "by anybody whom no rule names",
    ),
    Condition(
        key="projects",
        field="projects",
        reads="project",
        subject=Subject.CALLER,
        kind=Name(),
        meaning="The caller's project: that of the token. `lab-*` stands for every project whose name begins with "
        "`lab-`.",
        example=["payments", "lab-*"],
        title="of project",
        option="Project of the caller.",
        because=lambda name: f"from the project {name}" if name else "from a project that no rule names",
    ),
    Condition(
        key="groups",
        field="groups",
        reads="groups",
        subject=Subject.CALLER,
        kind=Belongs(_GROUP, "groups: letters, digits, '.', '_' and '-'"),
        meaning="The caller's groups: those of the token. Holds if the caller is in any of these groups, and in none "
        "of those with `!`.",
        example=["ops", "!trainees"],
        title="in group",
        option="Groups of the caller.",
        because=lambda groups: f"by a member of {' and '.join(groups)}" if groups else "by a member of no such group",
    ),
    Condition(
        key="within",
        field="within",
        reads="windows",
        subject=Subject.CALLER,
        kind=Belongs(WINDOW.pattern, "windows such as 'Sat,Sun 02:00-06:00 Europe/Berlin'"),
        meaning="Weekly time windows: days, times, and a time zone. Holds if any of these is open, and none of those "
        "with `!`.",
        example=["Sat,Sun 02:00-06:00 Europe/Berlin", "!Fri 18:00-Mon 06:00 UTC"],
        title="within",
        option="Time window that is open.",
        because=lambda windows: f"within {' and '.join(windows)}" if windows else "outside of these time windows",
    ),
    Condition(
        key="unless_approved_by",
        field="unless_approved_by",
        reads="approver",
        subject=Subject.CALLER,
        kind=Unless(f"role:(?:{'|'.join(Role)})|group:{_GROUP}", "approvers such as 'role:admin' or 'group:ops'"),
        meaning="Who may approve the request: another caller with one of these roles or groups. Holds until one has; "
        'until then the request is held. Only with `verdict = "deny"`.',
        example=["role:admin", "group:ops"],
        title="approved by",
        option="Role or group of the request's approver, such as group:ops.",
        because=lambda words: f"with the approval of {' and '.join(words)}" if words else "without an approval",
    ),
    *(
        Condition(
            key=f"{where}_outstanding_min",
            field=f"{where}_outstanding_min",
            reads=f"{where}_outstanding",
            subject=Subject.CALLER,
            kind=AtLeast(Takes.COUNT),
            meaning=f"Holds if at least so many requests are outstanding {place}, the new one not counted.",
            example=50,
            title=f"outstanding {place}:",
            option=f"How many requests are outstanding {place}.",
            because=partial("with {1} requests outstanding {0}".format, place),
        )
        for where, place in (("project", "in the VM's project"), ("host", "on the VM's host"))
    ),
    Condition(
        key="locked",
        field="locked",
        reads="locked",
        subject=Subject.INSTANCE,
        kind=Flag(usual=False),
        meaning="Whether the instance is locked.",
        example=True,
        title="locked",
        because=lambda locked: f"the instance is {'' if locked else 'not '}locked",
    ),
    Condition(
        key="locked_above",
        field="locked_above",
        reads="locked_above",
        subject=Subject.INSTANCE,
        kind=Flag(usual=False),
        meaning="Whether the instance was locked with a more powerful role than the caller's: by an admin, if a member "
        "asks.",
        example=True,
        title="locked above",
        because=lambda above: f"the instance is {'' if above else 'not '}locked by a more powerful role",
    ),
    Condition(
        key="blocked",
        field="blocked",
        reads="blocked",
        subject=Subject.INSTANCE,
        kind=Flag(usual=False),
        meaning="Whether the instance's list of blocked operations contains the operation.",
        example=True,
        title="blocked",
        because=lambda blocked: f"the instance's own list {'blocks' if blocked else 'does not block'} the operation",
    ),
    Condition(
        key="tags",
        field="tags",
        reads="tags",
        subject=Subject.INSTANCE,
        kind=AnyText(_TEXT, _TAGS),
        meaning="Holds if the instance has any of these tags, and none of those with `!` before them.",
        example=["build", "!spot"],
        title="tag",
        because=lambda tag: f"tagged {tag}",
    ),
    Condition(
        key="tags_all",
        field="tags_all",
        reads="tags",
        subject=Subject.INSTANCE,
        kind=AllTexts(_TEXT, _TAGS),
        meaning="Holds if the instance has all of these tags.",
        example=["gpu", "prod"],
        title="tags",
        because=lambda tag: f"tagged {tag}",
    ),
    Condition(
        key="host_reachable",
        field="host_reachable",
        reads="host_reachable",
        subject=Subject.INSTANCE,
        kind=Flag(usual=True),
        meaning="Whether the instance's host is reachable.",
        example=False,
        title="host reachable",
        because=lambda reachable: f"the host is {'' if reachable else 'un'}reachable",
    ),
    Condition(
        key="power_state",
        field="power_state",
        reads="power_state",
        subject=Subject.INSTANCE,
        kind=Word(POWER_STATES, usual="running"),
        meaning="The guest's state as the hypervisor last reported it, also while its host does not respond. In the "
        "foreseen state: the one that belongs to its vm_state.",
        example=["crashed"],
        title="guest",
        because=lambda power_state: "no guest process runs" if power_state == "none" else f"the guest is {power_state}",
        assumed=lambda vm_state: power_in(vm_state, ()),
        assumption="A hypervisor reports what belongs to the vm_state (`power_state`); in error, that no guest runs.",
    ),
    Condition(
        key="launched",
        field="launched",
        reads="launched",
        subject=Subject.INSTANCE,
        kind=Flag(usual=True),
        meaning="Whether the instance's guest has ever run.",
        example=True,
        title="launched",
        because=lambda launched: "it has run before" if launched else "it has never run",
    ),
    Condition(
        key="hard",
        field="hard",
        reads="hard",
        subject=Subject.REQUEST,
        kind=Flag(usual=False),
        meaning="Whether the hard variant of the operation is requested.",
        example=True,
        title="hard",
        because=lambda hard: f"the {'hard' if hard else 'soft'} variant is requested",
    ),
    *(
        condition
        for field, what, example in (
            ("vcpus", "number of vCPUs", 8),
            ("memory_mib", "memory in MiB", 8192),
            ("root_gib", "size of the root disk in GiB", 100),
        )
        for condition in _size(field, what, example)
    ),
    *(
        Condition(
            key=f"{reads}s",
            field=f"{reads}s",
            reads=reads,
            subject=Subject.PARAMETERS,
            kind=Name(unnamed="none"),
            meaning=f"The name of the {meaning} `x-*` stands for every name that begins with `x-`.",
            example=[example],
            title=title,
            because=because,
            assumed=lambda _: "",
            assumption=f"No request names what a rule names (`{reads}s`).",
        )
        for reads, title, example, meaning, because in (
            ("target_host", "to host", "rack1-*", _TARGET, lambda host: f"to {host or 'a host that no rule names'}"),
            ("image", "image", "golden-*", _IMAGE, lambda name: f"with {name or 'an image that no rule names'}"),
        )
    ),
    Condition(
        key="failures_min",
        field="failures_min",
        reads="failures",
        subject=Subject.INSTANCE,
        kind=AtLeast(Takes.COUNT),
        meaning="Holds if the operation has failed on the instance at least so often since it last succeeded there. "
        "In the foreseen state, everything outstanding has succeeded.",
        example=3,
        title="failed at least",
        because=lambda failures: f"after {failures} failures of it",
        assumed=lambda _: 0,
        assumption="No operation has failed before (`failures_min`).",
    ),
    *(
        Condition(
            key=f"age_{end}",
            field=f"age_ms_{end}",
            reads="age_ms",
            subject=Subject.TIME,
            kind=kind,
            meaning=f"Holds if the instance was created at {bound} this time ago. For a queued request, its age when "
            "it was submitted counts.",
            example=example,
            title=title,
            because=lambda age_ms: f"at an age of {short_time(age_ms)}",
            assumed=lambda _: _EVER_MS,
            assumption="An instance is older than any rule names (`age_min`, `age_max`).",
        )
        for end, kind, bound, example, title in (
            ("min", AtLeast(), "least", "1h", "older than"),
            ("max", AtMost(), "most", "30d", "at most as old as"),
        )
    ),
    Condition(
        key="state_for",
        field="in_state_ms_min",
        reads="in_state_ms",
        subject=Subject.TIME,
        kind=AtLeast(),
        meaning="Holds if the instance has been in its vm_state for at least this time. In a foreseen state that it "
        "has yet to reach, that is no time.",
        example="10m",
        title="in its state for",
        because=lambda in_state_ms: f"after {short_time(in_state_ms)} in its state",
        assumed=lambda _: _EVER_MS,
        assumption="An instance has been in its vm_state for longer than any rule names (`state_for`).",
    ),
    Condition(
        key="silent_for",
        field="silent_ms_min",
        reads="silent_ms",
        subject=Subject.TIME,
        kind=AtLeast(),
        meaning="Holds if the request in flight has made no progress for at least this time.",
        example="15s",
        title="silent for",
        because=lambda silent_ms: f"after {short_time(silent_ms)} of silence",
    ),
)
"""Every condition, in the order of evaluation and of the reference."""

AGES: Final = tuple(condition for condition in CONDITIONS if condition.subject is Subject.TIME)
"""The conditions on ages, which time alone changes."""
CALLER: Final = tuple(condition for condition in CONDITIONS if condition.subject is Subject.CALLER)
"""The conditions on who asks."""

ABOUT: Final = {
    reads: tuple(one for one in CONDITIONS if one.reads == reads)
    for reads in (dict.fromkeys(condition.reads for condition in CONDITIONS))
}
"""The conditions on each field of `View`, in the order of the table."""
CONDITION: Final = {reads: conditions[0] for reads, conditions in ABOUT.items()}
"""The first condition on each field of `View`, by that field."""


Tests = tuple[tuple[Callable[[View], Any], Test], ...]


def compiled_tests(rule: Conditions) -> Tests:
    """Return for each condition of a rule how to get its value from a view, and the test of that value."""
    return tuple(
        (condition.value, condition.kind.test(wanted))
        for condition in CONDITIONS
        if (wanted := condition.of(rule)) is not None
    )
