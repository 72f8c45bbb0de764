"""Digest of a policy over everything that affects decisions, independent of layout and texts for people."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from interlock.core.policy import Policy, Rule

_FORM: Final = "interlock policy 1"
"""Version of the digest's input."""
_DECIDES_NOTHING: Final = frozenset({"source", "because", "exceptions"})
_FIELDS: Final = tuple(field for field in msgspec.structs.fields(Rule) if field.name not in _DECIDES_NOTHING)


def digest_of(policy: Policy) -> str:
    """Return SHA-256 in hexadecimal. The policy's name and its custom names are left out."""
    content: list[Any] = [_FORM, policy.outstanding_max, [dict(_non_defaults(rule)) for rule in policy.rules]]
    # Left out otherwise, so that the digests of other policies stay.
    if any(policy.served_at_most.values()):
        content.append({"served_at_most": {name: limit for name, limit in policy.served_at_most.items() if limit}})
    if policy.protected_tags:
        content.append({"protected_tags": sorted(policy.protected_tags)})
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()


def _non_defaults(rule: Rule) -> Iterator[tuple[str, Any]]:
    """Yield fields that are not defaults, so that adding a condition to the language keeps other digests."""
    for field in _FIELDS:
        value = getattr(rule, field.name)
        if value != field.default:
            yield field.name, sorted(value) if isinstance(value, frozenset) else value
