"""Bulk moves of instances between hosts: evacuation, drain and rebalancing.

Each instance is moved by an ordinary request, so the gate can deny one while the others continue. Drains and automatic
evacuations are recomputed from the records after each change: only the drain or fence of the host is persistent, so
they continue after a restart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog

from interlock.config import HostsConfig
from interlock.core import admission, evacuation
from interlock.core.errors import InterlockError, Invalid, StoreClosed
from interlock.core.operations import Operation
from interlock.core.records import ENDS, Admitted, Denied, Event, Held, Instance, Redundant, Request, Status, Submission
from interlock.core.references import MIGRATIONS
from interlock.core.restart_policy import Evacuate
from interlock.core.restarts import SERVER_REQUESTER
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.ports import Drain, Host, HostState, InstanceFilter, Store, every_instance
from interlock.service.auth import Caller
from interlock.service.capacity import Capacity, ImaginedCapacity
from interlock.service.hosts import ANY, ON_NO_HOST, HostService
from interlock.service.instances import Instances
from interlock.service.pass_loop import PassLoop
from interlock.service.request_models import NewRequest
from interlock.service.scheduler import Scheduler

_LOG = structlog.get_logger(__name__)
_NOWHERE: Final = frozenset({VmState.DELETED, VmState.MIGRATED_OUT})
_RUNS: Final = frozenset({VmState.ACTIVE, VmState.PAUSED})
_ENDED: Final = frozenset(f"request.{end.value}" for end in ENDS)
_TRIGGERS: Final = _ENDED | {"instance.relabelled", "instance.state"}
_INTERVAL_MIN_S: Final = 0.1
"""Minimum time between two passes, which batches simultaneous events."""
_PLANNED: Final = "planned"
"""The request id of a dry run."""
_RETRY_MS_MAX: Final = 3_600_000


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """The planned or submitted move of one instance."""

    instance: Instance
    operation: Operation | None = None
    """The operation; None if none applies."""
    target: str | None = None
    """Target host; None if it stays."""
    request: Request | None = None
    """The request that was admitted, or was outstanding already."""
    reason: str | None = None
    """Why it stays; None if it moves."""
    losses: tuple[str, ...] = ()
    """Data that the move loses, as sentences for people."""


class _Action(msgspec.Struct, frozen=True):
    operation: Operation
    parameters: dict[str, Any]


class _Attempts(msgspec.Struct, frozen=True, kw_only=True):
    """Earlier attempts to move an instance."""

    times: int = 0
    """Number of submissions."""
    again_at_ms: int = 0
    reason: str | None = None
    submitted: bool = False


class HostMoves:
    """Plans and submits moves, for callers and automatically.

    Args:
        store: reads instances and requests.
        hosts: state of the hosts.
        instances: submits the requests.
        capacity: capacity of the hosts.
        config: limits, and the default for automatic evacuation.
        retry_ms: delay before a denied or failed move is submitted again; doubled each time.
    """

    def __init__(
        self,
        store: Store,
        hosts: HostService,
        instances: Instances,
        capacity: Capacity,
        config: HostsConfig,
        retry_ms: int,
    ) -> None:
        self._store = store
        self._hosts = hosts
        self._instances = instances
        self._capacity = capacity
        self._config = config
        self._retry_ms = retry_ms
        self._attempts: dict[str, _Attempts] = {}
        self._watched: set[str] = set()
        self._passes = PassLoop(
            "moves of hosts",
            self._pass,
            retry_ms,
            failed="failed to move instances off their hosts",
            broke="moves of instances broke",
            interval_min_s=_INTERVAL_MIN_S,
        )
        self._unlisten: Callable[[], None] | None = None

    async def open(self) -> None:
        """Start the task that drains and evacuates; resumes moves that a former server started."""
        self._unlisten = self._store.listen(self._on_events)
        self._hosts.connections.listen(self._on_host)
        self._passes.open()

    async def close(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
        await self._passes.close()

    # ----------------------------------------------------------------------------------------- requests of callers

    async def evacuate(
        self, caller: Caller, name: str, parameters: Mapping[str, Any], *, dry_run: bool
    ) -> tuple[Move, ...]:
        """Evacuate every instance of a fenced host, or return the plan.

        A dry run treats the host as fenced.

        Raises:
            Forbidden, NotFound, or Invalid if it is not fenced.
        """
        caller.require(Role.ADMIN, "evacuate hosts")
        host = self._hosts.known(name)
        if not dry_run and (host is None or host.state is not HostState.FENCED):
            raise Invalid(
                f"The host {name} is not fenced: its VMs may be running.",
                remedy=f"`interlock host drain {name}` moves the VMs of a host that is up; "
                f"`interlock host fence {name}` confirms that those of a lost host have ended.",
            )
        action = _Action(Operation.EVACUATE, {"host": ANY, **parameters})
        found = [instance async for instance in self._of(name, _NOWHERE)]
        if dry_run:
            hypothetical = self._capacity.imagined()
            return tuple([self._plan(caller.name, one, action, hypothetical, reachable=False) for one in found])
        return tuple([await self._submit(caller, one, action) for one in found])

    async def drain(self, caller: Caller, name: str, *, cold: bool) -> None:
        """Move all instances off a host and schedule no new ones there, until `undrain`.

        Durable when this returns; `left` returns the progress. Raises `Forbidden`, `NotFound`.
        """
        caller.require(Role.ADMIN, "drain hosts")
        await self._hosts.leases.set_drain(name, Drain(by=caller.name, since_ms=self._store.now_ms(), cold=cold))
        self._attempts.clear()
        self._passes.wake()

    async def undrain(self, caller: Caller, name: str) -> None:
        """End the drain of a host. Moves in progress continue. Raises `Forbidden`, `NotFound`."""
        caller.require(Role.ADMIN, "drain hosts")
        await self._hosts.leases.set_drain(name, None)

    async def drain_plan(self, caller: Caller, name: str, *, cold: bool) -> tuple[Move, ...]:
        """Return what a drain would do with each instance now. Raises `Forbidden`, `NotFound`."""
        caller.require(Role.ADMIN, "drain hosts")
        self._hosts.known(name)
        found = [instance async for instance in self._of(name, ON_NO_HOST)]
        hypothetical = self._capacity.imagined()
        return tuple([self._plan_drain(caller.name, one, hypothetical, cold=cold) for one in found])

    async def left(self, caller: Caller, name: str) -> tuple[Move, ...]:
        """Return the instances still on a drained or fenced host: their moves, or why they stay.

        Of all projects to an admin, and to others of their own.
        """
        caller.require(Role.READER, "see hosts")
        self._hosts.known(name)
        project = None if caller.role is Role.ADMIN else caller.project
        return tuple([await self._status(instance) async for instance in self._of(name, ON_NO_HOST, project)])

    async def _status(self, instance: Instance) -> Move:
        migrating = _migrating(instance)
        if migrating is not None:
            target = migrating.parameters.get("host")
            return Move(instance=instance, operation=migrating.operation, target=target, request=migrating)
        attempts = self._attempts.get(instance.id, _Attempts())
        reason = attempts.reason
        if reason is None and attempts.submitted:
            (last, *_) = (await self._store.requests(instance.id, 1, None)).items or (None,)
            if last is not None and last.status is Status.FAILED:
                reason = f"{last.operation.value} failed: {last.message}"
        return Move(instance=instance, reason=reason)

    async def rebalance(self, caller: Caller, *, dry_run: bool) -> tuple[Move, ...]:
        """Live-migrate instances from the hosts with most instances to those with fewest, or return the plan.

        Raises `Forbidden`.
        """
        caller.require(Role.ADMIN, "rebalance hosts")
        moves = await self._plan_rebalance(caller)
        if dry_run:
            return moves
        return tuple([await self._submit(caller, one.instance, _live(str(one.target))) for one in moves])

    async def progress(self, caller: Caller, request_ids: Sequence[str]) -> tuple[Request, ...]:
        """Return these requests, of any project. Raises `Forbidden`."""
        caller.require(Role.ADMIN, "follow moves between hosts")
        found = [await self._store.request(request_id) for request_id in request_ids]
        return tuple(one for one in found if one is not None)

    # ------------------------------------------------------------------------------------------------------ planning

    async def _of(self, name: str, without: frozenset[VmState], project: str | None = None) -> AsyncIterator[Instance]:
        async for instance in every_instance(self._store, InstanceFilter(host=name, project=project)):
            if instance.vm_state not in without:
                yield instance

    def _plan(
        self, by: str, instance: Instance, action: _Action, capacity: ImaginedCapacity, *, reachable: bool = True
    ) -> Move:
        """Return what a submission would lead to now; claims the target's share of `capacity`."""
        from_image = "from_image" in action.parameters
        losses = () if reachable else evacuation.losses(instance, from_image=from_image)
        try:
            scheduler = Scheduler(self._hosts, capacity)
            targets = scheduler.targets(action.operation, action.parameters)
            submission = Submission(
                request_id=_PLANNED,
                operation=action.operation,
                parameters=action.parameters,
                requested_by=by,
                role=Role.ADMIN,
                host_reachable=reachable,
            )
            facts = scheduler.facts(instance, submission, targets)
            submission = msgspec.structs.replace(submission, facts=facts)
            policy, now_ms = self._instances.policy, self._store.now_ms()
            bound = scheduler.bound(instance, submission, targets, policy, now_ms)
            change = admission.admit(instance, bound, policy, now_ms)
            if isinstance(change.answer, Admitted):
                capacity.claim(change.instance, instance)
        except InterlockError as error:
            return Move(instance=instance, operation=action.operation, reason=_text(error))
        move = _move(instance, action.operation, change.answer)
        return msgspec.structs.replace(move, losses=losses if move.reason is None else ())

    def _plan_drain(
        self, by: str, instance: Instance, capacity: ImaginedCapacity, *, cold: bool, live: bool = True
    ) -> Move:
        """Plan the move of a drained instance: live migration if it runs and `live`, else cold migration if `cold`."""
        if instance.outstanding or instance.held:
            migrating = _migrating(instance)
            if migrating is not None:
                target = str(migrating.parameters.get("host"))
                return Move(instance=instance, operation=migrating.operation, target=target, request=migrating)
            first = (*instance.outstanding, *instance.held)[0]
            reason = f"Its {first.operation.value} {first.id} is {first.status.value}; it is moved after that."
            return Move(instance=instance, reason=reason)
        if instance.vm_state in _RUNS and (live or not cold):
            move = self._plan(by, instance, _live(ANY), capacity)
            if move.reason is None or not cold:
                return move
        if not cold:
            reason = f"It is {instance.vm_state.value}, and is moved only by a drain with --cold."
            return Move(instance=instance, reason=reason)
        return self._plan(by, instance, _Action(Operation.MIGRATE, {"host": ANY}), capacity)

    async def _plan_rebalance(self, caller: Caller) -> tuple[Move, ...]:
        """Plan live migrations from the fullest to the emptiest host until their counts differ by at most one."""
        on: dict[str, list[Instance]] = {}
        for name in self._hosts.named(ANY):
            on[name] = [instance async for instance in self._of(name, ON_NO_HOST)]
        moves: list[Move] = []
        stay: set[str] = set()
        hypothetical = self._capacity.imagined()
        while (move := self._next_rebalance(caller, on, stay, hypothetical)) is not None:
            moves.append(move)
            stay.add(move.instance.id)
            on[move.instance.host].remove(move.instance)
            on[str(move.target)].append(move.instance)
        return tuple(moves)

    def _next_rebalance(
        self, caller: Caller, on: dict[str, list[Instance]], stay: set[str], capacity: ImaginedCapacity
    ) -> Move | None:
        by_count = sorted(on, key=lambda name: len(on[name]))
        for source in reversed(by_count):
            for target in by_count:
                if len(on[source]) - len(on[target]) <= 1:
                    break
                for instance in on[source]:
                    if instance.id in stay or instance.outstanding or instance.vm_state not in _RUNS:
                        continue
                    move = self._plan(caller.name, instance, _live(target), capacity)
                    if move.reason is None:
                        return move
        return None

    async def _submit(self, caller: Caller, instance: Instance, action: _Action) -> Move:
        owner = msgspec.structs.replace(caller, project=instance.project)
        request = NewRequest(operation=action.operation, parameters=action.parameters)
        try:
            result = await self._instances.submit(owner, instance.id, request)
        except StoreClosed:
            raise
        except InterlockError as error:
            return Move(instance=instance, operation=action.operation, reason=_text(error))
        return _move(result.instance, action.operation, result.disposition)

    # ---------------------------------------------------------------------------------------------- automatic moves

    def _on_host(self, _host: Host) -> None:
        self._passes.wake()

    def _on_events(self, events: Sequence[Event]) -> None:
        """Start another pass when an instance that is to move changed. A listener of the store."""
        for event in events:
            if event.instance_id in self._watched and event.kind in _TRIGGERS:
                if event.kind == "instance.relabelled":
                    self._attempts.pop(event.instance_id, None)
                self._passes.wake()

    async def _pass(self) -> bool:
        """Submit the moves that are due; return whether any instance still has to move."""
        leaving: list[tuple[Instance, Host]] = []
        for host in self._hosts.leases.to_leave():
            without = _NOWHERE if host.state is HostState.FENCED else ON_NO_HOST
            leaving += [(one, host) async for one in self._of(host.name, without) if self._must_leave(one, host)]
        self._watched = {instance.id for instance, _ in leaving}
        self._attempts = {key: one for key, one in self._attempts.items() if key in self._watched}
        moving = sum(_is_automatic(instance) for instance, _ in leaving)
        hypothetical = self._capacity.imagined()
        for instance, host in leaving:
            if _migrating(instance) is None and moving < self._config.moves_max:
                moving += await self._move_if_due(instance, host, hypothetical)
        return bool(leaving)

    def _must_leave(self, instance: Instance, host: Host) -> bool:
        if host.state is HostState.FENCED:
            return self._automatic_evacuation(instance) is not None
        return host.drain is not None

    def _automatic_evacuation(self, instance: Instance) -> _Action | None:
        match Evacuate(instance.evacuate or self._config.evacuate):
            case Evacuate.NEVER:
                return None
            case Evacuate.AUTO:
                return _Action(Operation.EVACUATE, {"host": ANY})
            case Evacuate.FROM_IMAGE:
                again = {"from_image": True} if evacuation.loses_root(instance) else {}
                return _Action(Operation.EVACUATE, {"host": ANY, **again})

    def _drain_now(self, instance: Instance, host: Host, capacity: ImaginedCapacity, *, live: bool) -> Move:
        if not self._hosts.connections.linked(host.name):
            reason = f"The agent of {host.name} is disconnected; the VM is moved once it reconnects."
            return Move(instance=instance, reason=reason)
        cold = host.drain is not None and host.drain.cold
        return self._plan_drain(SERVER_REQUESTER, instance, capacity, cold=cold, live=live)

    async def _move_if_due(self, instance: Instance, host: Host, capacity: ImaginedCapacity) -> bool:
        """Submit the move of an instance if it is due; return whether it moves now."""
        now_ms = self._store.now_ms()
        attempts = self._attempts.get(instance.id, _Attempts())
        if attempts.again_at_ms > now_ms:
            return False
        caller = Caller(token_id=SERVER_REQUESTER, name=SERVER_REQUESTER, role=Role.ADMIN, project=instance.project)
        evacuation_due = self._automatic_evacuation(instance) if host.state is HostState.FENCED else None
        if evacuation_due is not None:
            move = self._plan(SERVER_REQUESTER, instance, evacuation_due, capacity, reachable=False)
        else:
            move = self._drain_now(instance, host, capacity, live=not attempts.submitted)
        planned = move.reason is None and move.operation is not None and move.request is None
        if planned:
            # A move that would be denied is not submitted: each denial would be recorded.
            action = evacuation_due or _Action(move.operation or Operation.LIVE_MIGRATE, {"host": move.target or ANY})
            move = await self._submit(caller, instance, action)
        # A move that was not submitted may be planned again as soon as anything changes.
        wait_ms = min(_RETRY_MS_MAX, self._retry_ms << min(attempts.times, 20)) if planned else 0
        self._attempts[instance.id] = _Attempts(
            times=attempts.times + planned,
            again_at_ms=now_ms + wait_ms,
            reason=move.reason,
            submitted=attempts.submitted or planned,
        )
        if move.request is None:
            return False
        _LOG.info("automatic move submitted", instance=instance.id, host=host.name, request=move.request.id)
        return True


