"""How Alembic runs here: on the connection it is given, all revisions in one transaction."""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    # SQLite's own schema changes are transactional; Alembic has to be told, for the driver's sake it assumes otherwise.
    transactional_ddl=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
