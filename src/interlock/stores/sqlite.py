"""The store in one SQLite file, with group commit: decisions in memory, and one fsync for many of them.

Decisions are made in order on the event loop, each on the result of the one before, and their rows collected in a
batch. Whenever the writer is idle it commits the batch as one transaction. Results and events are delivered after the
commit. If it fails, all decisions built on it fail, and the cache is reset to the committed state.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import apsw
from msgspec.structs import force_setattr

from interlock.core.errors import BrokenInvariant, StoreError, StoreFull, not_found
from interlock.core.full_store import kept_when_full
from interlock.core.records import Change, Event, Instance, Request
from interlock.core.states import VmState
from interlock.ports import Clock, IdempotencyKey, InstanceFilter, Page, Tally
from interlock.stores import row_codec
from interlock.stores.clock import GRACE_MS, JUMP_MS, SystemClock
from interlock.stores.database import Database
from interlock.stores.decision_gate import DecisionGate
from interlock.stores.idempotency_keys import IdempotencyKeys
from interlock.stores.instance_names import InstanceNames
from interlock.stores.policy_table import PolicyTable
from interlock.stores.row_codec import Row
from interlock.stores.statements import SEEN
from interlock.stores.tables import (
    AuditTable,
    HostTable,
    ImageTable,
    NetworkTable,
    ProjectTable,
    SecurityGroupTable,
    TokenTable,
    VolumeTable,
)
from interlock.stores.tallies import Tallies
from interlock.stores.timekeeping import StoreTime
from interlock.stores.write_batch import CachedInstance, WriteBatch, write_tallies
from interlock.stores.writer import RESERVE_MIB

AnswerT = TypeVar("AnswerT")

INSTANCES_IN_MEMORY: Final = 20_000
REQUESTS_IN_MEMORY: Final = 10_000
DECISIONS_PER_TRANSACTION: Final = 2_000
"""Maximum number of decisions in a transaction; further ones wait for the next."""
DECISIONS_WHEN_FULL: Final = 64
"""The same while the disk is full, so that the write-ahead log fits its allocated blocks."""


class SqliteStore:
    """Satisfies `ports.Store`. Not thread-safe: use it from one event loop."""

    def __init__(
        self,
        path: Path,
        clock: Clock | None = None,
        reserve_mib: int = RESERVE_MIB,
        *,
        jump_ms: int = JUMP_MS,
        grace_ms: int = GRACE_MS,
    ) -> None:
        """Create a closed store.

        Args:
            path: the database file.
            clock: the system's clock by default.
            reserve_mib: space reserved in the database for a full disk.
            jump_ms: see `StoreClock`.
            grace_ms: see `StoreClock`.
        """
        self._database = database = Database(
            path, clock or SystemClock(), reserve_mib, jump_ms=jump_ms, grace_ms=grace_ms
        )
        self.time = StoreTime(database)
        self.tokens = TokenTable(database)
        self.images = ImageTable(database)
        self.volumes = VolumeTable(database)
        self.projects = ProjectTable(database)
        self.networks, self.security_groups = NetworkTable(database), SecurityGroupTable(database)
        self.policies = PolicyTable(database)
        self.hosts = HostTable(database)
        self.audit = AuditTable(database)
        self._keys = IdempotencyKeys(database)
        self._probe: asyncio.Future[None] | None = None
        self._hints: list[Callable[[str], None]] = []
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self._kept: dict[str, CachedInstance] = {}
        self._fences: dict[str, int] = {}
        """Fences of the instances changed since the start and not deleted."""
        self._names = InstanceNames(database, self._kept)
        self._recent: dict[str, tuple[str, Request]] = {}
        """The latest committed requests with their projects: most are waited for."""
        self._gate = DecisionGate(self._is_full)
        self._gathering = WriteBatch()
        self._writing: WriteBatch | None = None
        self._flush_due = False

    async def open(self) -> None:
        """Open the file. On an error nothing stays open or locked."""
        await self._database.open()
        self._loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(self._database.close)
            self._find_ends()
            # On a full disk both are skipped, and done at the next start.
            with contextlib.suppress(StoreFull):
                await self.time.keep()
                if not self._tallies.current:
                    await self._count_anew()
            opened.pop_all()

    async def _count_anew(self) -> None:
        """Compute the sums from all instances if they are missing or of another version."""
        self._tallies = Tallies(())
        for instance in self._database.read.every_instance():
            self._tallies.note(None, instance)
        self._tallies.mark_current()
        changes = self._tallies.changes()

        def write(connection: apsw.Connection) -> None:
            connection.execute("DELETE FROM tallies; DELETE FROM host_ports; DELETE FROM leases")
            write_tallies(connection, changes)

        await self._database.writer.transaction(write, when_full=True)

    def _find_ends(self) -> None:
        """Load the last row numbers and the sums."""
        self._tallies = self._database.read.tallies()
        for instance in self._database.read.unsettled(None):
            self._tallies.note_outstanding(None, instance)
        self._last_instance = self._database.read.last("instances")
        self._last_request = self._database.read.last("requests")
        self._last_sequence = self._database.read.last("events", "sequence")

    async def close(self) -> None:
        self._gate.closing = True
        while not self._gathering.empty or self._writing is not None:
            await self.settled()
        seen_ms = self.now_ms()
        self._database.writer.submit(
            lambda connection: connection.execute(SEEN, (seen_ms,)).fetchall(), lambda *_: None
        )
        await self._database.close()

    async def settled(self) -> None:
        batch = self._writing if self._gathering.empty else self._gathering
        with contextlib.suppress(StoreError):
            await self._until_written(batch)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        with self._gate.paused():
            await self.settled()
            yield

    def now_ms(self) -> int:
        return self._database.clock.now_ms()

    def shown_ms(self, at_ms: int) -> int:
        return self._database.clock.offsets.shown_ms(at_ms)

    async def writable(self) -> None:
        if self._probe is None or self._probe.done():
            # Only one probe at a time, however often this is called while nothing can be written.
            self._probe = asyncio.ensure_future(self._database.writer.transaction(lambda _: None))
            self._probe.add_done_callback(lambda probe: probe.cancelled() or probe.exception())
        with contextlib.suppress(StoreFull):  # writes that free space are possible
            await asyncio.shield(self._probe)

    @property
    def full(self) -> bool:
        """Whether no space is left: only the writes that `core.full_store` names are accepted."""
        return self._database.writer.full

    async def retry_full(self) -> None:
        """Check whether there is space again. Raises `StoreFull` if not."""
        await self._database.writer.retry_full()

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def on_admission(self, hint: Callable[[str], None]) -> Callable[[], None]:
        self._hints.append(hint)
        return lambda: self._hints.remove(hint)

    # ------------------------------------------------------------------------------------------------------ deciding

    async def create(self, decide: Callable[[int], Change[AnswerT]], key: IdempotencyKey | None = None) -> AnswerT:
        if key is not None and (kept := await self._answer_of(key)) is not None:
            return kept  # type: ignore[no-any-return]
        if self._gate.shut:
            await self._gate.passed()
        now_ms = self.now_ms()
        change = decide(now_ms)
        if self._find(change.instance.id) is not None:
            raise BrokenInvariant(f"An instance with the id {change.instance.id[:80]} already exists.")
        self._names.check(change.instance)
        if self._database.writer.full:
            await self._database.writer.retry_full()
            return await self.create(decide, key)
        created = CachedInstance(self._last_instance + 1, change.instance, None, committed=False)
        await self._keep(created, None, change, key, now_ms)
        return change.answer

    async def change(
        self,
        instance_id: str,
        decide: Callable[[Instance, int], Change[AnswerT]],
        key: IdempotencyKey | None = None,
    ) -> AnswerT:
        if key is not None and (answer := await self._answer_of(key)) is not None:
            return answer  # type: ignore[no-any-return]
        if self._gate.shut:
            await self._gate.passed()
        if (kept := self._find(instance_id)) is None:
            raise not_found("VM", instance_id)
        now_ms = self.now_ms()
        before = kept.latest
        change = decide(before, now_ms)
        if change.instance is before and not change.requests and not change.events:
            await self._until_committed(kept)
            return change.answer
        if change.instance.name != before.name and self._names.freed_by(self._gathering, change.instance):
            await self._until_written(self._gathering)
            return await self.change(instance_id, decide, key)
        needed = self._database.writer.full and kept_when_full(before, change)
        if self._database.writer.full and not needed:
            await self._database.writer.retry_full()
            return await self.change(instance_id, decide, key)
        try:
            await self._keep(kept, before, change, key, now_ms)
        except StoreFull:
            if needed or not kept_when_full(before, change):
                raise
        else:
            return change.answer
        # Its batch had a decision that may not use the reserve; retry it alone.
        return await self.change(instance_id, decide, key)

    async def _until_committed(self, kept: CachedInstance) -> None:
        """Wait for the uncommitted changes on which an answer may depend."""
        if kept.batches:
            await self._until_written(self._gathering if kept.latest.id in self._gathering.instances else self._writing)

    def _find(self, instance_id: str) -> CachedInstance | None:
        kept = self._kept.get(instance_id)
        if kept is None:
            if (found := self._database.read.instance(instance_id)) is None:
                return None
            kept = self._kept[instance_id] = CachedInstance(found[0], found[1], found[2], committed=True)
            if len(self._kept) > INSTANCES_IN_MEMORY:
                self._forget_some()
        return kept

    def _forget_some(self) -> None:
        """Evict a tenth of the cache, oldest first, except instances with uncommitted changes."""
        idle = [instance_id for instance_id, kept in self._kept.items() if not kept.batches]
        for instance_id in idle[: INSTANCES_IN_MEMORY // 10]:
            del self._kept[instance_id]

    def _keep(
        self,
        kept: CachedInstance,
        before: Instance | None,
        change: Change[Any],
        key: IdempotencyKey | None,
        now_ms: int,
    ) -> asyncio.Future[None]:
        """Add the rows of a decision to the batch; the future is done when they are committed."""
        instance = change.instance
        texts = row_codec.EncodedDecision(change, before, key)
        if before is not None and instance.name != before.name:
            self._names.check(instance)
        # From here on nothing can fail before the write.
        batch = self._gathering
        batch.decisions += 1
        batch.changes.append((before, change))
        batch.characters += texts.characters
        batch.seen_ms = now_ms
        if instance.id not in batch.instances:
            batch.instances[instance.id] = kept
            kept.batches += 1
        if before is None:
            self._last_instance = kept.seq
            self._kept[instance.id] = batch.new_instances[instance.id] = kept
        for request, text in zip(change.requests, texts.requests, strict=True):
            batch.latest_requests[request.id] = (instance.project, request)
            self._gather_request(batch, kept, before, request, text)
        if instance is not before:
            self._gather_instance(batch, kept, before, instance, texts.instance)
        for event, data in zip(change.events, texts.data, strict=True):
            self._last_sequence = sequence = self._last_sequence + 1
            force_setattr(event, "sequence", sequence)
            batch.events.append(event)
            batch.event_values += (sequence, kept.seq, instance.project, event.request_id)
            batch.event_values += (event.kind, event.at_ms, event.generation, data)
        if key is not None and texts.answer is not None:
            self._keys.gather(batch, key, change.answer, texts.answer, now_ms)
        if instance.outstanding and (before is None or not before.outstanding):
            for hint in self._hints:
                hint(instance.id)
        return self._written_with(batch)

    def _gather_instance(
        self, batch: WriteBatch, kept: CachedInstance, before: Instance | None, instance: Instance, text: str
    ) -> None:
        kept.latest = instance
        self._tallies.note(before, instance)
        batch.results[instance.id] = (instance, text, kept.last_request)
        if instance.tags != (before.tags if before is not None else ()):
            batch.tags[kept.seq] = instance.tags
        if before is None or instance.name != before.name:
            self._names.add(batch, kept)

    def _gather_request(
        self, batch: WriteBatch, kept: CachedInstance, before: Instance | None, request: Request, text: str
    ) -> None:
        known = batch.new_requests.get(request.id)
        if known is not None:
            batch.new_requests[request.id] = (*known[:5], request.status.value, known[6], text)
        elif row_codec.is_new(request, before):
            self._last_request = seq = self._last_request + 1
            batch.new_requests[request.id] = (
                *(seq, request.id, kept.seq, kept.last_request, request.operation.value),
                *(request.status.value, request.admitted_at_ms, text),
            )
            kept.last_request = seq
        else:
            batch.requests[request.id] = (request.id, request.status.value, text)

    async def _answer_of(self, key: IdempotencyKey) -> Any:
        """Return the response stored with an idempotency key once it is durable, or None. Raises `KeyReused`."""
        if (found := await self.recorded_answer(key.scope, key.key)) is None:
            return None
        row_codec.check_fingerprint(key, found[0])
        return found[1]

    async def recorded_answer(self, scope: str, key: str) -> tuple[str, Any] | None:
        if (found := self._keys.find(scope, key)) is None:
            return None
        fingerprint, answer, batch = found
        await self._until_written(batch)
        return fingerprint, answer

    # ---------------------------------------------------------------------------------------------------- committing

    def _is_full(self) -> bool:
        """Whether the next transaction can take no more decisions."""
        most = DECISIONS_WHEN_FULL if self._database.writer.full else DECISIONS_PER_TRANSACTION
        return self._gathering.decisions >= most

    async def _until_written(self, batch: WriteBatch | None) -> None:
        if batch is not None:
            await self._written_with(batch)

    def _written_with(self, batch: WriteBatch) -> asyncio.Future[None]:
        """A future that is done when the batch is on the disk."""
        written: asyncio.Future[None] = self._loop.create_future()
        batch.waiting.append(written)
        if not self._flush_due and self._writing is None:
            # Everyone who is ready to run now, or is woken by that, decides first, and shares the transaction.
            self._flush_due = True
            self._loop.call_soon(self._loop.call_soon, self._flush)
        return written

    def _flush(self) -> None:
        """Hand what was gathered to the writer, if it is free."""
        self._flush_due = False
        batch = self._gathering
        if batch.empty or self._writing is not None:
            return
        self._writing, self._gathering = batch, WriteBatch()
        batch.tallies = self._tallies.changes()
        self._database.writer.submit(
            batch.write, lambda filed, error: self._written(batch, filed, error), batch.pages, batch.ordinary
        )
        self._gate.wake()

    def _written(self, batch: WriteBatch, filed: dict[str, Row], error: StoreError | None) -> None:
        self._writing = None
        if error is None:
            for instance_id, columns in filed.items():
                batch.instances[instance_id].filed = columns
            self._commit(batch)
        else:
            self._undo(batch, error)
        if not self._gathering.empty:
            self._flush()

    def _commit(self, batch: WriteBatch) -> None:
        """After the commit: publish the instances to readers, call the listeners, and complete the futures."""
        for instance_id, (instance, _, _) in batch.results.items():
            batch.instances[instance_id].committed = instance
            self._fences[instance_id] = instance.fence
            if instance.vm_state is VmState.DELETED:
                del self._fences[instance_id]  # not needed any more
        self._recent.update(batch.latest_requests)
        for request_id in tuple(islice(self._recent, max(0, len(self._recent) - REQUESTS_IN_MEMORY))):
            del self._recent[request_id]
        self._release(batch)
        if batch.events:
            for listener in tuple(self._listeners):
                try:
                    listener(batch.events)
                except Exception as error:  # noqa: BLE001 - must not affect the tasks that wait for the commit
                    context = {"message": "A listener of the store failed.", "exception": error}
                    self._loop.call_exception_handler(context)
        for future in batch.waiting:
            if not future.done():
                future.set_result(None)

    def _undo(self, batch: WriteBatch, error: StoreError) -> None:
        """After a failed commit: fail the batch and all later decisions, and drop their instances from the cache."""
        for lost in (batch, self._gathering):
            self._release(lost)
            for instance_id in lost.instances:
                self._kept.pop(instance_id, None)
            for future in lost.waiting:
                if not future.done():
                    future.set_exception(type(error)(error.message, remedy=error.remedy))
        self._gathering = WriteBatch()
        self._gate.wake()
        self._find_ends()

    def _release(self, batch: WriteBatch) -> None:
        for changed in batch.instances.values():
            changed.batches -= 1
        self._names.forget(batch, () if batch is self._gathering else self._gathering.names)
        self._keys.written(batch)

    # ------------------------------------------------------------------------------------------------------- reading

    def fence(self, instance_id: str) -> int | None:
        fence = self._fences.get(instance_id)
        return self._database.read.fence(instance_id) if fence is None else fence

    def tally(self, what: Tally, of: str) -> int:
        return self._tallies.amount(what, of)

    def tallies(self, what: Tally) -> dict[str, int]:
        return self._tallies.all_of(what)

    def port_user(self, host: str, port: int) -> str | None:
        return self._tallies.port_user(host, port)

    def lease_holder(self, network_id: str, address: str) -> str | None:
        return self._tallies.lease_holder(network_id, address)

    async def instance(self, instance_id: str) -> Instance | None:
        kept = self._kept.get(instance_id)
        if kept is not None and not kept.batches:
            return kept.committed
        # A pending change may be committed already and seen by other queries, so read the database.
        found = self._database.read.instance(instance_id)
        return None if found is None else found[1]

    async def instance_named(self, project: str, name: str) -> Instance | None:
        instance_id = self._database.read.id_named(project, name)
        return None if instance_id is None else await self.instance(instance_id)

    async def deleted_named(self, project: str, name: str) -> Instance | None:
        return self._database.read.deleted_named(project, name)

    async def instances(self, where: InstanceFilter, limit: int, cursor: str | None = None) -> Page:
        return self._database.read.instances(where, limit, cursor)

    async def unsettled(self, host: str | None = None) -> tuple[Instance, ...]:
        return self._database.read.unsettled(host)

    async def request(self, request_id: str, project: str | None = None) -> Request | None:
        its_project, request = self._recent.get(request_id, ("", None))
        kept = None if request is None else self._kept.get(request.instance_id)
        if request is None or (kept is not None and kept.batches):
            # As in `instance`: a pending change may be seen by other queries.
            return self._database.read.request(request_id, project)
        return request if project in {None, its_project} else None

    async def ids_like(self, what: Literal["instances", "requests"], project: str, part: str) -> tuple[str, ...]:
        return self._database.read.ids_like(what, project, part)

    async def requests(self, instance_id: str, limit: int, cursor: str | None = None) -> Page:
        return self._database.read.requests(instance_id, limit, cursor)

    async def events(
        self, after: int, limit: int, instance_id: str | None = None, project: str | None = None
    ) -> tuple[Event, ...]:
        return self._database.read.events(after, limit, instance_id, project)

    async def last_event(self) -> int:
        return self._database.read.last("events", "sequence")
