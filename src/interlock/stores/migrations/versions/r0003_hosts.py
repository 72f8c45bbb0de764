"""The hosts beside the server's own: each one whose agent has ever spoken to this server."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE TABLE hosts (name TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID")


def downgrade() -> None:
    raise NotImplementedError("An older layout is brought back from the copy that was taken before the upgrade.")
