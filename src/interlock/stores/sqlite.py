"""The store in one SQLite file: decisions in memory, in order, and one fsync for as many as come at once.

A decision is made on the event loop, on the instance as the decision before it left it, and its rows are gathered.
Whenever the writer is free it gets what has been gathered, as one transaction. Nobody is answered, and no event is
told, before the transaction is on the disk; if it fails, so does everything that was built on it, and the memory goes
back to what the disk holds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec.structs import force_setattr

from interlock.core.errors import BrokenInvariant, NameTaken, NotFound, StoreClosed, StoreError
from interlock.core.records import Change, Event, Instance, Request
from interlock.core.states import VmState
from interlock.ports import Clock, IdempotencyKey, InstanceFilter, Page
from interlock.stores import rows
from interlock.stores.batch import Batch, Kept
from interlock.stores.clock import StoreClock, SystemClock
from interlock.stores.database_file import DatabaseFile
from interlock.stores.hosts import SqliteHosts
from interlock.stores.reading import Reader
from interlock.stores.rows import Row
from interlock.stores.statements import FORGET_KEYS, SEEN
from interlock.stores.writer import Writer

AnswerT = TypeVar("AnswerT")

INSTANCES_IN_MEMORY: Final = 20_000
KEY_KEPT_MS: Final = 24 * 3_600_000
"""For how long an idempotency key is remembered."""
DECISIONS_PER_TRANSACTION: Final = 2_000
"""How many decisions share one transaction at most; those beyond wait for the next."""
_PRUNE_EVERY_MS: Final = 3_600_000


class SqliteStore(SqliteHosts):
    """Satisfies `ports.Store`. All of it is used from one event loop."""

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        """Name the database file; `clock` is the system's unless a test brings another."""
        self._file = DatabaseFile(path)
        self._system_clock = clock
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self._kept: dict[str, Kept] = {}
        self._fences: dict[str, int] = {}
        self._names: dict[tuple[str, str], Kept] = {}
        """Names that are on their way to the disk."""
        self._keys: dict[tuple[str, str], tuple[str, Any, Batch]] = {}
        self._for_room: list[asyncio.Future[None]] = []
        self._closing = False
        self._gathering = Batch()
        self._writing: Batch | None = None
        self._flush_due = False

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
        self._closing = True
        while not self._gathering.empty or self._writing is not None:
            await self.settled()
        seen_ms = self._clock.now_ms()
        self._writer.submit(lambda connection: connection.execute(SEEN, (seen_ms,)).fetchall(), lambda *_: None)
        await self._writer.close()
        self._read.close()
        self._file.let_go()

    async def settled(self) -> None:
        batch = self._writing if self._gathering.empty else self._gathering
        with contextlib.suppress(StoreError):
            await self._wait(batch)

    def now_ms(self) -> int:
        return self._clock.now_ms()

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # ------------------------------------------------------------------------------------------------------ deciding

    async def create(self, decide: Callable[[int], Change[AnswerT]], key: IdempotencyKey | None = None) -> AnswerT:
        if key is not None and (kept := await self._answer_of(key)) is not None:
            return kept  # type: ignore[no-any-return]
        await self._room()
        now_ms = self._clock.now_ms()
        change = decide(now_ms)
        if self._find(change.instance.id) is not None:
            raise BrokenInvariant(f"There is an instance {change.instance.id[:80]} already.")
        self._check_name(change.instance)
        created = Kept(self._last_instance + 1, change.instance, None, committed=False)
        return await self._keep(created, None, change, key, now_ms)

    def _check_name(self, instance: Instance) -> None:
        """Raise `NameTaken` if another instance lives under the name, or is about to."""
        name = (instance.project, instance.name)
        kept = self._names.get(name)
        if kept is not None and kept.latest.vm_state is not VmState.DELETED:
            taken = kept.latest.id != instance.id
        else:
            taken = self._lives(*name)
        if taken:
            raise NameTaken(
                f"The project {name[0]} has an instance named {name[1]} already.",
                remedy="Choose another name, or delete that one.",
            )

    def _lives(self, project: str, name: str) -> bool:
        instance_id = self._read.id_named(project, name)
        if instance_id is None:
            return False
        latest = self._kept[instance_id].latest if instance_id in self._kept else None
        return latest is None or (latest.vm_state is not VmState.DELETED and latest.name == name)

    async def change(
        self,
        instance_id: str,
        decide: Callable[[Instance, int], Change[AnswerT]],
        key: IdempotencyKey | None = None,
    ) -> AnswerT:
        if key is not None and (answer := await self._answer_of(key)) is not None:
            return answer  # type: ignore[no-any-return]
        await self._room()
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
        instance = change.instance
        texts = rows.Texts(change, before, key)
        if before is not None and instance.name != before.name:
            self._check_name(instance)
        # From here on nothing can go wrong before the disk is asked.
        batch = self._gathering
        batch.decisions += 1
        batch.seen_ms = now_ms
        if instance.id not in batch.instances:
            batch.instances[instance.id] = kept
            kept.batches += 1
        if before is None:
            self._last_instance = kept.seq
            self._kept[instance.id] = batch.new_instances[instance.id] = kept
        for request, text in zip(change.requests, texts.requests, strict=True):
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
            self._gather_key(batch, key, change.answer, texts.answer, now_ms)
        await self._wait(batch)
        return change.answer

    def _gather_instance(
        self, batch: Batch, kept: Kept, before: Instance | None, instance: Instance, text: str
    ) -> None:
        kept.latest = instance
        batch.results[instance.id] = (instance, text, kept.last_request)
        if instance.tags != (before.tags if before is not None else ()):
            batch.tags[kept.seq] = instance.tags
        if before is None or instance.name != before.name:
            name = (instance.project, instance.name)
            self._names[name] = kept
            batch.names.append(name)

    def _gather_request(self, batch: Batch, kept: Kept, before: Instance | None, request: Request, text: str) -> None:
        known = batch.new_requests.get(request.id)
        if known is not None:
            batch.new_requests[request.id] = (*known[:5], request.status.value, known[6], text)
        elif rows.is_new(request, before):
            self._last_request = seq = self._last_request + 1
            batch.new_requests[request.id] = (
                *(seq, request.id, kept.seq, kept.last_request, request.operation.value),
                *(request.status.value, request.admitted_at_ms, text),
            )
            kept.last_request = seq
        else:
            batch.requests[request.id] = (request.id, request.status.value, text)

    # ---------------------------------------------------------------------------------------------- idempotency keys

    async def _answer_of(self, key: IdempotencyKey) -> Any:
        """The answer that was kept with a key, or None. Raises `KeyReused`."""
        pending = self._keys.get((key.scope, key.key))
        if pending is not None:
            fingerprint, answer, batch = pending
            rows.check_fingerprint(key, fingerprint)
            await self._wait(batch)
            return answer
        kept = self._read.key(key.scope, key.key, self._clock.now_ms() - KEY_KEPT_MS)
        if kept is None:
            return None
        rows.check_fingerprint(key, kept[0])
        return rows.decode_answer(kept[1])

    def _gather_key(self, batch: Batch, key: IdempotencyKey, answer: object, text: str, now_ms: int) -> None:
        batch.key_values += (key.scope, key.key, key.fingerprint, text, now_ms)
        batch.key_names.append((key.scope, key.key))
        self._keys[(key.scope, key.key)] = (key.fingerprint, answer, batch)
        if now_ms - self._pruned_at_ms > _PRUNE_EVERY_MS:
            self._pruned_at_ms = now_ms
            oldest = now_ms - KEY_KEPT_MS
            self._writer.submit(
                lambda connection: connection.execute(FORGET_KEYS, (oldest,)).fetchall(), lambda *_: None
            )

    # ---------------------------------------------------------------------------------------------------- committing

    async def _room(self) -> None:
        """Return when the next transaction can take one more decision. Raises `StoreError` once the store closes."""
        while self._gathering.decisions >= DECISIONS_PER_TRANSACTION and not self._closing:
            room: asyncio.Future[None] = self._loop.create_future()
            self._for_room.append(room)
            await room
        if self._closing:
            raise StoreClosed("The store is closed.", remedy="Ask again when the server is up.")

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
        self._writer.submit(batch.write, lambda filed, error: self._written(batch, filed, error))
        for room in self._for_room:
            if not room.done():
                room.set_result(None)
        self._for_room.clear()

    def _written(self, batch: Batch, filed: dict[str, Row], error: StoreError | None) -> None:
        self._writing = None
        if error is None:
            for instance_id, columns in filed.items():
                batch.instances[instance_id].filed = columns
            self._commit(batch)
        else:
            self._undo(batch, error)
        if not self._gathering.empty:
            self._flush()

    def _commit(self, batch: Batch) -> None:
        """What was on its way is there: readers see it, listeners hear of it, and those who wait go on."""
        for instance_id, (instance, _, _) in batch.results.items():
            batch.instances[instance_id].committed = instance
            self._fences[instance_id] = instance.fence
            if instance.vm_state is VmState.DELETED:
                del self._fences[instance_id]
        self._let_go(batch)
        if batch.events:
            for listener in tuple(self._listeners):
                try:
                    listener(batch.events)
                except Exception as error:  # noqa: BLE001 - whoever waits for the commit must not suffer from it
                    context = {"message": "A listener of the store failed.", "exception": error}
                    self._loop.call_exception_handler(context)
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
        for changed in batch.instances.values():
            changed.batches -= 1
        for name in batch.names:
            kept = self._names.get(name)
            if kept is not None and not kept.batches:
                del self._names[name]
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
