"""Records of tokens, images, volumes, projects, networks, security groups and hosts, and the audit log.

Each is written by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import apsw

from interlock.core.networks import Network, SecurityGroup
from interlock.core.records import Image
from interlock.ports import Project, Token, Volume
from interlock.ports.audit import AuditEntry, AuditFilter
from interlock.ports.hosts import Host
from interlock.stores import row_codec
from interlock.stores.database import Database


class TokenTable:
    """Satisfies `ports.TokenRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, token: Token) -> None:
        text = row_codec.body(token)
        await self._database.insert(
            "The token already exists.", "INSERT INTO tokens (id, body) VALUES (?, ?)", token.id, text
        )

    async def replace(self, token: Token) -> None:
        await self._database.write("UPDATE tokens SET body = ? WHERE id = ?", row_codec.body(token), token.id)

    async def note_uses(self, uses: Mapping[str, int]) -> None:
        def write(connection: apsw.Connection) -> None:
            statement = "UPDATE tokens SET body = json_set(body, '$.last_used_at_ms', ?) WHERE id = ?"
            connection.executemany(statement, [(at_ms, token_id) for token_id, at_ms in uses.items()])

        if uses:
            await self._database.writer.transaction(write)

    async def delete(self, token_id: str) -> bool:
        return await self._database.write("DELETE FROM tokens WHERE id = ?", token_id, when_full=True) > 0

    async def all(self) -> tuple[Token, ...]:
        return self._database.read.tokens()


class ImageTable:
    """Satisfies `ports.ImageRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, image: Image) -> None:
        await self._database.insert(
            f"An image named {image.name} already exists.",
            "INSERT INTO images (id, name, body) VALUES (?, ?, ?)",
            *(image.id, row_codec.name_key(image), row_codec.body(image)),
        )

    async def delete(self, image_id: str) -> bool:
        return await self._database.write("DELETE FROM images WHERE id = ?", image_id, when_full=True) > 0

    async def all(self) -> tuple[Image, ...]:
        return self._database.read.images()

    def count(self, project: str) -> int:
        return self._database.read.images_of(project)


class VolumeTable:
    """Satisfies `ports.VolumeRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, volume: Volume) -> None:
        await self._database.insert(
            f"A volume named {volume.name} already exists.",
            f"INSERT INTO volumes ({row_codec.VOLUME_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            *(volume.id, volume.name, volume.project, volume.path, volume.size_bytes, volume.attached_to),
            volume.created_at_ms,
        )

    async def claim(self, volume_id: str, instance_id: str) -> bool:
        statement = "UPDATE volumes SET attached_to = ?1 WHERE id = ?2 AND (attached_to IS NULL OR attached_to = ?1)"
        return await self._database.write(statement, instance_id, volume_id) > 0

    async def release(self, volume_id: str, instance_id: str) -> None:
        statement = "UPDATE volumes SET attached_to = NULL WHERE id = ? AND attached_to = ?"
        await self._database.write(statement, volume_id, instance_id, when_full=True)

    async def delete(self, volume_id: str) -> bool:
        statement = "DELETE FROM volumes WHERE id = ? AND attached_to IS NULL"
        return await self._database.write(statement, volume_id, when_full=True) > 0

    async def get(self, volume_id: str) -> Volume | None:
        return self._database.read.volume(volume_id)

    async def all(self, project: str | None = None) -> tuple[Volume, ...]:
        return self._database.read.volumes(project)


class ProjectTable:
    """Satisfies `ports.ProjectRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, project: Project) -> None:
        await self._database.insert(
            f"A project named {project.name} already exists.",
            "INSERT INTO projects (name, body) VALUES (?, ?)",
            *(project.name, row_codec.body(project)),
        )

    async def replace(self, project: Project) -> None:
        statement = "UPDATE projects SET body = ? WHERE name = ?"
        await self._database.write(statement, row_codec.body(project), project.name)

    async def delete(self, name: str) -> bool:
        return await self._database.write("DELETE FROM projects WHERE name = ?", name, when_full=True) > 0

    async def all(self) -> tuple[Project, ...]:
        return self._database.read.projects()


class NetworkTable:
    """Satisfies `ports.NetworkRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, network: Network) -> None:
        await self._database.insert(
            f"A network named {network.name} already exists.",
            "INSERT INTO networks (id, name, body) VALUES (?, ?, ?)",
            *(network.id, row_codec.name_key(network), row_codec.body(network)),
        )

    async def replace(self, network: Network) -> None:
        await self._database.write("UPDATE networks SET body = ? WHERE id = ?", row_codec.body(network), network.id)

    async def delete(self, network_id: str) -> bool:
        return await self._database.write("DELETE FROM networks WHERE id = ?", network_id, when_full=True) > 0

    async def all(self) -> tuple[Network, ...]:
        return self._database.read.networks()


class SecurityGroupTable:
    """Satisfies `ports.SecurityGroupRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, group: SecurityGroup) -> None:
        await self._database.insert(
            f"A security group named {group.name} already exists.",
            "INSERT INTO security_groups (id, name, body) VALUES (?, ?, ?)",
            *(group.id, row_codec.name_key(group), row_codec.body(group)),
        )

    async def replace(self, group: SecurityGroup) -> None:
        await self._database.write("UPDATE security_groups SET body = ? WHERE id = ?", row_codec.body(group), group.id)

    async def delete(self, group_id: str) -> bool:
        return await self._database.write("DELETE FROM security_groups WHERE id = ?", group_id, when_full=True) > 0

    async def all(self) -> tuple[SecurityGroup, ...]:
        return self._database.read.security_groups()


class HostTable:
    """Satisfies `ports.HostRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, host: Host) -> None:
        statement = "INSERT INTO hosts (name, body) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET body = ?2"
        # Also when the disk is full: the state of a lost host prevents an instance from running twice.
        await self._database.write(statement, host.name, row_codec.body(host), when_full=True)

    async def delete(self, name: str) -> bool:
        return await self._database.write("DELETE FROM hosts WHERE name = ?", name, when_full=True) > 0

    async def all(self) -> tuple[Host, ...]:
        return self._database.read.hosts()


class AuditTable:
    """Satisfies `ports.AuditRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, entry: AuditEntry) -> None:
        await self._database.write(
            "INSERT INTO audit (at_ms, action, who, outcome, body) VALUES (?, ?, ?, ?, ?)",
            *(entry.at_ms, entry.action, entry.who, entry.outcome.value, row_codec.body(entry)),
            when_full=True,
        )

    async def after(self, sequence: int, limit: int, where: AuditFilter) -> tuple[AuditEntry, ...]:
        return self._database.read.audit("sequence > ?", sequence, "sequence", limit, where)

    async def before(self, sequence: int | None, limit: int, where: AuditFilter) -> tuple[AuditEntry, ...]:
        newest = row_codec.INTEGER_MAX if sequence is None else sequence
        return self._database.read.audit("sequence < ?", newest, "sequence DESC", limit, where)

    async def forget(self, before_ms: int) -> int:
        return await self._database.write("DELETE FROM audit WHERE at_ms < ?", before_ms, when_full=True)
