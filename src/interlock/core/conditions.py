"""The conditions of a rule, each described once: key, value, test, values to analyse, and words.

The gate compiles the tests; the analyses of policies, the parser, the JSON Schema, the API, explanations and the
documentation read the same descriptions. A condition is a field of `Conditions` and an entry of `CONDITIONS`. The value
that it tests is a field of `views.View`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable
from enum import Enum
from operator import attrgetter, not_
from typing import Any, Final

import msgspec

from interlock.core.durations import format_seconds, short_time
from interlock.core.operations import BIT, Operation
from interlock.core.views import View

ROLES: Final = ("reader", "member", "admin")
"""The roles of callers."""

Test = Callable[[Any], object]
"""Whether the value of a view fulfils a condition: the result is true or false, not always a bool."""


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """The conditions of a rule. One that is None always holds."""

    outstanding: frozenset[Operation] | None = None
    """Holds if any of these operations is queued or in flight; empty: if none is."""
    held: frozenset[Operation] | None = None
    """Holds if a request with any of these operations is held; empty: if none is."""
    roles: frozenset[str] | None = None
    requested_by: frozenset[str] | None = None
    """Names of callers; one that ends with `*` stands for all that begin so."""
    locked: bool | None = None
    blocked: bool | None = None
    """Whether the instance's blocked operations include the operation."""
    tags: frozenset[str] | None = None
    """Holds if the instance has any of these tags."""
    host_reachable: bool | None = None
    launched: bool | None = None
    """Whether the instance's guest has ever run."""
    hard: bool | None = None
    """Whether the request is for the hard variant of its operation."""
    silent_ms_min: int | None = None
    """Holds if the request in flight has made no progress for at least this time."""


class Subject(Enum):
    """What the value that a condition tests belongs to."""

    CALLER = "caller"
    """A field of requests and submissions with the same name as the view's."""
    REQUEST = "request"
    INSTANCE = "instance"
    QUEUE = "queue"
    TIME = "time"


class Takes(Enum):
    """The form of a condition's value in a policy file."""

    FLAG = "true, false"
    TIME = "time"
    KINDS = "operations or none"
    WORDS = "words"
    """A list of words that are known."""
    TEXTS = "texts"
    """A list of words that are not known before, each of which matches `Kind.item`."""


class Kind:
    """What is common to conditions on values of one type."""

    takes: Takes
    item: re.Pattern[str]
    """For `Takes.TEXTS`: the pattern of each item."""
    expected: str
    """For `Takes.TEXTS`: what the items are, for an error."""

    def test(self, wanted: Any) -> Test:
        """Return the test of a view's value."""
        raise NotImplementedError

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:  # noqa: ARG002 (see the subclasses)
        """Return a function that maps values to equal ones if these conditions do not distinguish them.

        None: the value itself.
        """
        return None

    def wanted(self, wanted: Any) -> str:
        """Describe the condition's value."""
        raise NotImplementedError

    def found(self, value: Any) -> str:
        """Describe the view's value."""
        raise NotImplementedError


class Choice(Kind):
    """The view has one value, of which a condition accepts some."""

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        """Return one value of each class that these conditions do not distinguish, the most ordinary ones first."""
        raise NotImplementedError


class Members(Kind):
    """The view has a set, and a condition wants any of some members, or none at all if it names none."""

    def members(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        """Return the members that these conditions distinguish."""
        raise NotImplementedError

    def with_members(self, value: Any, members: Iterable[Any]) -> Any:
        """Return the view's value with some members more."""
        raise NotImplementedError


class Flag(Choice):
    """True or false."""

    takes = Takes.FLAG

    def __init__(self, *, usual: bool) -> None:
        self._usual = usual

    def test(self, wanted: Any) -> Test:
        return bool if wanted else not_

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:  # noqa: ARG002 (both are always possible)
        return (self._usual, not self._usual)

    def wanted(self, wanted: Any) -> str:
        return str(wanted).lower()

    def found(self, value: Any) -> str:
        return self.wanted(value)


class Word(Choice):
    """One of several known words, of which a condition accepts some."""

    takes = Takes.WORDS

    def __init__(self, words: tuple[str, ...], *, usual: str) -> None:
        self.words = words
        self._usual = usual

    def test(self, wanted: Any) -> Test:
        accepted: frozenset[str] = wanted
        return accepted.__contains__

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:  # noqa: ARG002 (every word is always possible)
        return (self._usual, *(word for word in reversed(self.words) if word != self._usual))

    def wanted(self, wanted: Any) -> str:
        return one_of(wanted)

    def found(self, value: Any) -> str:
        return str(value)


class Name(Choice):
    """A name, of which a condition accepts some, or all that begin in some way: `alice`, `ci-*`, `*`.

    A name in a condition stands for itself; one that ends with `*` for all that begin so and match no longer one. No
    condition distinguishes more, so that the names in the conditions, and one that is in none, are all that there is.
    """

    takes = Takes.TEXTS
    item = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,62}\*?|\*)")
    expected = "names: letters, digits, '.', '_' and '-', and '*' only at the end"

    def test(self, wanted: Any) -> Test:
        named: frozenset[str] = wanted
        beginnings = tuple(name[:-1] for name in named if name.endswith("*"))
        if not beginnings:
            return named.__contains__
        return lambda name: name in named or name.startswith(beginnings)

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        return ("", *sorted(frozenset[str]().union(*wanted)))

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:
        named = frozenset[str]().union(*wanted)
        beginnings = sorted((name[:-1] for name in named if name.endswith("*")), key=len, reverse=True)

        def class_of(name: str) -> str:
            if name in named:
                return name
            return next((f"{beginning}*" for beginning in beginnings if name.startswith(beginning)), "")

        return class_of

    def wanted(self, wanted: Any) -> str:
        return one_of(wanted)

    def found(self, value: Any) -> str:
        return str(value) or "another name"


