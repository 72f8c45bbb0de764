"""Sums over all instances, so that a start does not read every row; and which instances may have a scheduled action.

`tallies` has the claimed capacity of each host and the number of instances in each state, `host_ports` the instance
that has each port of a host. The store computes both when another version wrote them (`tallies` says which), so that
nothing is counted here.

`upkeep` is 1 if a scheduled action may be due for the instance, now or later.
"""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = (
    "CREATE TABLE tallies (what TEXT, of TEXT, amount INTEGER NOT NULL, PRIMARY KEY (what, of)) WITHOUT ROWID",
    """
    CREATE TABLE host_ports (
        host TEXT, port INTEGER, instance_id TEXT NOT NULL, PRIMARY KEY (host, port)
    ) WITHOUT ROWID
    """,
    "ALTER TABLE instances ADD COLUMN upkeep INTEGER NOT NULL DEFAULT 0",
    """
    UPDATE instances SET upkeep = 1 WHERE vm_state IN ('resized', 'soft_deleted', 'shelved')
    OR (vm_state IN ('error', 'stopped') AND json_extract(body, '$.restarts') IS NOT NULL)
    """,
    "CREATE INDEX instances_upkeep ON instances (upkeep) WHERE upkeep = 1",
    "DROP INDEX instances_by_state",
    "CREATE INDEX instances_by_state ON instances (vm_state, host) WHERE vm_state <> 'deleted'",
)
