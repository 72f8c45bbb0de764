"""The layout of the database, revision by revision, for Alembic. No other code reads or writes rows by it."""
