"""Rows of zeros, whose pages are used when the disk is full: see `stores.reserve`."""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = ("CREATE TABLE reserve (id INTEGER PRIMARY KEY, content BLOB NOT NULL)",)
