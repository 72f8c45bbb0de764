"""Tokens, images and volumes in SQLite: few, small and rarely written, each in a transaction of its own."""

from __future__ import annotations

from typing import Any

import apsw

from interlock.core.errors import NameTaken
from interlock.core.records import Image
from interlock.ports import Token, Volume
from interlock.stores import rows
from interlock.stores.reading import Reader
from interlock.stores.statements import SEEN
from interlock.stores.writer import Writer


class SqliteInventory:
    """The part of `SqliteStore` that no decision touches."""

    _read: Reader
    _writer: Writer

    def now_ms(self) -> int:
        raise NotImplementedError

    async def _write(self, statement: str, *values: Any) -> int:
        """Run one statement in a transaction of its own; how many rows it changed."""
        now_ms = self.now_ms()

        def run(connection: apsw.Connection) -> int:
            connection.execute(statement, values)
            changes = connection.changes()
            connection.execute(SEEN, (now_ms,))
            return changes

        return await self._writer.transaction(run)

    async def _insert(self, taken: str, statement: str, *values: Any) -> None:
        """Insert one row, or raise `NameTaken` with that sentence."""
        if not await self._write(f"{statement} ON CONFLICT DO NOTHING", *values):
            raise NameTaken(taken, remedy="Choose another name.")

    async def put_token(self, token: Token) -> None:
        text = rows.body(token)
        await self._insert(
            "There is such a token already.", "INSERT INTO tokens (id, body) VALUES (?, ?)", token.id, text
        )

    async def delete_token(self, token_id: str) -> bool:
        return await self._write("DELETE FROM tokens WHERE id = ?", token_id) > 0

    async def tokens(self) -> tuple[Token, ...]:
        return self._read.tokens()

    async def put_image(self, image: Image) -> None:
        await self._insert(
            f"There is an image named {image.name} already.",
            "INSERT INTO images (id, name, body) VALUES (?, ?, ?)",
            *(image.id, rows.image_key(image), rows.body(image)),
        )

    async def delete_image(self, image_id: str) -> bool:
        return await self._write("DELETE FROM images WHERE id = ?", image_id) > 0

    async def images(self) -> tuple[Image, ...]:
        return self._read.images()

    async def put_volume(self, volume: Volume) -> None:
        await self._insert(
            f"There is a volume named {volume.name} already.",
            f"INSERT INTO volumes ({rows.VOLUME_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            *(volume.id, volume.name, volume.project, volume.path, volume.size_bytes, volume.attached_to),
            volume.created_at_ms,
        )

    async def claim_volume(self, volume_id: str, instance_id: str) -> bool:
        claim = "UPDATE volumes SET attached_to = ?1 WHERE id = ?2 AND (attached_to IS NULL OR attached_to = ?1)"
        return await self._write(claim, instance_id, volume_id) > 0

    async def release_volume(self, volume_id: str, instance_id: str) -> None:
        await self._write(
            "UPDATE volumes SET attached_to = NULL WHERE id = ? AND attached_to = ?", volume_id, instance_id
        )

    async def delete_volume(self, volume_id: str) -> bool:
        return await self._write("DELETE FROM volumes WHERE id = ? AND attached_to IS NULL", volume_id) > 0

    async def volume(self, volume_id: str) -> Volume | None:
        return self._read.volume(volume_id)

    async def volumes(self, project: str | None = None) -> tuple[Volume, ...]:
        return self._read.volumes(project)
