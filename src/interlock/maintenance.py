"""What is done to a server's data folder while no server runs."""

from __future__ import annotations

from pathlib import Path

from interlock.config import Config
from interlock.images.atomic_files import make_data_folder, write_atomically
from interlock.server import ADMIN_TOKEN, DATABASE, new_id
from interlock.service.audit import AuditLog
from interlock.service.auth import Authenticator
from interlock.service.tokens import make_admin, new_secret
from interlock.stores.schema import make_new, upgrade
from interlock.stores.sqlite import SqliteStore


def upgrade_database(config: Config) -> None:
    """Migrate the database to this version's schema. Raises `StoreError`."""
    upgrade(config.folder / DATABASE)


def new_database(config: Config) -> None:
    """Create an empty database to replace a lost one. Raises `StoreError`."""
    make_data_folder(config.folder)
    make_new(config.folder / DATABASE)


async def recover_admin_token(config: Config) -> Path:
    """Create an admin token in the data folder while no server runs; return its file.

    Raises:
        StoreError: the database cannot be opened; `StoreBusy` if a server runs.
    """
    store = SqliteStore(config.folder / DATABASE)
    await store.open()
    try:
        secret = new_secret()
        write_atomically(config.folder / ADMIN_TOKEN, secret + "\n", mode=0o600)
        token = f"admin-{new_id()[-12:]}"
        await make_admin(Authenticator(store), store, new_id(), token, secret)
        await AuditLog(store, config.audit.keep_ms).record_own("token.create", token, role="admin")
    finally:
        await store.close()
    return config.folder / ADMIN_TOKEN
