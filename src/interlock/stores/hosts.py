"""The hosts beside the server's own, in SQLite."""

from __future__ import annotations

from interlock.ports.hosts import Host
from interlock.stores import rows
from interlock.stores.policies import SqlitePolicies


class SqliteHosts(SqlitePolicies):
    """The part of `SqliteStore` that keeps hosts."""

    async def put_host(self, host: Host) -> None:
        statement = "INSERT INTO hosts (name, body) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET body = ?2"
        await self._write(statement, host.name, rows.body(host))

    async def delete_host(self, name: str) -> bool:
        return await self._write("DELETE FROM hosts WHERE name = ?", name) > 0

    async def hosts(self) -> tuple[Host, ...]:
        return self._read.hosts()
