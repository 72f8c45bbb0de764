"""What a policy names itself: groups of words in `[sets]`, and what its own world calls things in `[names]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from interlock.policies.language import NAME, NAMES_MAX, SET_NAME, SETS_MAX
from interlock.policies.places import Place, foreign_letters, nearest, shown
from interlock.policies.vocabulary import (
    HARD_VARIANTS,
    KNOWN_WORDS,
    OPERATIONS,
    RESERVED_GROUPS,
    TASKS,
    UserSet,
    listed,
    plain,
)

NAMEABLE: Final = tuple(
    dict.fromkeys((*OPERATIONS.words, *HARD_VARIANTS, *(word for word in TASKS.words if word != "none")))
)
"""What may be given names."""
_TAKEN: Final = KNOWN_WORDS | HARD_VARIANTS.keys()


def read_names(
    table: Mapping[str, Any], place: Place, base: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """What each word is called: what is extended says so too, where this file does not. Raises `PolicyError`."""
    names = dict(base)
    for key, value in table.items():
        word = plain(key)
        if word not in NAMEABLE:
            raise place.at(key).key.error(
                f"{shown(key)} is no operation, hard variant or task state to name.", nearest(word, NAMEABLE)
            )
        if word != key and word in table:
            raise place.at(key).key.error(f"{word!r} is named twice.", "Write one list of names.")
        names[word] = _names(word, value, place.at(key))
    return names


def _names(word: str, value: Any, place: Place) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not 0 < len(items) <= NAMES_MAX:
        raise place.error(f"{word} must be a name, or a list of 1 to {NAMES_MAX} names.")
    for number, name in enumerate(items):
        here = place if isinstance(value, str) else place.at(number)
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise here.error(
                f"The name {shown(name)} may hold only letters, digits, '_' and '-', and at most 64 of them.",
                foreign_letters(name) if isinstance(name, str) else None,
            )
        if plain(name) in _TAKEN and plain(name) != word:
            raise here.error(f"{shown(name)} is a word of the language already, and not for {word}.")
        if name in items[:number]:
            raise here.error(f"{word} has the name {name!r} twice.")
    return tuple(items)


def read_sets(
    table: Mapping[str, Any], place: Place, base: Mapping[str, UserSet], names: Mapping[str, tuple[str, ...]]
) -> dict[str, UserSet]:
    """The groups of a policy and of what it extends. Raises `PolicyError`."""
    if len(table) > SETS_MAX:
        beyond = list(table)[SETS_MAX]
        raise place.at(beyond).key.error(f"A policy may have at most {SETS_MAX} sets.")
    sets = dict(base)
    for name, raw in table.items():
        here = place.at(name)
        if SET_NAME.fullmatch(name) is None:
            raise here.key.error(
                f"The name of a set may hold only small letters, digits and '_', not {shown(name)}.",
                foreign_letters(name),
            )
        if name in RESERVED_GROUPS:
            raise here.key.error(f"@{name} is a group already.", "Choose another name for the set.")
        at: dict[str, int] = {}
        for number, member in enumerate(listed(raw, f"The set {name}", here)):
            at.setdefault(member, number)
        sets[name] = UserSet(tuple(at), here, () if raw == "*" else tuple(at.values()))
    words = KNOWN_WORDS | {plain(name) for called in names.values() for name in called}
    for name in table:
        for number, member in enumerate(sets[name].members):
            _check_member(member, sets[name].place_of(number), sets, words)
    return sets


def _check_member(member: str, place: Place, sets: Mapping[str, UserSet], words: frozenset[str]) -> None:
    word = plain(member)
    if member.startswith("!"):
        raise place.error("A set cannot leave things out.", "Write !… where the set is used.")
    if word.startswith("@"):
        groups = (*sorted(RESERVED_GROUPS), *sets)
        if word[1:] not in groups:
            raise place.error(f"There is no group {shown(member)[1:-1]}.", nearest(word[1:], groups))
    elif word != "*" and word not in words:
        raise place.error(f"{shown(member)} is no word of the language.", nearest(word, sorted(words)))
