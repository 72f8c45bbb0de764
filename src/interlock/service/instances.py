"""Instances and what is asked of them: create, submit, cancel, describe, wait."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from interlock.core import admission, lifecycle
from interlock.core.claims import CLAIMING
from interlock.core.errors import GenerationMismatch, InterlockError, InUse, Invalid, NameTaken, NotFound
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    ENDS,
    Admitted,
    Cancellation,
    Change,
    Denied,
    Disposition,
    Event,
    Held,
    Instance,
    Redundant,
    Request,
    Submission,
)
from interlock.core.restart_policy import check_limit
from interlock.policies import explaining
from interlock.policies.in_force import PolicyInForce
from interlock.ports import IdempotencyKey, InstanceFilter, Page, Role, Store
from interlock.service import fitting, oversight
from interlock.service.answers import Answer, Stuck
from interlock.service.callers import Caller
from interlock.service.capacity import Capacity
from interlock.service.hosts import HostVerbs
from interlock.service.inventory import Inventory
from interlock.service.passwords import PasswordBox
from interlock.service.placing import Placing
from interlock.service.resolving import Resolving
from interlock.service.watching import EVERYTHING, Watch
from interlock.service.wishes import Labels, NewInstance, NewRequest, check_name, check_parameters, hold_ms, is_id

EVENTS_PAGE = 500


class _TurnedAway(Exception):
    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class Instances:
    """The verbs on instances and requests. Each takes the caller, for whom only its own project exists."""

    def __init__(
        self,
        store: Store,
        in_force: PolicyInForce,
        hosts: HostVerbs,
        inventory: Inventory,
        passwords: PasswordBox,
        new_id: Callable[[], str],
        capacity: Capacity,
        memory_mib_max: int,
    ) -> None:
        self._store = store
        self._in_force = in_force
        self._resolving = Resolving(inventory, memory_mib_max)
        self._passwords = passwords
        self._new_id = new_id
        self._hosts = hosts
        self._capacity = capacity
        self._placing = Placing(hosts, capacity)
        self._naming = asyncio.Lock()
        self.watch = Watch()
        self._unlisten = store.listen(self.watch.ring)
        store.listen(passwords.heed)

    def close(self) -> None:
        """Release everyone who waits."""
        self._unlisten()
        self.watch.close()

    def now_ms(self) -> int:
        return self._store.now_ms()

    @property
    def policy(self) -> CompiledPolicy:
        """The policy in force at this moment."""
        return self._in_force.compiled

    # ------------------------------------------------------------------------------------------------- submitting

    async def create(self, caller: Caller, wish: NewInstance, key: str | None = None) -> Answer:
        """Record a new instance and, unless it is not to be started, admit its creation.

        The disposition is `Redundant` with the rule `recorded` when there was nothing to start.

        Raises:
            Invalid, NotFound (image or host), NameTaken, KeyReused, NoRoom, InUse (a host's port), Unavailable.
        """
        caller.require(Role.MEMBER, "create instances")
        check_name(wish.name, "name")
        check_limit(wish.restart)
        spec = await self._resolving.new_spec(caller, wish)
        hosts = self._placing.named(wish.host)
        shared = await self._hosts.shared_folder(hosts)
        instance_id = self._new_id()
        submission = self._submission(caller, Operation.CREATE, {})

        def decide(now_ms: int) -> Change[Disposition]:
            instance = Instance(
                id=instance_id,
                name=wish.name,
                project=caller.project,
                host=hosts[0],
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
                tags=wish.tags,
                blocked_operations=wish.blocked_operations,
                restart=wish.restart,
                spec=spec,
            )
            instance = self._placing.put(instance, hosts, shared)
            facts = {"name": instance.name, "by": caller.name, "vm_state": instance.vm_state.value}
            created = _event("instance.created", instance, now_ms, facts)
            if not wish.start:
                recorded = Redundant(
                    rule="recorded", reason="recorded", because="Recorded; a start makes and boots it."
                )
                self._capacity.claim(instance)
                return Change(instance=instance, events=(created,), answer=recorded)
            change = admission.admit(instance, submission, self.policy, now_ms)
            if not isinstance(change.answer, Admitted):
                raise _TurnedAway(Answer(disposition=change.answer, instance=instance))
            self._capacity.claim(instance)
            return msgspec.structs.replace(change, events=(created, *change.events))

        try:
            async with self._resolving.giving(spec.image.id), self._capacity.deciding(instance_id):
                disposition = await self._store.create(decide, _key(caller, key, "create", wish))
        except _TurnedAway as refusal:
            return refusal.answer
        if isinstance(disposition, Admitted):
            instance_id = disposition.request.instance_id
            kept = await self._store.instance(instance_id)
        else:
            kept = await self._store.instance_named(caller.project, wish.name)
        if kept is None:
            raise NotFound(f"The instance {wish.name} was deleted meanwhile.")
        return Answer(disposition=disposition, instance=kept)

    async def submit(
        self,
        caller: Caller,
        reference: str,
        wish: NewRequest,
        key: str | None = None,
        if_generation: int | None = None,
    ) -> Answer:
        """Ask for an operation. What the gate says comes back as a value, also when it refuses.

        Raises:
            Invalid, NotFound (instance, or what is named), GenerationMismatch, KeyReused, InUse (volume), NameTaken,
            NoRoom.
        """
        # A name is free only until somebody else asks for it.
        async with self._naming if wish.operation is Operation.SNAPSHOT else contextlib.nullcontext():
            return await self._submit(caller, reference, wish, key, if_generation)

    async def _submit(
        self, caller: Caller, reference: str, wish: NewRequest, key: str | None, if_generation: int | None
    ) -> Answer:
        caller.require(Role.MEMBER, "change instances")
        parameters = check_parameters(wish.operation, wish.parameters)
        instance_id = reference if is_id(reference) else (await self.describe(caller, reference)).id
        unusable: InterlockError | None = None
        targets: tuple[str, ...] = ()
        try:
            parameters = await self._resolving.parameters(caller, wish.operation, instance_id, parameters)
            targets = self._placing.targets(wish.operation, parameters)
        except (InUse, NotFound, NameTaken, Invalid) as error:
            # What a key was answered with stays its answer, whatever has become since of what it named.
            unusable = error
        password = parameters.pop("password", None)
        submission = msgspec.structs.replace(
            self._submission(caller, wish.operation, parameters), hold_ms=hold_ms(wish.hold)
        )
        judged: list[Instance] = []

        def decide(instance: Instance, now_ms: int) -> Change[Disposition]:
            if instance.project != caller.project:
                raise _unknown(reference)
            if unusable is not None:
                raise unusable
            _check_generation(instance, if_generation)
            fitting.check(instance, wish.operation, parameters)
            reached = msgspec.structs.replace(submission, host_reachable=self._hosts.reachable(instance.host))
            bound = self._placing.bound(instance, reached, targets, self.policy, now_ms)
            change = admission.admit(instance, bound, self.policy, now_ms)
            fitting.check_same(instance, change.answer, wish.operation, bound.parameters)
            if claims and isinstance(change.answer, Admitted | Held):
                self._capacity.claim(change.instance)
            judged[:] = [change.instance]
            return change

        key_kept = _key(caller, key, instance_id, _as_recorded(wish))
        claims = wish.operation in CLAIMING
        with self._passwords.offered(submission, password) as offer:
            deciding = self._capacity.deciding(instance_id) if claims else contextlib.nullcontext()
            async with self._resolving.giving(None if unusable else parameters.get("image")), deciding:
                disposition = await self._store.change(instance_id, decide, key_kept)
            offer.settle(disposition)
        instance = judged[0] if judged else await self.describe(caller, instance_id)
        answer = Answer(disposition=disposition, instance=instance, password=offer.made_up)
        return self.with_ways_out(caller, answer)

    def with_ways_out(self, caller: Caller, answer: Answer) -> Answer:
        """The answer with what would be admitted instead, if it is a refusal."""
        if not isinstance(answer.disposition, Denied):
            return answer
        allowed = explaining.granted(self._answers(caller, answer.instance))
        return msgspec.structs.replace(answer, allowed_instead=allowed)

    def _answers(self, caller: Caller, instance: Instance) -> dict[Operation, Disposition]:
        by, there = (caller.role.value, caller.name), self._hosts.reachable(instance.host)
        return explaining.dispositions(instance, *by, self.policy, self._store.now_ms(), host_reachable=there)

    def _submission(self, caller: Caller, operation: Operation, parameters: dict[str, Any]) -> Submission:
        return Submission(
            request_id=self._new_id(),
            operation=operation,
            parameters=parameters,
            requested_by=caller.name,
            role=caller.role.value,
        )

    async def relabel(
        self, caller: Caller, reference: str, labels: Labels, if_generation: int | None = None
    ) -> Instance:
        """Change what an owner may at any time. Raises `Invalid`, `NotFound`, `Forbidden`, `GenerationMismatch`."""
        caller.require(Role.MEMBER, "change instances")
        check_limit(labels.restart)
        instance_id = (await self.describe(caller, reference)).id

        def decide(instance: Instance, now_ms: int) -> Change[Instance]:
            _check_generation(instance, if_generation)
            return lifecycle.relabel(instance, caller.name, now_ms, **msgspec.structs.asdict(labels))

        return await self._store.change(instance_id, decide)

    async def cancel(self, caller: Caller, request_id: str) -> tuple[Cancellation, Request]:
        """Withdraw a request, and say what became of that with the request as it is now. Raises `NotFound`."""
        caller.require(Role.MEMBER, "cancel requests")
        request = await self.request(caller, request_id)

        def decide(instance: Instance, now_ms: int) -> Change[Cancellation]:
            return lifecycle.cancel(instance, request_id, self._in_force.for_waiting(instance), caller.name, now_ms)

        outcome = await self._store.change(request.instance_id, decide)
        return outcome, await self.request(caller, request_id)

    # ------------------------------------------------------------------------------------------------- describing

    async def describe(self, caller: Caller, reference: str) -> Instance:
        """The instance of that id or name. Raises `NotFound`."""
        if is_id(reference):
            instance = await self._store.instance(reference)
        else:
            instance = await self._store.instance_named(caller.project, reference)
        if instance is None or instance.project != caller.project:
            raise _unknown(reference)
        return instance

    async def wait(self, caller: Caller, reference: str, after_generation: int, wait_ms: int) -> Instance:
        """The instance as soon as its generation is greater than that, or as it is when the time has passed."""
        instance = await self.describe(caller, reference)

        async def newer() -> Instance | None:
            latest = await self._store.instance(instance.id)
            return latest if latest is not None and latest.generation > after_generation else None

        found = await self.watch.until(instance.id, newer, wait_ms)
        return found if found is not None else await self.describe(caller, instance.id)

    async def list(self, caller: Caller, where: InstanceFilter, limit: int, cursor: str | None) -> Page:
        """The caller's instances, oldest first. Raises `Invalid` for a cursor that no page gave."""
        return await self._store.instances(msgspec.structs.replace(where, project=caller.project), limit, cursor)

    async def request(self, caller: Caller, request_id: str, wait_ms: int = 0) -> Request:
        """The request, as soon as it has ended or the time has passed. Raises `NotFound`."""
        request = await self._store.request(request_id)
        if request is None or (await self._store.instance(request.instance_id) or _NOBODYS).project != caller.project:
            raise NotFound(f"There is no request {request_id[:80]}.")
        if wait_ms <= 0 or request.status in ENDS:
            return request

        async def ended() -> Request | None:
            latest = await self._store.request(request_id)
            return latest if latest is not None and latest.status in ENDS else None

        found = await self.watch.until(request.instance_id, ended, wait_ms)
        return found or await self._store.request(request_id) or request

    async def requests(self, caller: Caller, reference: str, limit: int, cursor: str | None) -> Page:
        """The instance's requests, newest first. Raises `NotFound`, or `Invalid` for a wrong cursor."""
        instance = await self.describe(caller, reference)
        return await self._store.requests(instance.id, limit, cursor)

    async def allowed(self, caller: Caller, reference: str) -> tuple[Instance, dict[Operation, Disposition]]:
        """What the gate would say now to each operation, from this caller. Raises `NotFound`."""
        instance = await self.describe(caller, reference)
        return instance, self._answers(caller, instance)

    async def stuck(self, caller: Caller | None) -> tuple[Stuck, ...]:
        """The caller's instances that something could take over now, those silent longest first.

        Without a caller (for the server's own figures): those of all projects.
        """
        return await oversight.stuck(self._store, self.policy, caller, self._hosts.reachable)

    async def census(self) -> tuple[dict[str, int], int]:
        """How many instances of all projects there are by vm_state, and how many requests are outstanding."""
        return await oversight.census(self._store)

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Have `listener` hear of every event of this server, whatever its project."""
        self._store.listen(listener)

    # ---------------------------------------------------------------------------------------------------- events

    async def events(self, caller: Caller, reference: str, after: int, limit: int) -> tuple[Event, ...]:
        """The instance's events with a greater sequence than `after`, in order. Raises `NotFound`."""
        instance = await self.describe(caller, reference)
        return await self._store.events(after, limit, instance_id=instance.id)

    async def last_event(self) -> int:
        """The sequence of the newest event."""
        return await self._store.last_event()

    async def follow(
        self, caller: Caller, after: int, idle_ms: int, instance_id: str | None = None
    ) -> AsyncIterator[tuple[Event, ...]]:
        """The project's events after that sequence as they come, in order; an empty tuple after each idle time.

        Ends when the server does.
        """

        async def more() -> tuple[Event, ...] | None:
            return await self._store.events(after, EVENTS_PAGE, instance_id=instance_id, project=caller.project) or None

        while not self.watch.closed:
            events = await self.watch.until(instance_id or EVERYTHING, more, idle_ms) or ()
            yield events
            if events:
                after = events[-1].sequence


_NOBODYS = Instance(id="", name="", project="", host="")


def _check_generation(instance: Instance, wanted: int | None) -> None:
    if wanted is not None and instance.generation != wanted:
        raise GenerationMismatch(
            f"The instance is at generation {instance.generation}, not {wanted}.",
            remedy="Read it again, and decide on what it is now.",
        )


def _event(kind: str, instance: Instance, now_ms: int, data: dict[str, Any]) -> Event:
    return Event(kind=kind, instance_id=instance.id, at_ms=now_ms, generation=instance.generation, data=data)


def _unknown(reference: str) -> NotFound:
    return NotFound(f"There is no instance {reference[:80]}.", remedy="List them with `interlock vm list`.")


def _as_recorded(wish: NewRequest) -> NewRequest:
    """The wish without what must not be kept in any form."""
    if "password" not in wish.parameters:
        return wish
    parameters = {name: value for name, value in wish.parameters.items() if name != "password"}
    return msgspec.structs.replace(wish, parameters=parameters)


def _key(caller: Caller, key: str | None, target: str, wish: msgspec.Struct) -> IdempotencyKey | None:
    if key is None:
        return None
    fingerprint = hashlib.sha256(target.encode() + b"\0" + msgspec.json.encode(wish)).hexdigest()
    return IdempotencyKey(scope=caller.token_id, key=key, fingerprint=fingerprint)
