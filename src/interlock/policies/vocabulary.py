"""The words of the policy language: what may stand in a list, and what a group stands for.

Every list of a rule is read by `Vocabulary.expand`, so that `*`, `@group`, `!word`, a policy's own names and Nova's
hyphens mean the same everywhere. Which keys a rule has is not here (see `rules`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Final, Generic, NamedTuple, TypeVar

from interlock.core.operations import CATALOGUE, TASK_STATES, Lane, Operation
from interlock.core.states import NO_TASK, VmState
from interlock.policies.places import Place, nearest, shown

__all__ = ["Place", "nearest"]

WordT = TypeVar("WordT", bound=Hashable)

ROLES: Final = ("reader", "member", "admin")
"""The roles that a caller may have."""
SAME: Final = "same"
"""The group that stands for the operation asked for, or for its phases."""
SOURCES: Final = "sources"
"""The group that stands for the vm_states from which the catalogue lets the operation asked for be performed."""
NOTHING: Final = "none"
"""Stands alone in a list of kinds, for none of them."""


class UserSet(NamedTuple):
    """A group that a policy has named itself, in `[sets]`."""

    members: tuple[str, ...]
    """Each once, in the order written."""
    place: Place
    at: tuple[int, ...] = ()
    """The places of the members in the list."""

    def place_of(self, number: int) -> Place:
        return self.place.at(self.at[number]) if self.at else self.place


class Dictionary:
    """What a policy has named itself: groups of words, and other words for them."""

    def __init__(self, sets: Mapping[str, UserSet], names: Mapping[str, tuple[str, ...]]) -> None:
        self.sets = sets
        self.meanings: dict[str, tuple[str, ...]] = {}
        """What each name stands for: operations, task states, and hard variants such as `reboot_hard`."""
        for word, called in names.items():
            for name in called:
                self.meanings[plain(name)] = (*self.meanings.get(plain(name), ()), word)
        self.variants = frozenset(word for word in names if word in HARD_VARIANTS)
        self._found: dict[tuple[str, str], frozenset[Any]] = {}
        self._shared: dict[frozenset[Any], frozenset[Any]] = {}

    def shared(self, words: frozenset[WordT]) -> frozenset[WordT]:
        """The same words, kept once: the rules of a large policy say few different things."""
        return self._shared.setdefault(words, words)

    def members(self, vocabulary: Vocabulary[WordT], name: str, inside: tuple[str, ...]) -> frozenset[WordT]:
        """What a set stands for, looked up once for every kind of list. Raises `PolicyError`."""
        key = (vocabulary.noun, name)
        if key not in self._found:
            if name in inside:
                raise self.sets[name].place.key.error(f"The set @{name} contains itself.")
            own = self.sets[name]
            self._found[key] = frozenset[WordT]().union(
                *(
                    vocabulary.item(member, own.place_of(number), self, {}, (*inside, name))
                    for number, member in enumerate(own.members)
                )
            )
        return self._found[key]


def plain(word: str) -> str:
    """A word in Interlock's spelling. Nova writes some of its own with hyphens."""
    return word.replace("-", "_")


