"""The audit log. A sequence is never used twice, so that a reader that follows the log misses nothing."""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = (
    """
    CREATE TABLE audit (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        at_ms INTEGER NOT NULL,
        action TEXT NOT NULL,
        who TEXT NOT NULL,
        outcome TEXT NOT NULL,
        body TEXT NOT NULL
    )
    """,
    "CREATE INDEX audit_at ON audit (at_ms)",
    "CREATE INDEX audit_who ON audit (who, sequence)",
)
