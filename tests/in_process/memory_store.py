"""A store in memory: for a whole agent in virtual time, where a thread that writes would be overtaken by every wait.

It keeps what it is told as JSON, so that nothing lives on in it that a disk would not have kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec

from in_process.virtual_time import OneClock
from interlock.core import scheduled_actions
from interlock.core.errors import not_found
from interlock.core.records import Change, Event, Instance, Request
from interlock.core.states import VmState
from interlock.ports import IdempotencyKey, InstanceFilter, Page

AnswerT = TypeVar("AnswerT")


class _Empty:
    """A table without a row."""

    async def all(self, project: str | None = None) -> tuple[Any, ...]:
        return ()


class MemoryStore:
    """So much of `ports.Store` as a driver asks for."""

    def __init__(self, clock: OneClock) -> None:
        self._clock = clock
        self._instances: dict[str, bytes] = {}
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self.requests: dict[str, Request] = {}
        self.told: list[Event] = []
        self.time = SimpleNamespace(cautious_until_ms=0)
        self.volumes = _Empty()
        self.hosts: Any = self.volumes

    def now_ms(self) -> int:
        return self._clock.now_ms()

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def on_admission(self, _hint: Callable[[str], None]) -> Callable[[], None]:
        """A hint is only of use where a commit takes time."""
        return lambda: None

    async def create(self, decide: Callable[[int], Change[AnswerT]], key: IdempotencyKey | None = None) -> AnswerT:
        return self._keep(decide(self.now_ms()))

    async def change(
        self, instance_id: str, decide: Callable[[Instance, int], Change[AnswerT]], key: IdempotencyKey | None = None
    ) -> AnswerT:
        return self._keep(decide(self.now(instance_id), self.now_ms()))

    def _keep(self, change: Change[AnswerT]) -> AnswerT:
        self._instances[change.instance.id] = msgspec.json.encode(change.instance)
        self.requests |= {request.id: request for request in change.requests}
        self.told += change.events
        for listener in tuple(self._listeners):
            listener(change.events)
        return change.answer

    def now(self, instance_id: str) -> Instance:
        """The instance as it is."""
        if instance_id not in self._instances:
            raise not_found("VM", instance_id)
        return msgspec.json.decode(self._instances[instance_id], type=Instance)

    @property
    def ids(self) -> tuple[str, ...]:
        """Those of all instances, in the order in which they were made."""
        return tuple(self._instances)

    def fence(self, instance_id: str) -> int | None:
        return self.now(instance_id).fence if instance_id in self._instances else None

    async def instance(self, instance_id: str) -> Instance | None:
        return self.now(instance_id) if instance_id in self._instances else None

    async def instances(self, where: InstanceFilter, limit: int, cursor: str | None = None) -> Page:
        kept = (self.now(instance_id) for instance_id in self._instances)
        found = (one for one in kept if one.vm_state is not VmState.DELETED)
        there = (one for one in found if where.host in {None, one.host})
        states = (one for one in there if where.vm_state in {None, one.vm_state})
        return Page(items=tuple(one for one in states if not where.upkeep or scheduled_actions.concerns(one)))

    async def unsettled(self, host: str | None = None) -> tuple[Instance, ...]:
        there = (self.now(instance_id) for instance_id in self._instances)
        return tuple(one for one in there if one.unsettled)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a driver asked the store for {name}")
