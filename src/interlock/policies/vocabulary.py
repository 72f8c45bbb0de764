"""The words of the policy language: what may stand in a list, and what a group stands for.

Every list of a rule is read by `Vocabulary.expand`, so that `*`, `@group`, `!word` and Nova's hyphens mean the same
everywhere. Which keys a rule has is not here (see `rules`).
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Final, Generic, NamedTuple, TypeVar

from interlock.core.errors import PolicyError
from interlock.core.operations import CATALOGUE, TASK_STATES, Lane, Operation
from interlock.core.states import NO_TASK, VmState

_SHOWN_MAX: Final = 12
"""How many words an error lists; more would hide what it says."""
WordT = TypeVar("WordT", bound=Hashable)

ROLES: Final = ("reader", "member", "admin")
"""The roles that a caller may have."""
SAME: Final = "same"
"""The group that stands for the operation asked for, or for its phases."""
SOURCES: Final = "sources"
"""The group that stands for the vm_states from which the catalogue lets the operation asked for be performed."""


class Place(NamedTuple):
    """Where something is written."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, message: str, remedy: str | None = None) -> PolicyError:
        return PolicyError(f"{self}: {message}", remedy=remedy)


class UserSet(NamedTuple):
    """A group that a policy has named itself, in `[sets]`."""

    members: tuple[str, ...]
    place: Place


UserSets = Mapping[str, UserSet]


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence that helps: the closest of `choices`, or all of them where they are few."""
    known = list(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    if len(known) <= _SHOWN_MAX:
        return f"Expected one of: {', '.join(known)}."
    return f"There are {len(known)} of them, from {known[0]!r} to {known[-1]!r}; see docs/reference/policies.md."


class Vocabulary(Generic[WordT]):
    """The words that one kind of list may hold."""

    def __init__(
        self, noun: str, words: Mapping[str, WordT], groups: Mapping[str, frozenset[WordT]] | None = None
    ) -> None:
        self.noun = noun
        self.words = words
        self.groups = groups or {}
        self.everything = frozenset(words.values())

    def with_group(self, name: str, members: frozenset[WordT]) -> Vocabulary[WordT]:
        return Vocabulary(self.noun, self.words, {**self.groups, name: members})

    def expand(self, raw: Any, key: str, place: Place, sets: UserSets) -> frozenset[WordT]:
        """The words that a list stands for: never empty.

        Raises:
            PolicyError: it is no list of words, a word is unknown, or nothing is left.
        """
        items = listed(raw, key, place)
        found = frozenset[WordT]().union(
            *(self._item(item, place, sets, ()) for item in items if not item.startswith("!"))
        )
        for item in items:
            if item.startswith("!"):
                found -= self._item(item[1:], place, sets, ())
        if not found:
            raise place.error(f"{key} names no {self.noun} at all.", "Leave the key out if any will do.")
        return found

    def _item(self, item: str, place: Place, sets: UserSets, inside: tuple[str, ...]) -> frozenset[WordT]:
        if item == "*":
            return self.everything
        if item.startswith("@"):
            return self._group(item[1:].replace("-", "_"), place, sets, inside)
        word = item.replace("-", "_")
        if word not in self.words:
            raise place.error(f"{item!r} is no {self.noun}.", nearest(word, self.words))
        return frozenset({self.words[word]})

    def _group(self, name: str, place: Place, sets: UserSets, inside: tuple[str, ...]) -> frozenset[WordT]:
        if name in self.groups:
            return self.groups[name]
        if name not in sets:
            raise place.error(f"There is no group @{name} of {self.noun}s.", nearest(name, (*self.groups, *sets)))
        if name in inside:
            raise sets[name].place.error(f"The set @{name} contains itself.")
        members = sets[name].members
        return frozenset[WordT]().union(
            *(self._item(member, sets[name].place, sets, (*inside, name)) for member in members)
        )


def listed(raw: Any, key: str, place: Place) -> tuple[str, ...]:
    """A list of strings; `"*"` alone may stand without brackets."""
    if raw == "*":
        return ("*",)
    if not isinstance(raw, list) or not all(isinstance(item, str) for item in raw):
        raise place.error(f'{key} must be a list of strings, such as ["stop"], or "*".')
    if not raw:
        raise place.error(f"{key} is an empty list, which nothing matches.", "Leave the key out if any will do.")
    return tuple(raw)


def _of_lane(lane: Lane) -> frozenset[Operation]:
    return frozenset(operation for operation, entry in CATALOGUE.items() if entry.lane is lane)


def phases_of(operation: Operation) -> frozenset[str]:
    """The task states of a state change; none for any other operation."""
    entry = CATALOGUE[operation]
    return frozenset(entry.phases + entry.hard_phases) if entry.lane is Lane.STATE else frozenset()


OPERATIONS: Final = Vocabulary(
    "operation",
    {operation.value: operation for operation in Operation},
    {lane.value: _of_lane(lane) for lane in Lane},
)
VM_STATES: Final = Vocabulary(
    "vm_state",
    # `soft-delete` is what Nova calls it.
    {**{state.value: state for state in VmState}, "soft_delete": VmState.SOFT_DELETED},
)
TASKS: Final = Vocabulary(
    "task_state",
    {state: state for state in (NO_TASK, *TASK_STATES)},
    {operation.value: phases_of(operation) for operation in Operation if phases_of(operation)},
)
CALLER_ROLES: Final = Vocabulary("role", {role: role for role in ROLES})

RESERVED_GROUPS: Final = frozenset({SAME, SOURCES, *OPERATIONS.groups, *TASKS.groups})
"""Names that a policy's own sets may not take."""
KNOWN_WORDS: Final = frozenset({*OPERATIONS.words, *VM_STATES.words, *TASKS.words, *ROLES})
"""Everything that a member of a set may be."""