class AtLeast(Choice):
    """A time in milliseconds, which a condition bounds from below."""

    takes = Takes.TIME

    def test(self, wanted: Any) -> Test:
        least: int = wanted
        return least.__le__

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(sorted({0, *wanted}))

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:
        bounds = self.values(wanted)
        return lambda value: bisect_right(bounds, value)

    def wanted(self, wanted: Any) -> str:
        return format_seconds(wanted)

    def found(self, value: Any) -> str:
        return self.wanted(value)


class AnyOperation(Members):
    """Operations, as a bit mask in the view."""

    takes = Takes.KINDS

    def test(self, wanted: Any) -> Test:
        mask = sum(BIT[operation] for operation in wanted)
        return mask.__and__ if mask else not_

    def members(self, wanted: Iterable[Any]) -> tuple[Any, ...]:  # noqa: ARG002 (every operation is always possible)
        return tuple(Operation)

    def with_members(self, value: Any, members: Iterable[Any]) -> Any:
        for member in members:
            value |= BIT[member]
        return value

    def wanted(self, wanted: Any) -> str:
        return one_of(operation.value for operation in wanted) if wanted else "nothing"

    def found(self, value: Any) -> str:
        return ", ".join(operation.value for operation in Operation if value & BIT[operation]) or "nothing"


class AnyText(Members):
    """Texts, as a tuple in the view."""

    takes = Takes.TEXTS

    def __init__(self, item: str, expected: str) -> None:
        self.item = re.compile(item)
        self.expected = expected

    def test(self, wanted: Any) -> Test:
        named: frozenset[str] = wanted
        return lambda texts: not named.isdisjoint(texts)

    def members(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(sorted(frozenset[str]().union(*wanted)))

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:
        named = frozenset[str]().union(*wanted)
        return lambda texts: named.intersection(texts) if texts else texts

    def with_members(self, value: Any, members: Iterable[Any]) -> Any:
        return tuple(sorted({*value, *members}))

    def wanted(self, wanted: Any) -> str:
        return one_of(wanted)

    def found(self, value: Any) -> str:
        return ", ".join(value) or "none"


def one_of(words: Iterable[str]) -> str:
    shown = sorted(words)
    return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One condition that a rule may have."""

    key: str
    """Its key in a policy file."""
    field: str
    """The field of `Conditions`."""
    reads: str
    """The field of `View` with the value that it tests."""
    subject: Subject
    kind: Choice | Members
    meaning: str
    """For the reference of the policy language."""
    example: Any
    title: str
    """What is before its value in a list of conditions, such as `role member`; for a flag, all of it."""
    option: str = ""
    """The help of the option that sets it, for a condition on the caller."""
    because: Callable[[Any], str]
    """Describe what is unusual about a value of the view, or of a member, as in `as the instance is locked`."""

    @property
    def wire(self) -> str:
        """Return its field in the API, where times are in seconds."""
        return self.field.replace("_ms_", "_s_")

    @property
    def value(self) -> Callable[[View], Any]:
        """Return the function that gets its value from a view."""
        return attrgetter(self.reads)

    @property
    def usual(self) -> Any:
        """Return the value of a plain submission."""
        return _USUAL[self.reads]

    def of(self, rule: Conditions) -> Any:
        """Return a rule's value; None if it has no such condition."""
        return getattr(rule, self.field)

    def wanted(self, rules: Iterable[Conditions]) -> list[Any]:
        """Return the values of the rules that have this condition."""
        return [wanted for rule in rules if (wanted := getattr(rule, self.field)) is not None]


_USUAL: Final = {
    field.name: field.default for field in msgspec.structs.fields(View) if field.default is not msgspec.NODEFAULT
}
_TEXT: Final = r"[^\x00-\x08\x0b-\x1f\x7f-\x9f]{1,1000}"

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
        kind=Word(ROLES, usual="member"),
        meaning="The caller's role.",
        example=["member"],
        title="role",
        option="Role of the caller.",
        because=lambda role: f"by {'an' if role == 'admin' else 'a'} {role}",
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
        kind=AnyText(_TEXT, "tags, none of them empty"),
        meaning="Holds if the instance has any of these tags.",
        example=["build"],
        title="tag",
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

CALLER: Final = tuple(condition for condition in CONDITIONS if condition.subject is Subject.CALLER)
"""The conditions on who asks."""

CONDITION: Final = {condition.reads: condition for condition in CONDITIONS}
"""The conditions by the field of `View` that they test."""


Tests = tuple[tuple[Callable[[View], Any], Test], ...]


def compiled_tests(rule: Conditions) -> Tests:
    """Return for each condition of a rule how to get its value from a view, and the test of that value."""
    return tuple(
        (condition.value, condition.kind.test(wanted))
        for condition in CONDITIONS
        if (wanted := condition.of(rule)) is not None
    )
