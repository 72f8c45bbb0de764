"""The role of who locked an instance, which was not recorded before: that of its last lock request.

An admin's if there is none, since only an admin can remove such a lock. The column `body` leaves out defaults.
"""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = (
    """
    UPDATE instances SET body = json_set(body, '$.lock_role', coalesce((
        SELECT coalesce(json_extract(requests.body, '$.role'), 'member') FROM requests
        WHERE requests.instance_seq = instances.seq AND requests.operation = 'lock' AND requests.status = 'succeeded'
        ORDER BY requests.seq DESC LIMIT 1
    ), 'admin'))
    WHERE json_extract(body, '$.locked_by') IS NOT NULL
    """,
)
