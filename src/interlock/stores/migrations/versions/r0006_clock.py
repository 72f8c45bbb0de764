"""The store's time apart from the wall clock: in which boot it ran on, and what is added to it for people.

Until now the two were one, so that nothing is added to what is kept already.
"""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = (
    "ALTER TABLE clock ADD COLUMN body TEXT NOT NULL DEFAULT '{}'",
    "CREATE TABLE clock_offsets (from_ms INTEGER PRIMARY KEY, offset_ms INTEGER NOT NULL)",
    "INSERT INTO clock_offsets (from_ms, offset_ms) VALUES (0, 0)",
)
