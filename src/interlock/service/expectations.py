"""What a value was expected to be, in words for people instead of a validator's. Pure; what is valid is not here."""

from __future__ import annotations

import re
from typing import Final

_MESSAGE: Final = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<key>key in )?\.?(?P<place>[^`]*)`)?", re.DOTALL)
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
    """What `msgspec.ValidationError` says, with the place first.

    Args:
        message: the validator's own.
        patterns: what the regular expressions that may be in it mean, such as `a MAC address`.
    """
    found = _MESSAGE.fullmatch(message)
    assert found is not None, "every part of it may be missing"
    what = found["what"]
    matching = _PATTERN.fullmatch(what)
    if matching is not None:
        pattern = matching["pattern"]
        known = {repr(one): meaning for one, meaning in patterns.items()}
        what = f"expected {known.get(pattern) or f'a text that matches {pattern}'}"
    else:
        what = _QUOTED.sub(_kind, what)
        for theirs, ours in _WORDS:
            what = what.replace(theirs, ours)
    return f"{found['place']}: {what}" if found["place"] else what
