"""Which policy it is: one number over all of it that decides.

However a file is laid out, and whatever it says for people, the same rules have the same digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from interlock.core.policy import Policy, Rule

_FORM: Final = "interlock policy 1"
"""Grows when what is taken into the digest changes."""
_DECIDES_NOTHING: Final = frozenset({"source", "because"})
_FIELDS: Final = tuple(field for field in msgspec.structs.fields(Rule) if field.name not in _DECIDES_NOTHING)


def digest_of(policy: Policy) -> str:
    """SHA-256 in hexadecimal. The policy's name, and what it calls things, decide nothing."""
    content = [_FORM, policy.outstanding_max, [dict(_said(rule)) for rule in policy.rules]]
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()


def _said(rule: Rule) -> Iterator[tuple[str, Any]]:
    """What a rule says beyond the defaults, so that a condition that is new changes the digest of its users only."""
    for field in _FIELDS:
        value = getattr(rule, field.name)
        if value != field.default:
            yield field.name, sorted(value) if isinstance(value, frozenset) else value