class Vocabulary(Generic[WordT]):
    """The words that one kind of list may hold."""

    def __init__(
        self,
        noun: str,
        words: Mapping[str, WordT],
        groups: Mapping[str, frozenset[WordT]] | None = None,
        everything: frozenset[WordT] | None = None,
    ) -> None:
        self.noun = noun
        self.words = words
        self.groups = groups or {}
        self.everything = frozenset(words.values()) if everything is None else everything
        """What `*` stands for."""

    def expand(
        self,
        raw: Any,
        key: str,
        place: Place,
        dictionary: Dictionary,
        groups: Mapping[str, frozenset[WordT]] | None = None,
    ) -> frozenset[WordT]:
        """The words that a list stands for: never empty. `groups` are known besides the vocabulary's own.

        Raises:
            PolicyError: it is no list of words, a word is unknown, or nothing is left.
        """
        items = listed(raw, key, place)
        more = groups or {}
        found: set[WordT] = set()
        for number, item in enumerate(items):
            if not item.startswith("!"):
                found |= self.item(item, place.at(number), dictionary, more, ())
        for number, item in enumerate(items):
            if item.startswith("!"):
                found -= self.item(item[1:], place.at(number), dictionary, more, ())
        if not found:
            raise place.error(f"{key} names no {self.noun} at all.", "Leave the key out if any will do.")
        return dictionary.shared(frozenset(found))

    def item(
        self,
        item: str,
        place: Place,
        dictionary: Dictionary,
        groups: Mapping[str, frozenset[WordT]],
        inside: tuple[str, ...],
    ) -> frozenset[WordT]:
        """What one item of a list stands for. Raises `PolicyError`."""
        if item == "*":
            return self.everything
        word = plain(item)
        if word.startswith("@"):
            name = word[1:]
            if name in groups:
                return groups[name]
            if name in self.groups:
                return self.groups[name]
            if name in dictionary.sets:
                return dictionary.members(self, name, inside)
            known = (*groups, *self.groups, *dictionary.sets)
            raise place.error(f"There is no group {shown(f'@{name}')[1:-1]} of {self.noun}s.", nearest(name, known))
        if word not in self.words:
            word = self._meant(item, place, dictionary)
        return frozenset({self.words[word]})

    def _meant(self, item: str, place: Place, dictionary: Dictionary) -> str:
        """The word of the language for which the policy has another, which is `item`."""
        meanings = dictionary.meanings.get(plain(item), ())
        meant = [word for word in meanings if word in self.words]
        if len(meant) > 1:
            raise place.error(f"{shown(item)} may be {' or '.join(meant)}.", "Write the one that is meant.")
        if self.noun == OPERATIONS.noun:
            variants = [HARD_VARIANTS[word] for word in meanings if word in HARD_VARIANTS]
            halves = [word for word in meant if f"{word}_hard" in dictionary.variants]
            if variants or halves:
                operation = (*variants, *halves)[0]
                hard = "true" if variants else "false"
                raise place.error(
                    f"{shown(item)} is not all of {operation!r}.", f"Write {operation!r}, and hard = {hard}."
                )
        if not meant:
            known = (*self.words, *(name for name, of in dictionary.meanings.items() if set(of) & set(self.words)))
            raise place.error(f"{shown(item)} is no {self.noun}.", nearest(item, known))
        return meant[0]


def listed(raw: Any, key: str, place: Place) -> tuple[str, ...]:
    """A list of strings; `"*"` alone may stand without brackets."""
    if raw == "*":
        return ("*",)
    if not isinstance(raw, list):
        raise place.error(f'{key} must be a list of strings, such as ["stop"], or "*".')
    for number, item in enumerate(raw):
        if not isinstance(item, str):
            raise place.at(number).error(f'{key} must be a list of strings, such as ["stop"], or "*".')
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
    everything=frozenset(VmState) - {VmState.DELETED},
)
TASKS: Final = Vocabulary(
    "task_state",
    {state: state for state in (NO_TASK, *TASK_STATES)},
    {operation.value: phases_of(operation) for operation in Operation if phases_of(operation)},
)
CALLER_ROLES: Final = Vocabulary("role", {role: role for role in ROLES})

HARD_VARIANTS: Final[Mapping[str, str]] = {
    f"{operation.value}_hard": operation.value for operation in Operation if CATALOGUE[operation].hard_phases
}
"""What the hard variant of an operation is called in `[names]`."""
RESERVED_GROUPS: Final = frozenset({SAME, SOURCES, *OPERATIONS.groups, *TASKS.groups})
"""Names that a policy's own sets may not take."""
KNOWN_WORDS: Final = frozenset({*OPERATIONS.words, *VM_STATES.words, *TASKS.words, *ROLES})
"""Everything that a member of a set may be."""
