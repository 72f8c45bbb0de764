"""Source locations in a policy file, errors at them, and the wording of values in errors."""

from __future__ import annotations

import datetime as dt
import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from interlock.core.errors import PolicyError
from interlock.policies.language.toml_positions import Path, Position, Positions

_LISTED_MAX: Final = 12
"""How many words an error lists."""
_SHOWN_LENGTH: Final = 80
_SHOWN_BITS: Final = 128


class Place(msgspec.Struct, frozen=True):
    """A location in a file. Its position is computed on demand."""

    file: str
    positions: Positions
    path: Path = ()
    is_key: bool = False

    def at(self, *path: str | int) -> Place:
        """Return the location of a key's value, or of a list item, inside this one."""
        return Place(self.file, self.positions, (*self.path, *path))

    @property
    def key(self) -> Place:
        """The location of the key or header instead of its value."""
        return Place(self.file, self.positions, self.path, is_key=True)

    @property
    def position(self) -> Position:
        return self.positions.of_key(self.path) if self.is_key else self.positions.of_value(self.path)

    def __str__(self) -> str:
        position = self.position
        return f"{self.file}:{position.line}:{position.column}"

    def error(self, message: str, remedy: str | None = None) -> PolicyError:
        return PolicyError(f"{self}: {message}", remedy=remedy)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a hint: the closest of `choices`, or all of them if they are few."""
    known = list(choices)
    plain = unicodedata.normalize("NFKC", word[:_SHOWN_LENGTH])
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?{_foreign(word, ' ')}"
    if not known:
        return "None are defined."
    if len(known) <= _LISTED_MAX:
        return f"Expected one of: {', '.join(known)}."
    return f"There are {len(known)} of them, from {known[0]!r} to {known[-1]!r}; see docs/reference/policy-language.md."


def foreign_letters(word: str) -> str | None:
    """Return a sentence that names the first character that is not ASCII, or None."""
    return _foreign(word, "") or None


def _foreign(word: str, before: str) -> str:
    for character in word:
        if ord(character) > 127:  # noqa: PLR2004 - the end of ASCII
            name = unicodedata.name(character, f"U+{ord(character):04X}")
            return f"{before}The {shown(character)} in it is {name}."
    return ""


def shown(value: Any) -> str:
    """Format a value for an error, shortened."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value) if len(value) <= _SHOWN_LENGTH else f"{value[:_SHOWN_LENGTH]!r}…"
        case int():
            return str(value) if value.bit_length() <= _SHOWN_BITS else "a number of very many digits"
        case list():
            return "a list"
        case dict():
            return "a table"
        case dt.date() | dt.time():
            return f"the date or time {value}"
        case _:
            return str(value)


def is_text(value: Any, length_max: int) -> bool:
    """Return whether it is a string of 1 to `length_max` characters without control characters."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= length_max
        and not any(unicodedata.category(character) == "Cc" and character not in "\n\t" for character in value)
    )
