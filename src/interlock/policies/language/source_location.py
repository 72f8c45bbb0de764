"""Source locations in a policy file, errors at them, and the wording of values in errors.

`tomllib` keeps no positions, so the text is scanned a second time, only when a position is needed, and nothing else is
stored. The same scan limits nesting and key length before `tomllib`, whose cost grows faster than linearly with them.
Invalid TOML is left to `tomllib` to reject: the scan stops there.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import msgspec

from interlock.core.errors import PolicyError

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


Path = tuple[str | int, ...]

NESTING_MAX: Final = 32
"""The nesting limit of lists and tables."""
KEY_PARTS_MAX: Final = 16
"""The limit of parts in a dotted key; `tomllib` is quadratic in them."""
TABLES_MAX: Final = 60_000
"""The limit of keys, lists and tables: each costs `tomllib` far more memory than its text."""
SCALAR_LENGTH_MAX: Final = 100
"""The length limit of a number or a date."""

_BLANK: Final = re.compile(r"(?:[ \t\n]++|#[^\n]*+)*+")
_SEPARATORS: Final = re.compile(r"(?:[ \t\n,]++|#[^\n]*+)*+")
_SPACE: Final = re.compile(r"[ \t]*+")
# Atomic groups: before 3.11.5, Python ends a possessive one too early where there is an assertion in it.
_STRING: Final = re.compile(
    r'"""(?>(?:[^"\\]++|\\.|"(?!""))*)"{3,5}'
    r"|'''(?>(?:[^']++|'(?!''))*)'{3,5}"
    r'|"(?:[^"\\\n]++|\\.)*+"'
    r"|'[^'\n]*+'",
    re.DOTALL,
)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]++")
# A date and its time may have a space between them.
_SCALAR: Final = re.compile(r"[^,\]}#\n\[{\"']++")
_NO_STRUCTURE: Final = re.compile(r"[^\[\]{}\"'#]++")
_LONG_SCALAR: Final = re.compile(rf"[^\s,={{}}\[\]]{{{SCALAR_LENGTH_MAX}}}[^\s,={{}}\[\]]")
_COMMENT: Final = re.compile(r"#[^\n]*+")
_CLOSING: Final = {"[": "]", "{": "}"}


class Position(NamedTuple):
    """Line and column, both from 1, the column in characters."""

    line: int
    column: int


class OutOfBounds(Exception):
    """The text exceeds a limit."""

    def __init__(self, message: str, position: Position) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


class _Lost(Exception):
    """The text is not TOML here."""


class Positions:
    """Positions by path, such as `("rule", 2, "operations", 0)`."""

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")

    def of_key(self, path: Path) -> Position:
        """Return the position of the key, header or item at `path`, or of its nearest parent that has one."""
        walk = self._walk_to(path)
        return self._nearest(path, {**walk.values, **walk.keys})

    def of_value(self, path: Path) -> Position:
        """Return the position of the value or item at `path`, or of its nearest parent that has one."""
        walk = self._walk_to(path)
        return self._nearest(path, {**walk.keys, **walk.values})

    def lines_of_items(self, name: str) -> tuple[int, ...]:
        """Return the lines of the tables in the list `name`, in order."""
        walk = _Walk(self._text, lambda path: path[0] == name and len(path) <= 2)  # noqa: PLR2004 - the list, an item
        lines: list[int] = []
        line, counted = 1, 0
        offsets = {**walk.keys, **walk.values}
        for _, offset in sorted((path[1], offset) for path, offset in offsets.items() if isinstance(path[-1], int)):
            line += self._text.count("\n", counted, offset)
            counted = offset
            lines.append(line)
        return tuple(lines)

    def check_bounds(self) -> None:
        """Raise `OutOfBounds` if the text exceeds a limit."""
        beyond = _Walk(self._text, lambda _path: False).beyond
        if beyond is not None:
            raise OutOfBounds(beyond.message, _position(self._text, beyond.offset))

    def _walk_to(self, path: Path) -> _Walk:
        return _Walk(self._text, lambda here: here == path[: len(here)])

    def _nearest(self, path: Path, offsets: dict[Path, int]) -> Position:
        while path and path not in offsets:
            path = path[:-1]
        return _position(self._text, offsets.get(path, 0))


def end_of(text: str) -> Position:
    """Return the position after the last character."""
    return _position(text, len(text))


def _position(text: str, offset: int) -> Position:
    return Position(text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))


class _Beyond(Exception):
    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


class _Container:
    """An open list or inline table."""

    __slots__ = ("closing", "index", "path")

    def __init__(self, closing: str, path: Path) -> None:
        self.closing = closing
        self.path = path
        self.index = -1


