"""Networks, and the addresses that instances have of them."""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = (
    """
    CREATE TABLE networks (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE, body TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE leases (
        network_id TEXT NOT NULL, address TEXT NOT NULL, instance_id TEXT NOT NULL, PRIMARY KEY (network_id, address)
    ) WITHOUT ROWID
    """,
)
