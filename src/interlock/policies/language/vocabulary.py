"""Words and groups of the policy language, and the expansion of lists.

`Vocabulary.expand` reads every list of a rule: `*`, `@group`, `!word`, custom names, and Nova's hyphens.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from interlock.core.condition_kinds import Word
from interlock.core.conditions import CONDITIONS
from interlock.core.operations import CATALOGUE, TASK_STATES, Lane, Operation
from interlock.core.states import NO_TASK, VmState
from interlock.policies.language.schema import RULE_KEYS
from interlock.policies.language.source_location import Place, nearest, shown

__all__ = ["Place", "nearest"]

WordT = TypeVar("WordT", bound=Hashable)

SAME: Final = "same"
"""The group of the requested operation, or of its phases."""
SOURCES: Final = "sources"
"""The group of vm_states from which the requested operation can be performed."""
NOTHING: Final = "none"
"""Stands alone in a list of operations and means none."""
_EXAMPLES: Final = {key.name: json.dumps(key.example) for key in RULE_KEYS if isinstance(key.example, list)}
_EXAMPLE: Final = '["stop"]'
"""For the members of a set."""


class UserSet(NamedTuple):
    """A group defined in `[sets]`."""

    members: tuple[str, ...]
    """Each once, in the order written."""
    place: Place
    at: tuple[int, ...] = ()
    """The indexes of the members in the list."""

    def place_of(self, number: int) -> Place:
        return self.place.at(self.at[number]) if self.at else self.place


class Dictionary:
    """The sets and custom names of a policy."""

    def __init__(self, sets: Mapping[str, UserSet], names: Mapping[str, tuple[str, ...]]) -> None:
        self.sets = sets
        self.meanings: dict[str, tuple[str, ...]] = {}
        """The words of each custom name: operations, task states, and hard variants such as `reboot_hard`."""
        for word, called in names.items():
            for name in called:
                self.meanings[plain(name)] = (*self.meanings.get(plain(name), ()), word)
        self.variants = frozenset(word for word in names if word in HARD_VARIANTS)
        self._found: dict[tuple[str, str], frozenset[Any]] = {}
        self._shared: dict[frozenset[Any], frozenset[Any]] = {}

    def shared(self, words: frozenset[WordT]) -> frozenset[WordT]:
        """Deduplicate equal sets to save memory."""
        return self._shared.setdefault(words, words)

    def variant(self, name: str) -> tuple[str, bool] | None:
        """Return the operation and whether it is hard, if a name is of one variant only; else None."""
        meanings = self.meanings.get(plain(name), ())
        if name in OPERATIONS.words or len(meanings) != 1:
            return None
        word = meanings[0]
        if word in HARD_VARIANTS:
            return HARD_VARIANTS[word], True
        return (word, False) if f"{word}_hard" in self.variants else None

    def members(self, vocabulary: Vocabulary[WordT], name: str, inside: tuple[str, ...]) -> frozenset[WordT]:
        """Return the words of a set, cached for each kind of list. Raises `PolicyError`."""
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
    """Return a word with underscores; Nova writes some with hyphens."""
    return word.replace("-", "_")


class Vocabulary(Generic[WordT]):
    """The words that are valid in one kind of list."""

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
        """The meaning of `*`."""

    def expand(
        self,
        raw: Any,
        key: str,
        place: Place,
        dictionary: Dictionary,
        groups: Mapping[str, frozenset[WordT]] | None = None,
    ) -> frozenset[WordT]:
        """Return the words of a list, never empty. `groups` are valid besides the vocabulary's own.

        Raises:
            PolicyError: not a list of words, an unknown word, or an empty result.
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
            raise place.error(f"{key} matches no {self.noun}.", "Leave the key out to match any.")
        return dictionary.shared(frozenset(found))

    def item(
        self,
        item: str,
        place: Place,
        dictionary: Dictionary,
        groups: Mapping[str, frozenset[WordT]],
        inside: tuple[str, ...],
    ) -> frozenset[WordT]:
        """Return the words of one item of a list. Raises `PolicyError`."""
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
            raise place.error(f"Unknown group {shown(f'@{name}')[1:-1]} of {self.noun}s.", nearest(name, known))
        if word not in self.words:
            word = self._meant(item, place, dictionary)
        return frozenset({self.words[word]})

    def _meant(self, item: str, place: Place, dictionary: Dictionary) -> str:
        """Return the word of the language that a custom name means. Raises `PolicyError`."""
        meanings = dictionary.meanings.get(plain(item), ())
        meant = [word for word in meanings if word in self.words]
        if len(meant) > 1:
            raise place.error(f"Ambiguous name {shown(item)}: {' or '.join(meant)}.", "Write the one that is meant.")
        if self.noun == OPERATIONS.noun:
            variants = [HARD_VARIANTS[word] for word in meanings if word in HARD_VARIANTS]
            halves = [word for word in meant if f"{word}_hard" in dictionary.variants]
            if variants or halves:
                operation = (*variants, *halves)[0]
                hard = "true" if variants else "false"
                raise place.error(
                    f"{shown(item)} is only one variant of {operation!r}.", f"Write {operation!r}, and hard = {hard}."
                )
        if not meant:
            known = (*self.words, *(name for name, of in dictionary.meanings.items() if set(of) & set(self.words)))
            raise place.error(f"Unknown {self.noun} {shown(item)}.", nearest(item, known))
        return meant[0]


