"""The hosts beside the server's own: each one whose agent has ever spoken to this server."""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = ("CREATE TABLE hosts (name TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID",)
