"""The first layout: instances, requests, events, keys, tokens, images and volumes.

Records are kept whole, as JSON, in `body`; the columns beside it are what is searched, sorted or must be unique. An
index that says `WHERE vm_state <> 'deleted'` keeps lists as fast as the fleet is large, however long its history is.

There is no index of requests by instance. Each request names the one before it, and the instance names the last:
that is the order in which they are read, and it saves every admission one more page to write.
"""

from __future__ import annotations

from typing import Final

_APPLICATION_ID: Final = 0x696C6F6B

STATEMENTS: Final = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    """
    CREATE TABLE instances (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        vm_state TEXT NOT NULL,
        host TEXT NOT NULL,
        task_state TEXT NOT NULL,
        unsettled INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        fence INTEGER NOT NULL,
        updated_at_ms INTEGER NOT NULL,
        last_request INTEGER,
        body TEXT NOT NULL
    )
    """,
    "CREATE UNIQUE INDEX instances_by_name ON instances (project, name) WHERE vm_state <> 'deleted'",
    "CREATE INDEX instances_by_bare_name ON instances (name) WHERE vm_state <> 'deleted'",
    "CREATE INDEX instances_by_project ON instances (project) WHERE vm_state <> 'deleted'",
    "CREATE INDEX instances_by_state ON instances (vm_state) WHERE vm_state <> 'deleted'",
    "CREATE INDEX instances_by_host ON instances (host) WHERE vm_state <> 'deleted'",
    "CREATE INDEX instances_by_task ON instances (task_state) WHERE vm_state <> 'deleted'",
    "CREATE INDEX instances_deleted ON instances (project) WHERE vm_state = 'deleted'",
    "CREATE INDEX instances_unsettled ON instances (host) WHERE unsettled = 1",
    """
    CREATE TABLE instance_tags (
        tag TEXT NOT NULL,
        instance_seq INTEGER NOT NULL REFERENCES instances (seq),
        PRIMARY KEY (tag, instance_seq)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX instance_tags_by_instance ON instance_tags (instance_seq)",
    """
    CREATE TABLE requests (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        instance_seq INTEGER NOT NULL REFERENCES instances (seq),
        previous INTEGER,
        operation TEXT NOT NULL,
        status TEXT NOT NULL,
        admitted_at_ms INTEGER NOT NULL,
        body TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE events (
        sequence INTEGER PRIMARY KEY,
        instance_seq INTEGER NOT NULL REFERENCES instances (seq),
        project TEXT NOT NULL,
        request_id TEXT,
        kind TEXT NOT NULL,
        at_ms INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        data TEXT NOT NULL
    )
    """,
    "CREATE INDEX events_by_instance ON events (instance_seq)",
    "CREATE INDEX events_by_project ON events (project)",
    """
    CREATE TABLE idempotency_keys (
        scope TEXT NOT NULL,
        key TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        answer TEXT NOT NULL,
        at_ms INTEGER NOT NULL,
        PRIMARY KEY (scope, key)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX idempotency_keys_by_age ON idempotency_keys (at_ms)",
    "CREATE TABLE clock (seen_ms INTEGER NOT NULL)",
    "INSERT INTO clock (seen_ms) VALUES (0)",
    "CREATE TABLE tokens (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, body TEXT NOT NULL)",
    """
    CREATE TABLE images (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE, body TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE volumes (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        project TEXT NOT NULL,
        path TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        attached_to TEXT,
        created_at_ms INTEGER NOT NULL,
        UNIQUE (project, name)
    )
    """,
)
