"""Projects, which were only names on other records. Each is as old as the oldest of those."""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = (
    "CREATE TABLE projects (name TEXT NOT NULL PRIMARY KEY, body TEXT NOT NULL)",
    """
    INSERT INTO projects (name, body)
    SELECT name, json_object('name', name, 'created_at_ms', min(at_ms)) FROM (
        SELECT 'default' AS name, NULL AS at_ms
        UNION ALL SELECT json_extract(body, '$.project'), json_extract(body, '$.created_at_ms') FROM tokens
        UNION ALL SELECT project, json_extract(body, '$.created_at_ms') FROM instances
        UNION ALL SELECT project, created_at_ms FROM volumes
        UNION ALL SELECT json_extract(body, '$.project'), json_extract(body, '$.created_at_ms') FROM images
    ) WHERE name IS NOT NULL GROUP BY name ORDER BY name
    """,
)