def listed(raw: Any, key: str, place: Place) -> tuple[str, ...]:
    """Return a list of strings; `"*"` needs no brackets. Raises `PolicyError`."""
    if raw == "*":
        return ("*",)
    expected = f'{key} must be a list of strings, such as {_EXAMPLES.get(key, _EXAMPLE)}, or "*".'
    if not isinstance(raw, list):
        raise place.error(expected)
    for number, item in enumerate(raw):
        if not isinstance(item, str):
            raise place.at(number).error(expected)
    if not raw:
        raise place.error(f"{key} is an empty list, which matches nothing.", "Leave the key out to match any.")
    return tuple(raw)


def _of_lane(lane: Lane) -> frozenset[Operation]:
    return frozenset(operation for operation, entry in CATALOGUE.items() if entry.lane is lane)


def phases_of(operation: Operation) -> frozenset[str]:
    """Return the task states of a state change; empty for other operations."""
    entry = CATALOGUE[operation]
    return frozenset(entry.phases + entry.hard_phases) if entry.lane is Lane.STATE else frozenset()


OPERATIONS: Final = Vocabulary(
    "operation",
    {operation.value: operation for operation in Operation},
    {
        **{lane.value: _of_lane(lane) for lane in Lane},
        "details": frozenset(operation for operation, entry in CATALOGUE.items() if entry.details),
    },
)
VM_STATES: Final = Vocabulary(
    "vm_state",
    # Nova's name is `soft-delete`.
    {**{state.value: state for state in VmState}, "soft_delete": VmState.SOFT_DELETED},
    everything=frozenset(VmState) - {VmState.DELETED},
)
TASKS: Final = Vocabulary(
    "task_state",
    {state: state for state in (NO_TASK, *TASK_STATES)},
    {operation.value: phases_of(operation) for operation in Operation if phases_of(operation)},
)
CONDITION_WORDS: Final = {
    condition.key: Vocabulary(condition.reads, {word: word for word in condition.kind.words})
    for condition in CONDITIONS
    if isinstance(condition.kind, Word)
}
"""The words of conditions on one of several words, by key."""

HARD_VARIANTS: Final[Mapping[str, str]] = {
    f"{operation.value}_hard": operation.value for operation in Operation if CATALOGUE[operation].hard_phases
}
"""The keys of hard variants in `[names]`."""
RESERVED_GROUPS: Final = frozenset({SAME, SOURCES, *OPERATIONS.groups, *TASKS.groups})
"""Names that sets may not have."""
KNOWN_WORDS: Final = frozenset({*OPERATIONS.words, *VM_STATES.words, *TASKS.words}).union(
    *(words.words for words in CONDITION_WORDS.values())
)
"""The valid members of sets."""


def split_variants(
    listing: Sequence[Any], place: Place, dictionary: Dictionary
) -> tuple[frozenset[Operation], frozenset[Operation], frozenset[Operation]] | None:
    """Split a list of operations into those meant in both variants, in the hard one only, and in the soft one only.

    None if no item is a name of one variant. Raises `PolicyError`.
    """
    named = {item: dictionary.variant(item) for item in listing if isinstance(item, str)}
    if not any(named.values()):
        return None
    others = [item for item in listing if not named.get(item)]
    whole = OPERATIONS.expand(others, "operations", place, dictionary) if others else frozenset[Operation]()
    hard, soft = (
        frozenset(OPERATIONS.words[one[0]] for one in named.values() if one is not None and one[1] is which) - whole
        for which in (True, False)
    )
    return whole | (hard & soft), hard - soft, soft - hard
