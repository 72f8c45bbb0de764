"""The base class of all response bodies, and the types of times in them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Timestamp = Annotated[str, Meta(extra_json_schema={"format": "date-time", "examples": ["2026-03-01T12:00:00.000Z"]})]
Seconds = Annotated[float, Meta(ge=0)]


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """Base class of all response bodies."""
