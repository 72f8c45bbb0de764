"""Idempotency keys with their responses: of decisions that are being written, and of those in the database."""

from __future__ import annotations

from typing import Any, Final

from interlock.ports import IdempotencyKey
from interlock.stores import row_codec
from interlock.stores.database import Database
from interlock.stores.statements import FORGET_KEYS
from interlock.stores.write_batch import WriteBatch

KEY_KEPT_MS: Final = 24 * 3_600_000
"""How long an idempotency key is valid."""
_PRUNE_EVERY_MS: Final = 3_600_000


class IdempotencyKeys:
    """The responses stored with idempotency keys."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pending: dict[tuple[str, str], tuple[str, Any, WriteBatch]] = {}
        self._pruned_at_ms = 0

    def find(self, scope: str, key: str) -> tuple[str, Any, WriteBatch | None] | None:
        """Return the fingerprint and response stored with a key, and the batch that is to be waited for, or None."""
        pending = self._pending.get((scope, key))
        if pending is not None:
            return pending
        kept = self._database.read.key(scope, key, self._database.clock.now_ms() - KEY_KEPT_MS)
        return None if kept is None else (kept[0], row_codec.decode_answer(kept[1]), None)

    def gather(self, batch: WriteBatch, key: IdempotencyKey, answer: object, text: str, now_ms: int) -> None:
        """Add a key to a batch, and delete expired ones now and then."""
        batch.key_values += (key.scope, key.key, key.fingerprint, text, now_ms)
        batch.key_names.append((key.scope, key.key))
        self._pending[(key.scope, key.key)] = (key.fingerprint, answer, batch)
        cautious_until_ms = self._database.clock.kept.cautious_until_ms
        if now_ms - self._pruned_at_ms > _PRUNE_EVERY_MS and now_ms >= cautious_until_ms:
            self._pruned_at_ms = now_ms
            oldest = now_ms - KEY_KEPT_MS
            self._database.writer.submit(
                lambda connection: connection.execute(FORGET_KEYS, (oldest,)).fetchall(), lambda *_: None
            )

    def written(self, batch: WriteBatch) -> None:
        """Forget the pending keys of a batch that was written or lost."""
        for key in batch.key_names:
            self._pending.pop(key, None)
