"""Policies that were in force, and the switches from one to the next.

A text is kept once, however often it came into force; the last switch says which policy is in force. What a switch
says of its policy (its name, its digest) was true then: a text that extends a built-in policy can mean something else
to a later version.

Also whether an instance was ever launched, which was not recorded before: all that are not building count as launched.
"""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = (
    """
    CREATE TABLE policies (
        seq INTEGER PRIMARY KEY,
        sha256 TEXT NOT NULL UNIQUE,
        main TEXT NOT NULL,
        files TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE policy_switches (
        number INTEGER PRIMARY KEY,
        policy_seq INTEGER NOT NULL REFERENCES policies (seq),
        digest TEXT NOT NULL,
        name TEXT NOT NULL,
        at_ms INTEGER NOT NULL,
        made_by TEXT NOT NULL,
        source TEXT NOT NULL,
        configured_digest TEXT NOT NULL,
        outstanding TEXT NOT NULL,
        cancelled INTEGER
    )
    """,
    """
    UPDATE instances SET body = json_set(body, '$.launched_at_ms', json_extract(body, '$.created_at_ms'))
    WHERE vm_state <> 'building'
    """,
)
