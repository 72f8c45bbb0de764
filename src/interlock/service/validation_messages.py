"""Translates msgspec validation errors to messages for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import msgspec

_MESSAGE: Final = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<place>[^`]*)`)?", re.DOTALL)
_UNKNOWN_FIELD: Final = re.compile(r"unknown field `(?P<name>[^`]*)`")
_NO_MEMBER: Final = re.compile(r"Invalid enum value (?P<value>'.*')", re.DOTALL)
_STEP: Final = re.compile(r"[^.\[\]]+|\[[^\]]*\]")
_GUESSES_MAX: Final = 50
"""With more names than this, none are listed."""
_PATTERN: Final = re.compile(r"Expected `str` matching regex (?P<pattern>'.*')", re.DOTALL)
_KINDS: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_QUOTED: Final = re.compile("`([^`]+)`")
_WORDS: Final = (
    ("Expected", "expected"),
    (" of length >= ", " with a length of at least "),
    (" of length <= ", " with a length of at most "),
    (" >= ", " of at least "),
    (" <= ", " of at most "),
)


def _kind(quoted: re.Match[str]) -> str:
    kinds = [_KINDS.get(one, one) for one in quoted[1].split(" | ")]
    return " or ".join(kinds) if len(kinds) > 1 or kinds[0] != quoted[1] else quoted[0]


def in_words(message: str, patterns: dict[str, str]) -> str:
    """Rewrite the message of a `msgspec.ValidationError`, with the field first.

    Args:
        message: the validator's message.
        patterns: descriptions of regular expressions, such as `a MAC address`.
    """
    found = _MESSAGE.fullmatch(message)
    assert found is not None, "every part of it may be missing"
    what = found["what"]
    matching = _PATTERN.fullmatch(what)
    if matching is not None:
        pattern = matching["pattern"]
        known = {repr(one): meaning for one, meaning in patterns.items()}
        what = f"expected {known.get(pattern) or f'a text that matches {pattern}'}"
    elif (stranger := _NO_MEMBER.fullmatch(what)) is not None:
        what = f"{stranger['value'][:80]} is not known"
    else:
        what = _QUOTED.sub(_kind, what)
        for theirs, ours in _WORDS:
            what = what.replace(theirs, ours)
    place = f"a name in {found['place']}" if found["key"] else found["place"]
    return f"{place}: {what}" if place else what


def what_instead(message: str, kind: Any) -> str | None:
    """Suggest names for an unknown field or enum value: the closest one, or all.

    Args:
        message: the validator's message.
        kind: the type that was to be decoded.
    """
    found = _MESSAGE.fullmatch(message)
    assert found is not None, "every part of it may be missing"
    field, member = _UNKNOWN_FIELD.search(found["what"]), _NO_MEMBER.fullmatch(found["what"])
    kinds = list(_within(kind, _STEP.findall(found["place"] or "")))
    if field is not None:
        wrong, title = field["name"], "The fields are"
        names = {one.encode_name for struct in kinds if _is_struct(struct) for one in msgspec.structs.fields(struct)}
    elif member is not None:
        wrong, title = member["value"].strip("'"), "It is one of"
        names = {value for kind in kinds for value in _members(kind)}
    else:
        return None
    near = difflib.get_close_matches(wrong, names, n=1)
    if near:
        return f"Did you mean `{near[0]}`?"
    return f"{title}: {', '.join(sorted(names))}." if 0 < len(names) <= _GUESSES_MAX else None


def _members(kind: Any) -> Iterator[str]:
    """Yield the values of an enumeration or a `Literal`."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        yield from (str(one.value) for one in kind)
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _within(kind: Any, steps: list[str]) -> Iterator[Any]:
    """Yield the types that the value at a path in `kind` may have; for a union, of all members."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        for part in get_args(kind):
            yield from _within(part, steps)
    elif get_origin(kind) is Annotated:
        yield from _within(get_args(kind)[0], steps)
    elif not steps:
        yield kind
    elif _is_struct(kind):
        for field in msgspec.structs.fields(kind):
            if field.encode_name == steps[0]:
                yield from _within(field.type, steps[1:])
    else:
        for part in get_args(kind):
            yield from _within(part, steps[1:])
