"""The store in one SQLite file: decisions in memory, in order, and one fsync for as many as come at once.

A decision is made on the event loop, on the instance as the decision before it left it, and its rows are gathered.
Whenever the writer is free it gets what has been gathered, as one transaction. Nobody is answered, and no event is
told, before the transaction is on the disk; if it fails, so does everything that was built on it, and the memory goes
back to what the disk holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from interlock.core.errors import KeyReused, NameTaken, NotFound, StoreError
from interlock.core.records import Change, Event, Instance, Request
from interlock.core.states import VmState
from interlock.ports import Clock, IdempotencyKey, InstanceFilter, Page
from interlock.stores import rows
from interlock.stores.batch import Batch, Kept
from interlock.stores.clock import StoreClock, SystemClock
from interlock.stores.database_file import DatabaseFile
from interlock.stores.inventory import SqliteInventory
from interlock.stores.reading import Reader
from interlock.stores.writer import Writer

AnswerT = TypeVar("AnswerT")

INSTANCES_IN_MEMORY: Final = 20_000
KEY_KEPT_MS: Final = 24 * 3_600_000
"""For how long an idempotency key is remembered."""
_PRUNE_EVERY_MS: Final = 3_600_000


class SqliteStore(SqliteInventory):
    """Satisfies `ports.Store`. All of it is used from one event loop."""

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        """Name the database file; `clock` is the system's unless a test brings another."""
        self._file = DatabaseFile(path)
        self._system_clock = clock
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self._kept: dict[str, Kept] = {}
        self._fences: dict[str, int] = {}
        self._names: set[tuple[str, str]] = set()
        self._keys: dict[tuple[str, str], tuple[str, Any, asyncio.Future[None]]] = {}
        self._gathering = Batch()
        self._writing: Batch | None = None
        self._flush_due = False

    # ------------------------------------------------------------------------------------------- opening and closing

    async def open(self) -> None:
        await asyncio.to_thread(self._file.take)
        try:
            self._read = Reader(self._file.reader())
            self._clock = StoreClock(self._system_clock or SystemClock(), self._read.newest_ms())
            self._fences = self._read.fences()
            self._find_ends()
            self._writer = Writer(self._file.writer, self._file.path)
        except BaseException:
            self._file.let_go()
            raise
        self._writer.start()
        self._loop = asyncio.get_running_loop()
        self._pruned_at_ms = 0

    def _find_ends(self) -> None:
        """Where numbers go on: after what is on the disk."""
        self._last_instance = self._read.last("instances")
        self._last_request = self._read.last("requests")
        self._last_sequence = self._read.last("events", "sequence")

    async def close(self) -> None:
        while not self._gathering.empty or self._writing is not None:
            self._flush()
            await self._settled()
        await self._writer.close()
        self._read.close()
        self._file.let_go()

    async def _settled(self) -> None:
        """Return when what was gathered so far has been written or refused."""
        batch = self._writing or self._gathering
        written: asyncio.Future[None] = self._loop.create_future()
        batch.waiting.append(written)
        await asyncio.wait((written,))
        written.exception()

    def now_ms(self) -> int:
        return self._clock.now_ms()

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # ------------------------------------------------------------------------------------------------------ deciding

    async def create(self, decide: Callable[[int], Change[AnswerT]], key: IdempotencyKey | None = None) -> AnswerT:
        if key is not None and (kept := await self._answer_of(key)) is not None:
            return kept  # type: ignore[no-any-return]
        now_ms = self._clock.now_ms()
        change = decide(now_ms)
        name = (change.instance.project, change.instance.name)
        if name in self._names or self._lives(*name):
            raise NameTaken(
                f"The project {name[0]} has an instance named {name[1]} already.",
                remedy="Choose another name, or delete that one.",
            )
        self._last_instance += 1
        kept_instance = Kept(self._last_instance, change.instance, None, committed=False)
        self._kept[change.instance.id] = kept_instance
        self._names.add(name)
        self._gathering.names.append(name)
        self._gathering.new_instances[change.instance.id] = kept_instance
        return await self._keep(kept_instance, None, change, key, now_ms)

    def _lives(self, project: str, name: str) -> bool:
        instance_id = self._read.id_named(project, name)
        if instance_id is None:
            return False
        pending = self._kept.get(instance_id)
        return pending is None or pending.latest.vm_state is not VmState.DELETED

    async def change(
        self,
        instance_id: str,
        decide: Callable[[Instance, int], Change[AnswerT]],
        key: IdempotencyKey | None = None,
    ) -> AnswerT:
        if key is not None and (answer := await self._answer_of(key)) is not None:
            return answer  # type: ignore[no-any-return]
        kept = self._find(instance_id)
        if kept is None:
            raise NotFound(f"There is no instance {instance_id[:80]}.")
        now_ms = self._clock.now_ms()
        before = kept.latest
        change = decide(before, now_ms)
        if change.instance is before and not change.requests and not change.events:
            # The answer may rest on what is still on its way to the disk.
            if kept.batches:
                await self._wait(self._gathering if instance_id in self._gathering.instances else self._writing)
            return change.answer
        return await self._keep(kept, before, change, key, now_ms)

    def _find(self, instance_id: str) -> Kept | None:
        kept = self._kept.get(instance_id)
        if kept is None:
            found = self._read.instance(instance_id)
            if found is None:
                return None
            kept = self._kept[instance_id] = Kept(found[0], found[1], found[2], committed=True)
            if len(self._kept) > INSTANCES_IN_MEMORY:
                self._forget_some()
        return kept

    def _forget_some(self) -> None:
        """Drop a tenth of what is in memory, the longest there first, but nothing that is on its way to the disk."""
        idle = [instance_id for instance_id, kept in self._kept.items() if not kept.batches]
        for instance_id in idle[: INSTANCES_IN_MEMORY // 10]:
            del self._kept[instance_id]

    async def _keep(
        self,
        kept: Kept,
        before: Instance | None,
        change: Change[AnswerT],
        key: IdempotencyKey | None,
        now_ms: int,
    ) -> AnswerT:
        """Gather the rows of a decision, and answer when they are on the disk."""
        batch = self._gathering
        batch.decisions += 1
        instance = change.instance
        for request in change.requests:
            self._gather_request(batch, kept, before, request)
        if instance.id not in batch.instances:
            batch.instances[instance.id] = kept
            kept.batches += 1
        if instance is not before:
            kept.latest = instance
            batch.results[instance.id] = instance
            batch.instance_rows[instance.id] = rows.instance_row(instance, kept.last_request)
            if instance.tags != (before.tags if before is not None else ()):
                batch.tags[kept.seq] = instance.tags
        for event in change.events:
            self._last_sequence += 1
            msgspec.structs.force_setattr(event, "sequence", self._last_sequence)
            batch.events.append(event)
            batch.event_rows.append(rows.event_row(event, self._last_sequence, kept.seq, instance.project))
        if key is not None and rows.has_effect(change, before):
            self._gather_key(batch, key, change.answer, now_ms)
        await self._wait(batch)
        return change.answer

    def _gather_request(self, batch: Batch, kept: Kept, before: Instance | None, request: Request) -> None:
        known = batch.new_requests.get(request.id)
        if known is not None:
            batch.new_requests[request.id] = rows.request_row(request, known[2], kept.seq, known[5])
        elif rows.is_new(request, before):
            self._last_request += 1
            batch.new_requests[request.id] = rows.request_row(request, self._last_request, kept.seq, kept.last_request)
            kept.last_request = self._last_request
        else:
            batch.requests[request.id] = (request.status.value, rows.body(request), request.id)

    # ---------------------------------------------------------------------------------------------- idempotency keys

    async def _answer_of(self, key: IdempotencyKey) -> Any:
        """The answer that was kept with a key, or None. Raises `KeyReused`."""
        pending = self._keys.get((key.scope, key.key))
        if pending is not None:
            fingerprint, answer, written = pending
            _check_fingerprint(key, fingerprint)
            await asyncio.shield(written)
            return answer
        kept = self._read.key(key.scope, key.key)
        if kept is None:
            return None
        _check_fingerprint(key, kept[0])
        return rows.decode_answer(kept[1])

    def _gather_key(self, batch: Batch, key: IdempotencyKey, answer: object, now_ms: int) -> None:
        written: asyncio.Future[None] = self._loop.create_future()
        batch.waiting.append(written)
        batch.keys.append(rows.key_row(key, answer, now_ms))
        batch.key_names.append((key.scope, key.key))
        self._keys[(key.scope, key.key)] = (key.fingerprint, answer, written)
        if now_ms - self._pruned_at_ms > _PRUNE_EVERY_MS:
            self._pruned_at_ms = now_ms
            oldest = now_ms - KEY_KEPT_MS
            self._writer.submit(
                lambda connection: connection.execute(
                    "DELETE FROM idempotency_keys WHERE at_ms < ?", (oldest,)
                ).fetchall(),
                lambda _answer, _error: None,
            )

    # ---------------------------------------------------------------------------------------------------- committing

    async def _wait(self, batch: Batch | None) -> None:
        if batch is None:
            return
        written: asyncio.Future[None] = self._loop.create_future()
        batch.waiting.append(written)
        if not self._flush_due and self._writing is None:
            # Everyone who is ready to run now decides first, and shares the transaction.
            self._flush_due = True
            self._loop.call_soon(self._flush)
        await written

    def _flush(self) -> None:
        """Hand what was gathered to the writer, if it is free."""
        self._flush_due = False
        batch = self._gathering
        if batch.empty or self._writing is not None:
            return
        self._writing, self._gathering = batch, Batch()
        self._writer.submit(batch.write, lambda _answer, error: self._written(batch, error))

    def _written(self, batch: Batch, error: StoreError | None) -> None:
        self._writing = None
        if error is None:
            self._commit(batch)
        else:
            self._undo(batch, error)
        if not self._gathering.empty:
            self._flush()

    def _commit(self, batch: Batch) -> None:
        """What was on its way is there: readers see it, listeners hear of it, and those who wait go on."""
        for instance_id, instance in batch.results.items():
            batch.instances[instance_id].committed = instance
            self._fences[instance_id] = instance.fence
            if instance.vm_state is VmState.DELETED:
                del self._fences[instance_id]
        self._let_go(batch)
        if batch.events:
            for listener in tuple(self._listeners):
                listener(batch.events)
        for future in batch.waiting:
            if not future.done():
                future.set_result(None)

    def _undo(self, batch: Batch, error: StoreError) -> None:
        """Nothing of it is there, nor can anything be that was decided on it since."""
        for lost in (batch, self._gathering):
            self._let_go(lost)
            for instance_id in lost.instances:
                self._kept.pop(instance_id, None)
            for future in lost.waiting:
                if not future.done():
                    future.set_exception(type(error)(error.message, remedy=error.remedy))
        self._gathering = Batch()
        self._find_ends()

    def _let_go(self, batch: Batch) -> None:
        for kept in batch.instances.values():
            kept.batches -= 1
        for name in batch.names:
            self._names.discard(name)
        for key in batch.key_names:
            self._keys.pop(key, None)

    # ------------------------------------------------------------------------------------------------------- reading

    def fence(self, instance_id: str) -> int | None:
        fence = self._fences.get(instance_id)
        if fence is None:
            found = self._read.instance(instance_id)
            return None if found is None else found[1].fence
        return fence

    async def instance(self, instance_id: str) -> Instance | None:
        kept = self._kept.get(instance_id)
        if kept is not None:
            return kept.committed
        found = self._read.instance(instance_id)
        return None if found is None else found[1]

    async def instance_named(self, project: str, name: str) -> Instance | None:
        instance_id = self._read.id_named(project, name)
        return None if instance_id is None else await self.instance(instance_id)

    async def instances(self, where: InstanceFilter, limit: int, cursor: str | None = None) -> Page:
        return self._read.instances(where, limit, cursor)

    async def unsettled(self, host: str | None = None) -> tuple[Instance, ...]:
        return self._read.unsettled(host)

    async def request(self, request_id: str) -> Request | None:
        return self._read.request(request_id)

    async def requests(self, instance_id: str, limit: int, cursor: str | None = None) -> Page:
        return self._read.requests(instance_id, limit, cursor)

    async def events(
        self, after: int, limit: int, instance_id: str | None = None, project: str | None = None
    ) -> tuple[Event, ...]:
        return self._read.events(after, limit, instance_id, project)

    async def last_event(self) -> int:
        return self._read.last("events", "sequence")


def _check_fingerprint(key: IdempotencyKey, fingerprint: str) -> None:
    if key.fingerprint != fingerprint:
        raise KeyReused(
            f"The idempotency key {key.key[:80]!r} was used for another request.",
            remedy="Use a new key for a new request.",
        )
