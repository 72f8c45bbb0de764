"""Instances and requests: create, submit, cancel, describe, list, wait, follow events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from interlock.core import admission, lifecycle
from interlock.core.errors import (
    GenerationMismatch,
    InterlockError,
    InUse,
    Invalid,
    NameTaken,
    NotFound,
    name_taken,
    not_found,
)
from interlock.core.evacuation import losses
from interlock.core.holds import ApprovalOutcome
from interlock.core.labels import check_tags
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.parameters import Refers, check_name, is_id
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    ENDS,
    NO_FACTS,
    Admitted,
    Cancellation,
    Change,
    Denied,
    Disposition,
    Event,
    Facts,
    Held,
    Instance,
    Redundant,
    Request,
    Submission,
)
from interlock.core.references import REFERENCES
from interlock.core.restart_policy import check_limit
from interlock.core.roles import Role
from interlock.core.scheduled_actions import UpkeepTimes
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.explanation import explainer
from interlock.ports import GuestInterface, InstanceFilter, Page, Store
from interlock.service import approvals, fleet_status
from interlock.service.auth import Caller
from interlock.service.capacity import Capacity
from interlock.service.change_notifier import ChangeNotifier
from interlock.service.hosts import HostService
from interlock.service.idempotency import as_recorded, idempotency_key, submitted_before
from interlock.service.inventory import Inventory
from interlock.service.networks import Networks
from interlock.service.passwords import PendingPasswords
from interlock.service.reference_resolver import ReferenceResolver, ResolvedSubmission
from interlock.service.request_models import Labels, NewInstance, NewRequest, check_parameters, hold_ms
from interlock.service.scheduler import Scheduler
from interlock.service.short_ids import full_id
from interlock.service.submission_evaluation import SubmissionEvaluator
from interlock.service.submission_results import Stuck, SubmissionResult, TurnedAway

_NAMES_AN_IMAGE = frozenset(
    operation for operation, named in REFERENCES.items() if any(refers is Refers.NEW_IMAGE for _, refers in named)
)


class Instances:
    """Operations on instances and requests, limited to the caller's project."""

    def __init__(
        self,
        store: Store,
        in_force: PolicyInForce,
        hosts: HostService,
        inventory: Inventory,
        passwords: PendingPasswords,
        new_id: Callable[[], str],
        capacity: Capacity,
        networks: Networks,
        memory_mib_max: int,
    ) -> None:
        self._store = store
        self._in_force = in_force
        self._references = ReferenceResolver(inventory, networks, memory_mib_max)
        self._networks = networks
        self._passwords = passwords
        self._new_id = new_id
        self._hosts = hosts
        self._capacity = capacity
        self._scheduler = Scheduler(hosts, capacity)
        self._evaluator = SubmissionEvaluator(in_force, hosts, self._scheduler, capacity, store, networks)
        self._naming = asyncio.Lock()
        self.watch = ChangeNotifier()
        self.shown_ms = store.shown_ms
        """Converts a time of the store to wall-clock time for display."""
        self._unlisten = store.listen(self.watch.notify)
        store.listen(passwords.on_events)

    def close(self) -> None:
        """Release all waiting tasks."""
        self._unlisten()
        self.watch.close()

    def now_ms(self) -> int:
        return self._store.now_ms()

    def upkeep_times(self, times: UpkeepTimes) -> UpkeepTimes:
        """Add the time before which no irreversible scheduled action runs."""
        return msgspec.structs.replace(times, not_before_ms=self._store.time.cautious_until_ms)

    @property
    def policy(self) -> CompiledPolicy:
        """The policy in force at this moment."""
        return self._in_force.compiled

    async def create(self, caller: Caller, new: NewInstance, key: str | None = None) -> SubmissionResult:
        """Record a new instance and, if `start` is set, submit its creation.

        The disposition is `Redundant` with the rule `recorded` if it is not started.

        Raises:
            Forbidden, Invalid, NotFound (image, network or host), NameTaken, KeyReused, InsufficientCapacity,
            QuotaExceeded, InUse (a host's port, an address), Unavailable.
        """
        caller.require(Role.MEMBER, "create instances")
        check_name(new.name, "name")
        check_limit(new.restart)
        check_tags(self.policy, caller.role, (), new.tags)
        spec = await self._references.new_spec(caller, new)
        hosts = self._scheduler.named(new.host)
        shared = await self._hosts.shared_folder(hosts)
        instance_id = self._new_id()
        submission = self._submission(caller, Operation.CREATE, {})

        def decide(now_ms: int) -> Change[Disposition]:
            instance = Instance(
                id=instance_id,
                name=new.name,
                project=caller.project,
                host=hosts[0],
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
                tags=new.tags,
                blocked_operations=new.blocked_operations,
                restart=new.restart,
                evacuate=new.evacuate,
                apart_from=tuple(dict.fromkeys(new.apart_from)),
                spec=self._networks.leased(spec, instance_id, new.name, caller.project),
            )
            instance = self._scheduler.put(instance, hosts, shared)
            instance = instance if new.start else self._evaluator.not_started(instance, submission, now_ms)
            facts = {"name": instance.name, "by": caller.name, "vm_state": instance.vm_state.value}
            created = _event("instance.created", instance, now_ms, facts)
            if not new.start:
                self._evaluator.check_claims(instance, None, submission)
                return Change(instance=instance, events=(created,), answer=_RECORDED)
            change = admission.admit(instance, self._evaluator.counted(instance, submission), self.policy, now_ms)
            if not isinstance(change.answer, Admitted):
                raise TurnedAway(SubmissionResult(disposition=change.answer, instance=instance))
            self._evaluator.check_claims(change.instance, None, submission)
            return msgspec.structs.replace(change, events=(created, *change.events))

        try:
            async with self._references.giving(spec.image.id):
                disposition = await self._store.create(decide, idempotency_key(caller, key, "create", new))
        except TurnedAway as refusal:
            return refusal.answer
        if isinstance(disposition, Admitted):
            instance_id = disposition.request.instance_id
            kept = await self._store.instance(instance_id)
        else:
            kept = await self._store.instance_named(caller.project, new.name)
        if kept is None:
            raise NotFound(f"The instance {new.name} was deleted meanwhile.")
        return SubmissionResult(disposition=disposition, instance=kept)

    async def submit(
        self,
        caller: Caller,
        reference: str,
        new: NewRequest,
        key: str | None = None,
        if_generation: int | None = None,
    ) -> SubmissionResult:
        """Submit an operation. Returns the gate's disposition, also a denial.

        Raises:
            Invalid, NotFound (instance or reference), GenerationMismatch, KeyReused, InUse (volume), NameTaken,
            InsufficientCapacity, QuotaExceeded.
        """
        try:
            if new.operation not in _NAMES_AN_IMAGE:
                return await self._submit(caller, reference, new, key, if_generation)
            # Two snapshots submitted at once could otherwise both find their image's name free.
            async with self._naming:
                return await self._submit(caller, reference, new, key, if_generation)
        except NotFound:
            earlier = await submitted_before(self._store, caller, new, key)
            if earlier is None:
                raise
            return earlier

    async def _submit(
        self, caller: Caller, reference: str, new: NewRequest, key: str | None, if_generation: int | None
    ) -> SubmissionResult:
        caller.require(Role.MEMBER, "change instances")
        found = await self._resolve(caller, reference, new)
        secret = CATALOGUE[new.operation].parameters.secret
        password = None if secret is None else found.submission.parameters.pop(secret, None)
        judged: list[Instance] = []

        def decide(instance: Instance, now_ms: int) -> Change[Disposition]:
            found.check(caller, instance)
            _check_generation(instance, if_generation)
            change = self._evaluator.judge(instance, found.submission, found.targets, now_ms)
            judged[:] = [change.instance]
            return change

        key_kept = idempotency_key(caller, key, found.instance_id, as_recorded(new))
        with self._passwords.offered(found.submission, password) as offer:
            async with self._references.giving(found.image_id):
                disposition = await self._store.change(found.instance_id, decide, key_kept)
            offer.settle(disposition)
        instance = judged[0] if judged else await self.describe(caller, found.instance_id)
        loses: tuple[str, ...] = ()
        if new.operation is Operation.EVACUATE and isinstance(disposition, Admitted | Held):
            loses = losses(instance, from_image=bool(found.submission.parameters.get("from_image")))
        waits = isinstance(disposition, Admitted) and self._waits_for_host(disposition.request, instance.host)
        answer = SubmissionResult(
            disposition=disposition,
            instance=instance,
            loses=loses,
            waits_for_host=instance.host if waits else None,
            password=offer.made_up,
        )
        return self.with_ways_out(caller, answer)

    async def _resolve(self, caller: Caller, reference: str, new: NewRequest) -> ResolvedSubmission:
        """Resolve the references of a request. Raises `Invalid`, `NotFound` (instance)."""
        parameters = check_parameters(new.operation, new.parameters)
        instance_id = reference if is_id(reference) else (await self.describe(caller, reference)).id
        unusable: InterlockError | None = None
        targets: tuple[str, ...] = ()
        facts = NO_FACTS
        try:
            if parameters:
                parameters, facts = await self._references.parameters(caller, new.operation, instance_id, parameters)
            targets = self._scheduler.targets(new.operation, parameters)
            if CATALOGUE[new.operation].guest_agent:
                agent = await self._hosts.agent_answers(await self.describe(caller, instance_id))
                facts = msgspec.structs.replace(facts, agent_answers=agent)
        except (InUse, NotFound, NameTaken, Invalid) as error:
            # Raised in the decision only: a repeated idempotency key must return its first response, even if what the
            # request refers to is gone since.
            unusable = error
        submission = self._submission(caller, new.operation, parameters, facts, hold_ms(new.hold))
        return ResolvedSubmission(reference, instance_id, submission, targets, unusable)

    async def judge(self, caller: Caller, reference: str, new: NewRequest) -> SubmissionResult:
        """Evaluate a submission without recording or holding it (dry run). Raises as `submit`."""
        caller.require(Role.MEMBER, "change instances")
        found = await self._resolve(caller, reference, new)
        instance = await self.describe(caller, found.instance_id)
        found.check(caller, instance)
        submission = msgspec.structs.replace(found.submission, hold_ms=None, approvable=False)
        change = self._evaluator.judge(instance, submission, found.targets, self.now_ms())
        if change.instance.name != instance.name:
            await self._check_name(change.instance)
        return SubmissionResult(disposition=change.answer, instance=instance)

    async def _check_name(self, renamed: Instance) -> None:
        """Raise `NameTaken` if another instance has the name, as the store would."""
        if await self._store.instance_named(renamed.project, renamed.name) is not None:
            raise name_taken(renamed.project, renamed.name)

    def _waits_for_host(self, request: Request, host: str) -> bool:
        """Whether a request needs a host that is not connected now."""
        elsewhere = request.operation is Operation.EVACUATE or not self._hosts.leases.reachable(host)
        return request.lane is not Lane.RECORD and not elsewhere and not self._hosts.connections.linked(host)

    def with_ways_out(self, caller: Caller, answer: SubmissionResult) -> SubmissionResult:
        """Add to a denial the operations that would be admitted now."""
        if not isinstance(answer.disposition, Denied):
            return answer
        # A denial does not query the guest agent, so operations that need one are left out.
        found = self._evaluator.answers(answer.instance, caller.identity, agent_answers=False)
        return msgspec.structs.replace(answer, allowed_instead=explainer.granted(found))

    def _submission(
        self,
        caller: Caller,
        operation: Operation,
        parameters: dict[str, Any],
        facts: Facts = NO_FACTS,
        hold_ms: int | None = None,
    ) -> Submission:
        return Submission(
            request_id=self._new_id(),
            operation=operation,
            parameters=parameters,
            **caller.identity,
            image="" if facts.image is None else facts.image.name,
            approvable=operation is not Operation.CREATE,
            facts=facts,
            hold_ms=hold_ms,
        )

    async def relabel(
        self, caller: Caller, reference: str, labels: Labels, if_generation: int | None = None
    ) -> Instance:
        """Change an instance's labels. Raises `Invalid`, `NotFound`, `Forbidden`, `GenerationMismatch`."""
        caller.require(Role.MEMBER, "change instances")
        check_limit(labels.restart)
        instance_id = (await self.describe(caller, reference)).id

        def decide(instance: Instance, now_ms: int) -> Change[Instance]:
            _check_generation(instance, if_generation)
            policy, reachable = self._in_force.for_waiting(instance), self._hosts.leases.reachable(instance.host)
            named = msgspec.structs.asdict(labels)
            change = lifecycle.relabel(
                instance, policy, caller.name, now_ms, role=caller.role, host_reachable=reachable, **named
            )
            if labels.apart_from is not None:
                self._capacity.check_apart(change.instance, instance)
            return change

        return await self._store.change(instance_id, decide)

    async def cancel(self, caller: Caller, request_id: str) -> tuple[Cancellation, Request]:
        """Cancel a request; return the outcome and the request as it is now. Raises `NotFound`."""
        caller.require(Role.MEMBER, "cancel requests")
        request = await self.request(caller, request_id)

        def decide(instance: Instance, now_ms: int) -> Change[Cancellation]:
            policy, reachable = self._in_force.for_waiting(instance), self._hosts.leases.reachable(instance.host)
            return lifecycle.cancel(instance, request.id, policy, caller.name, now_ms, host_reachable=reachable)

        outcome = await self._store.change(request.instance_id, decide)
        return outcome, await self.request(caller, request.id)

    async def approve(self, caller: Caller, request_id: str) -> tuple[ApprovalOutcome, Request]:
        """As `approvals.approve`; return the outcome and the request as it is now. Raises `NotFound` too."""
        request = await self.request(caller, request_id)
        outcome = await approvals.approve(self._store, self.policy, self._hosts, caller, request)
        return outcome, await self.request(caller, request.id)

    async def describe(self, caller: Caller, reference: str) -> Instance:
        """Return an instance by id, short id or name. Raises `NotFound`, or `Invalid` for an ambiguous id."""
        if is_id(reference):
            instance = await self._store.instance(reference)
        else:
            instance = await self._store.instance_named(caller.project, reference)
            if instance is None:
                whole = await full_id(self._store, "instances", caller.project, reference)
                instance = None if whole is None else await self._store.instance(whole)
        if instance is None or instance.project != caller.project:
            raise not_found("VM", reference)
        return instance

    async def _describe_past(self, caller: Caller, reference: str) -> Instance:
        """As `describe`, or else the last deleted instance of that name. Raises `NotFound`."""
        try:
            return await self.describe(caller, reference)
        except NotFound:
            past = None if is_id(reference) else await self._store.deleted_named(caller.project, reference)
            if past is None:
                raise
            return past

    async def wait(self, caller: Caller, reference: str, after_generation: int, wait_ms: int) -> Instance:
        """Wait until the instance's generation exceeds `after_generation` or the time has passed; return it."""
        instance = await self.describe(caller, reference)

        async def newer() -> Instance | None:
            latest = await self._store.instance(instance.id)
            return latest if latest is not None and latest.generation > after_generation else None

        found = await self.watch.until(instance.id, newer, wait_ms)
        return found if found is not None else await self.describe(caller, instance.id)

    async def list(
        self, caller: Caller, where: InstanceFilter, limit: int, cursor: str | None, *, all_projects: bool = False
    ) -> Page:
        """Return the instances of the caller's project or, for an admin, of all projects, oldest first.

        Raises:
            Invalid: the cursor is invalid.
            Forbidden: `all_projects` without the role admin.
        """
        if all_projects:
            caller.require(Role.ADMIN, "list the instances of all projects")
        project = None if all_projects else caller.project
        return await self._store.instances(msgspec.structs.replace(where, project=project), limit, cursor)

    async def request(self, caller: Caller, request_id: str, wait_ms: int = 0) -> Request:
        """Wait until a request has ended or the time has passed; return it. Its id may be shortened (`short_ids`).

        Raises:
            NotFound, or Invalid for an ambiguous id.
        """
        request = await self._store.request(request_id, caller.project)
        if request is None:
            whole = await full_id(self._store, "requests", caller.project, request_id)
            request = None if whole is None else await self._store.request(whole, caller.project)
        if request is None:
            raise NotFound(f"Request not found: {request_id[:80]}.")
        if wait_ms <= 0 or request.status in ENDS:
            return request
        request_id = request.id

        async def ended() -> Request | None:
            latest = await self._store.request(request_id)
            return latest if latest is not None and latest.status in ENDS else None

        found = await self.watch.until(request.instance_id, ended, wait_ms)
        return found or await self._store.request(request_id) or request

    async def requests(self, caller: Caller, reference: str, limit: int, cursor: str | None) -> Page:
        """Return the instance's requests, newest first, also of a deleted one by its last name.

        Raises:
            NotFound, or Invalid for an invalid cursor.
        """
        instance = await self._describe_past(caller, reference)
        return await self._store.requests(instance.id, limit, cursor)

    async def allowed(self, caller: Caller, reference: str) -> tuple[Instance, dict[Operation, Disposition]]:
        """Return the gate's disposition of each operation, for this caller, now. Raises `NotFound`."""
        instance = await self.describe(caller, reference)
        agent = await self._hosts.agent_answers(instance)
        return instance, self._evaluator.answers(instance, caller.identity, agent_answers=agent)

    async def reported(self, caller: Caller, reference: str) -> tuple[Instance, tuple[GuestInterface, ...], str]:
        """Return the interfaces that the guest agent reports now; if none, also why. Raises `NotFound`."""
        instance = await self.describe(caller, reference)
        try:
            return instance, await self._hosts.connections.of(instance.host).agent_interfaces(instance.id), ""
        except InterlockError as error:
            return instance, (), error.message

    async def stuck(self, caller: Caller | None) -> tuple[Stuck, ...]:
        """As `fleet_status.stuck`."""
        by = {**({"requested_by": ""} if caller is None else caller.identity), "role": Role.ADMIN}
        lost = {condition.name: condition for condition in self._hosts.in_trouble()}
        return await fleet_status.stuck(
            self._store, self.policy, caller, lambda instance: self._evaluator.answers(instance, by), lost
        )

    async def troubled(self) -> dict[str, int]:
        """Count the guests in trouble of all projects, by trouble."""
        return await fleet_status.troubled(self._store)

    async def census(self) -> tuple[dict[str, int], int]:
        """Count the instances of all projects by vm_state, and the outstanding requests."""
        return await fleet_status.census(self._store)

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Call `listener` with every event, of all projects."""
        self._store.listen(listener)

    async def events(self, caller: Caller, reference: str, after: int, limit: int) -> tuple[Event, ...]:
        """Return the instance's events after a sequence number, in order, also of a deleted one by its last name.

        Raises `NotFound`.
        """
        instance = await self._describe_past(caller, reference)
        return await self._store.events(after, limit, instance_id=instance.id)

    async def last_event(self) -> int:
        """Return the sequence number of the newest event."""
        return await self._store.last_event()


_RECORDED = Redundant(rule="recorded", reason="recorded", because="Recorded; a start makes and boots it.")


def _check_generation(instance: Instance, wanted: int | None) -> None:
    if wanted is not None and instance.generation != wanted:
        raise GenerationMismatch(
            f"Generation mismatch: the VM {instance.name} is at generation {instance.generation}, not {wanted}.",
            remedy="Read it again and retry with its present generation.",
        )


def _event(kind: str, instance: Instance, now_ms: int, data: dict[str, Any]) -> Event:
    return Event(kind=kind, instance_id=instance.id, at_ms=now_ms, generation=instance.generation, data=data)