def _is_automatic(instance: Instance) -> bool:
    migrating = _migrating(instance)
    return migrating is not None and migrating.requested_by == SERVER_REQUESTER


def _live(target: str) -> _Action:
    return _Action(Operation.LIVE_MIGRATE, {"host": target})


def _migrating(instance: Instance) -> Request | None:
    """Return the request that moves the instance to another host, if there is one."""
    known = (*instance.outstanding, *instance.held)
    return next((request for request in known if request.operation in MIGRATIONS), None)


def _move(instance: Instance, operation: Operation, answer: Admitted | Redundant | Denied | Held) -> Move:
    match answer:
        case Admitted() | Held():
            request = None if answer.request.id == _PLANNED else answer.request
            target = answer.request.parameters.get("host")
            return Move(instance=instance, operation=operation, target=target, request=request)
        case Redundant():
            target = None if answer.request is None else answer.request.parameters.get("host")
            reason = (answer.because or answer.reason) if answer.request is None else None
            return Move(instance=instance, operation=operation, target=target, request=answer.request, reason=reason)
        case Denied():
            blocker = answer.blocked_by
            behind = f" ({blocker.operation.value} {blocker.id} is {blocker.status.value})" if blocker else ""
            why = f"{answer.because or answer.reason} {answer.remedy or ''}".rstrip()
            reason = f"{operation.value} denied: it is {answer.vm_state.value}{behind}. {why}"
            return Move(instance=instance, operation=operation, reason=reason)


def _text(error: InterlockError) -> str:
    return f"{error.message} {error.remedy}" if error.remedy else error.message