class _Walk:
    """One scan of a text, which stores the offsets of the paths for which `follows` is true."""

    def __init__(self, text: str, follows: Callable[[Path], bool]) -> None:
        self._text = text
        self._follows = follows
        self._at = 0
        self._table: Path = ()
        self._tables = 0
        self._arrays: dict[Path, int] = {}
        self.keys: dict[Path, int] = {}
        self.values: dict[Path, int] = {}
        self.beyond: _Beyond | None = None
        try:
            while self._skip(_BLANK) < len(text):
                if text[self._at] == "[":
                    self._header()
                else:
                    self._pair(self._table)
        except (_Lost, IndexError):
            pass
        except _Beyond as beyond:
            self.beyond = beyond

    def _skip(self, pattern: re.Pattern[str]) -> int:
        """Skip what the pattern matches, and return the new offset."""
        found = pattern.match(self._text, self._at)
        if found is None:
            raise _Lost
        self._at = found.end()
        return self._at

    def _header(self) -> None:
        start = self._at
        brackets = 2 if self._text.startswith("[[", start) else 1
        self._at += brackets
        keys = [key for key, _offset in self._keys("]")]
        self._at += brackets
        path: Path = ()
        for key in keys[:-1]:
            path = (*path, key)
            if path in self._arrays:
                path = (*path, self._arrays[path])
        path = (*path, keys[-1])
        if brackets == len("[["):
            self._keep(self.keys, path, start)
            self._arrays[path] = self._arrays.get(path, -1) + 1
            path = (*path, self._arrays[path])
        self._table = path
        self._keep(self.keys, path, start)

    def _pair(self, table: Path) -> None:
        self._value(self._key(table))

    def _key(self, table: Path) -> Path:
        """Read a key and its `=`, and return the path of its value."""
        path = table
        for key, offset in self._keys("="):
            path = (*path, key)
            self._keep(self.keys, path, offset)
        self._at += 1
        return path

    def _keep(self, offsets: dict[Path, int], path: Path, offset: int) -> None:
        if self._follows(path):
            offsets.setdefault(path, offset)

    def _keys(self, end: str) -> list[tuple[str, int]]:
        """Return the parts of a dotted key, up to `end`, with their offsets. Escapes are not decoded."""
        parts: list[tuple[str, int]] = []
        while True:
            start = self._skip(_SPACE)
            quoted = self._text[start] in "\"'"
            self._skip(_STRING if quoted else _BARE_KEY)
            parts.append((self._text[start + quoted : self._at - quoted], start))
            if len(parts) > KEY_PARTS_MAX:
                raise _Beyond(f"A key has more than {KEY_PARTS_MAX} parts.", parts[0][1])
            self._count_table()
            self._skip(_SPACE)
            if self._text[self._at] == end:
                return parts
            if self._text[self._at] != ".":
                raise _Lost
            self._at += 1

    def _value(self, path: Path) -> None:
        """Skip a value, and store the offsets of it and its items."""
        within: list[_Container] = []
        while True:
            self._skip(_SPACE)
            self._keep(self.values, path, self._at)
            opening = self._text[self._at]
            if opening in _CLOSING and self._follows(path):
                self._at += 1
                within.append(_Container(_CLOSING[opening], path))
                self._check_depth(len(within))
            else:
                self._pass_over()
            while within and self._next_in() == within[-1].closing:
                self._at += 1
                within.pop()
            if not within:
                return
            innermost = within[-1]
            if innermost.closing == "]":
                innermost.index += 1
                path = (*innermost.path, innermost.index)
            else:
                path = self._key(innermost.path)

    def _next_in(self) -> str:
        return self._text[self._skip(_SEPARATORS)]

    def _pass_over(self) -> None:
        """Skip a value without storing anything."""
        depth = 0
        while True:
            character = self._text[self._at]
            if character in "\"'":
                self._skip(_STRING)
            elif character in "[{":
                depth += 1
                self._check_depth(depth)
                self._count_table()
                self._at += 1
            elif depth == 0:
                self._skip_scalars(_SCALAR)
            elif character in "]}":
                depth -= 1
                self._at += 1
            elif character == "#":
                self._skip(_COMMENT)
            else:
                self._skip_scalars(_NO_STRUCTURE)
            if depth == 0:
                return

    def _skip_scalars(self, pattern: re.Pattern[str]) -> None:
        start = self._at
        long = _LONG_SCALAR.search(self._text, start, self._skip(pattern))
        if long is not None:
            raise _Beyond(f"A number or date has more than {SCALAR_LENGTH_MAX} characters.", long.start())

    def _count_table(self) -> None:
        self._tables += 1
        if self._tables > TABLES_MAX:
            raise _Beyond(f"There are more than {TABLES_MAX} keys, lists and tables.", self._at)

    def _check_depth(self, depth: int) -> None:
        if depth > NESTING_MAX:
            raise _Beyond(f"Lists or tables are nested more than {NESTING_MAX} deep.", self._at)
