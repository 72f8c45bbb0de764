"""Records of policies and policy switches in SQLite; each text is stored once."""

from __future__ import annotations

import hashlib
from typing import Final

import apsw

from interlock.core.policy_switches import PolicyBundle, PolicySwitch
from interlock.stores import row_codec
from interlock.stores.database import Database
from interlock.stores.statements import SEEN

_TEXT: Final = "INSERT INTO policies (sha256, main, files) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_SWITCH: Final = """
    INSERT INTO policy_switches
        (policy_seq, digest, name, at_ms, made_by, source, configured_digest, outstanding, cancelled, walk)
    SELECT seq, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10 FROM policies WHERE sha256 = ?1
"""


class PolicyTable:
    """Satisfies `ports.PolicyRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def switch(self, switch: PolicySwitch, bundle: PolicyBundle) -> int:
        files = row_codec.body(dict(sorted(bundle.files.items())))
        sha256 = hashlib.sha256(f"{bundle.main}\0{files}".encode()).hexdigest()
        values = (
            *(sha256, switch.digest, switch.name, switch.at_ms, switch.by, switch.source.value),
            *(switch.configured_digest, switch.outstanding.value, switch.cancelled),
            None if switch.walk is None else row_codec.body(switch.walk),
        )
        now_ms = self._database.clock.now_ms()

        def run(connection: apsw.Connection) -> int:
            connection.execute(_TEXT, (sha256, bundle.main, files))
            connection.execute(_SWITCH, values)
            number = connection.last_insert_rowid()
            connection.execute(SEEN, (now_ms,))
            return number

        return await self._database.writer.transaction(run)

    async def settle(self, number: int, cancelled: int) -> None:
        await self._database.write(
            "UPDATE policy_switches SET cancelled = ? WHERE number = ?", cancelled, number, when_full=True
        )

    async def switches(self, limit: int, before: int | None = None) -> tuple[PolicySwitch, ...]:
        return self._database.read.policy_switches(limit, before)

    async def bundle(self, number: int) -> PolicyBundle | None:
        return self._database.read.policy_bundle(number)
