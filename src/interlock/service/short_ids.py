"""Resolves shortened ids by their beginning or end."""

from __future__ import annotations

import re
from typing import Final, Literal

from interlock.core.errors import Invalid
from interlock.ports import Store

SHORT_MIN: Final = 8
"""Minimum length of a shortened id; the CLI prints as many characters."""
_PART: Final = re.compile(rf"[0-9a-f-]{{{SHORT_MIN},36}}", re.ASCII)
_SHOWN_MAX: Final = 5


async def full_id(store: Store, what: Literal["instances", "requests"], project: str, part: str) -> str | None:
    """Return the project's id that begins or ends with `part`; None if none does or `part` is too short.

    Raises:
        Invalid: the id is ambiguous; names the matches.
    """
    part = part.lower()
    if not _PART.fullmatch(part):
        return None
    found = await store.ids_like(what, project, part)
    if len(found) > 1:
        more = ", and more" if len(found) > _SHOWN_MAX else ""
        raise Invalid(
            f"Ambiguous id {part}: matches {', '.join(found[:_SHOWN_MAX])}{more}.",
            remedy="Give more characters.",
        )
    return found[0] if found else None
