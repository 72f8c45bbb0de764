"""The audit log: who did what to the server, from where, with what outcome; for admins.

Operations on instances are in the history of events. Here is what gives or takes access, what binds everybody, and what
shows a guest to a person.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import structlog

from interlock.core.errors import StoreError
from interlock.core.restarts import SERVER_REQUESTER
from interlock.core.roles import Role
from interlock.ports import Store
from interlock.ports.audit import AuditEntry, AuditFilter, Outcome
from interlock.service.auth import Caller
from interlock.service.change_notifier import EVERYTHING, ChangeNotifier

_PRUNE_EVERY_MS: Final = 3_600_000
_FAILURES_FOR_MS: Final = 3_600_000
"""How long failed authentications of one address are counted together."""
_READS_FOR_MS: Final = 600_000
_REMEMBERED_MAX: Final = 4_096
"""Of how many addresses, and of how many reads, something is remembered."""
_LOG = structlog.get_logger(__name__)


class AuditLog:
    """Records audited actions, each durable when recorded, and in the server's log too."""

    def __init__(self, store: Store, keep_ms: int) -> None:
        """`keep_ms`: how long entries are kept; 0: forever."""
        self._store = store
        self._keep_ms = keep_ms
        self._pruned_at_ms: int | None = None
        self._waiting = ChangeNotifier()
        self._failures: dict[str, tuple[int, int]] = {}
        """When the first authentication of an address failed, and how many did since."""
        self._reads: dict[tuple[str, ...], int] = {}

    async def record(
        self,
        action: str,
        outcome: Outcome = Outcome.SUCCEEDED,
        *,
        who: Caller | None = None,
        address: str = "",
        target: str = "",
        **details: Any,
    ) -> None:
        """Record what a caller did. An entry that cannot be stored is an error in the server's log, and only there.

        The action has ended: its response must not depend on the disk.
        """
        caller = {} if who is None else {"who": who.name, "role": who.role.value, "project": who.project}
        await self._keep(action, outcome, address=address, target=target, details=details, **caller)

    async def record_read(
        self, action: str, outcome: Outcome, *, who: Caller, address: str, target: str, **details: Any
    ) -> None:
        """As `record`, but for the same read of the same caller only once in ten minutes: some clients poll."""
        now_ms = self._store.now_ms()
        read = (action, outcome, who.token_id, address, target)
        if now_ms - self._reads.get(read, now_ms - _READS_FOR_MS) < _READS_FOR_MS:
            return
        if len(self._reads) >= _REMEMBERED_MAX:
            self._reads.clear()
        self._reads[read] = now_ms
        await self.record(action, outcome, who=who, address=address, target=target, **details)

    async def record_own(self, action: str, target: str, **details: Any) -> None:
        """Record what the server did by itself."""
        await self._keep(action, Outcome.SUCCEEDED, who=SERVER_REQUESTER, target=target, details=details)

    async def record_failure(self, address: str, path: str, reason: str) -> None:
        """Record a failed authentication: of each address the first in an hour, the 10th, the 100th and so on.

        Whoever tries secrets must not be able to fill the disk.
        """
        now_ms = self._store.now_ms()
        if address not in self._failures and len(self._failures) >= _REMEMBERED_MAX:
            self._failures = {
                known: since for known, since in self._failures.items() if now_ms - since[0] < _FAILURES_FOR_MS
            }
            address = address if len(self._failures) < _REMEMBERED_MAX else ""
        first_ms, count = self._failures.get(address, (now_ms, 0))
        if now_ms - first_ms >= _FAILURES_FOR_MS:
            first_ms, count = now_ms, 0
        count += 1
        self._failures[address] = (first_ms, count)
        if str(count).strip("0") == "1":
            await self.record("authenticate", Outcome.REFUSED, address=address, target=path, reason=reason, count=count)

    async def _keep(self, action: str, outcome: Outcome, **fields: Any) -> None:
        entry = AuditEntry(at_ms=self._store.now_ms(), action=action, outcome=outcome, **fields)
        said = msgspec.to_builtins(entry)
        _LOG.info("audit", **{name: value for name, value in said.items() if value})
        try:
            await self._store.audit.add(entry)
            self._waiting.wake(EVERYTHING)
            await self._prune(entry.at_ms)
        except StoreError as error:
            _LOG.error("audit entry not stored", action=entry.action, why=error.message)

    async def _prune(self, now_ms: int) -> None:
        cautious = now_ms < self._store.time.cautious_until_ms
        recent = self._pruned_at_ms is not None and now_ms - self._pruned_at_ms < _PRUNE_EVERY_MS
        if not self._keep_ms or recent or cautious:
            return
        self._pruned_at_ms = now_ms
        await self._store.audit.forget(now_ms - self._keep_ms)

    async def newest(
        self, caller: Caller, limit: int, before: int | None, where: AuditFilter
    ) -> tuple[AuditEntry, ...]:
        """Return entries, newest first, with a sequence smaller than `before`. Raises `Forbidden`."""
        caller.require(Role.ADMIN, "read the audit log")
        return await self._store.audit.before(before, limit, where)

    async def following(
        self, caller: Caller, limit: int, after: int, where: AuditFilter, wait_ms: int
    ) -> tuple[AuditEntry, ...]:
        """Return entries, oldest first, with a sequence greater than `after`, waiting for one. Raises `Forbidden`."""
        caller.require(Role.ADMIN, "read the audit log")

        async def found() -> tuple[AuditEntry, ...] | None:
            return await self._store.audit.after(after, limit, where) or None

        return await self._waiting.until(EVERYTHING, found, wait_ms) or ()

    def close(self) -> None:
        """Release the tasks that wait for an entry."""
        self._waiting.close()
