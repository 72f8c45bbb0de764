"""Evaluates submissions: adds the facts about hosts and capacity to the record, and calls the gate.

Submissions and dry runs (`allowed`, `why`, what is allowed instead) use the same evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from interlock.core import admission, preconditions, view_classes
from interlock.core.errors import InsufficientCapacity, InterlockError, InUse, Invalid, NotFound, QuotaExceeded
from interlock.core.full_store import SERVED_WHEN_FULL
from interlock.core.holds import NOT_COUNTED
from interlock.core.operations import CATALOGUE, FIELDS, Operation
from interlock.core.records import Admitted, Change, Denied, Disposition, Facts, Held, Instance, Redundant, Submission
from interlock.core.resource_claims import CLAIMING
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.explanation import explainer
from interlock.ports import Store, counts_around
from interlock.service.capacity import Capacity
from interlock.service.hosts import ANY, HostService
from interlock.service.networks import Networks
from interlock.service.scheduler import NAMING_A_HOST, Scheduler
from interlock.service.submission_results import SubmissionResult, TurnedAway

_REASONS: Final[dict[type[InterlockError], str]] = {
    InUse: "in_use",
    Invalid: "invalid",
    InsufficientCapacity: "no_room",
    QuotaExceeded: "quota",
    NotFound: "not_found",
}
"""Reason codes for errors in a dry run."""
_PARTIAL: Final = frozenset(
    operation
    for operation, entry in CATALOGUE.items()
    if entry.parameters.required_any or any(field.required for field in FIELDS[operation])
)
"""The operations that require parameters."""


class SubmissionEvaluator:
    """Evaluates submissions with the active policy."""

    def __init__(
        self,
        in_force: PolicyInForce,
        hosts: HostService,
        scheduler: Scheduler,
        capacity: Capacity,
        store: Store,
        networks: Networks,
    ) -> None:
        self._in_force = in_force
        self._hosts = hosts
        self._scheduler = scheduler
        self._capacity = capacity
        self._store = store
        self._networks = networks

    def judge(
        self,
        instance: Instance,
        submission: Submission,
        targets: tuple[str, ...],
        now_ms: int,
        *,
        compare: bool = True,
    ) -> Change[Disposition]:
        """Return the gate's decision on a submission. Raises `InUse`, `InsufficientCapacity`, `QuotaExceeded`.

        `compare` is false if the parameters are not given, so that they cannot be compared to an earlier request's.
        """
        if submission.operation is Operation.UNSHELVE and instance.vm_state is VmState.SHELVED_OFFLOADED:
            instance = self._back_on_a_host(instance, submission, now_ms)
        reached = msgspec.structs.replace(
            submission,
            host_reachable=self._hosts.leases.reachable(instance.host),
            host_fenced_at_ms=self._hosts.leases.fenced_at_ms(instance.host),
            facts=self._scheduler.facts(instance, submission, targets),
        )
        reached = self.counted(instance, reached)
        bound = self._scheduler.bound(instance, reached, targets, self._in_force.compiled, now_ms)
        bound = self._networks.bound(instance, bound)
        change = admission.admit_there(instance, bound, self._in_force.for_instance(instance), now_ms)
        if compare:
            _check_same(instance, change.answer, bound.operation, bound.parameters)
        if isinstance(change.answer, Admitted | Held):
            self.check_claims(change.instance, instance, bound)
        return change

    def check_claims(self, instance: Instance, before: Instance | None, submission: Submission) -> None:
        """Check what an admitted or held submission adds to the claims of an instance (`before`; None: a new one).

        The number of requests binds neither admins nor what frees something, so that a full project can be emptied.

        Raises:
            InsufficientCapacity, InUse: as `Capacity.check`.
            QuotaExceeded: the project may not use so much.
        """
        if before is None or submission.operation in CLAIMING:
            self._capacity.check(instance, before)
        freeing = submission.role is Role.ADMIN or submission.operation in SERVED_WHEN_FULL
        self._capacity.quotas.check(instance, before, requests=not freeing)

    def counted(self, instance: Instance, submission: Submission) -> Submission:
        """Return a submission with the counts of outstanding requests that rules of the policy look at."""
        counts = counts_around(instance, self._in_force.compiled, self._store)
        return submission if counts is NOT_COUNTED else msgspec.structs.replace(submission, **counts._asdict())

    def not_started(self, instance: Instance, creation: Submission, now_ms: int) -> Instance:
        """As `admission.not_started`. Raises `TurnedAway` with its denial."""
        waiting = admission.not_started(instance, creation, self._in_force.compiled, now_ms)
        if isinstance(waiting, Denied):
            raise TurnedAway(SubmissionResult(disposition=waiting, instance=instance))
        return waiting

    def _back_on_a_host(self, instance: Instance, submission: Submission, now_ms: int) -> Instance:
        """Assign a host to an offloaded instance if the gate admits its unshelve."""
        answer = admission.judge(instance, submission, self._in_force.compiled, now_ms)
        return self._scheduler.returning(instance) if isinstance(answer, Admitted | Held) else instance

    def answers(
        self, instance: Instance, caller: Mapping[str, Any], *, agent_answers: bool | None = None
    ) -> dict[Operation, Disposition]:
        """Return the disposition of each operation now, without parameters.

        An operation that requires parameters is denied only if no parameters could be admitted. `caller` is who asks
        (`Caller.identity`). `agent_answers` is whether a guest agent responds; None: unknown.
        """
        return {operation: self._answer(instance, operation, caller, agent_answers) for operation in Operation}

    def _answer(
        self, instance: Instance, operation: Operation, caller: Mapping[str, Any], agent_answers: bool | None
    ) -> Disposition:
        parameters = {"host": ANY} if operation in NAMING_A_HOST else {}
        submission = Submission(
            request_id=explainer.NOT_SUBMITTED,
            operation=operation,
            parameters=parameters,
            **caller,
            facts=Facts(agent_answers=agent_answers),
        )
        try:
            targets = self._scheduler.targets(operation, parameters)
            compare = operation not in _PARTIAL
            answer = self.judge(instance, submission, targets, self._store.now_ms(), compare=compare).answer
        except (InUse, Invalid, InsufficientCapacity, QuotaExceeded, NotFound) as error:
            return Denied(
                operation=operation,
                reason=_REASONS[type(error)],
                rule=preconditions.RULE,
                because=error.message,
                vm_state=instance.vm_state,
                remedy=error.remedy,
            )
        if isinstance(answer, Denied) and answer.rule != preconditions.RULE:
            return self._with_parameters(instance, submission) or answer
        return answer

    def _with_parameters(self, instance: Instance, submission: Submission) -> Admitted | None:
        """Return the answer to parameters with which the policy admits the operation; None if there are none.

        Preconditions are left out: whether they are met depends on parameters that nobody has given yet.
        """
        policy, now_ms = self._in_force.compiled, self._store.now_ms()
        about = [rule for rule in policy.rules if submission.operation in rule.operations]
        reachable = self._hosts.leases.reachable(instance.host)
        free = msgspec.structs.replace(instance, spec=None)
        known = {field.name for field in FIELDS[submission.operation]}
        for parameters in view_classes.parameters(about):
            if not parameters.keys() <= known:
                continue
            asked = msgspec.structs.replace(
                submission, parameters=parameters, image=parameters.get("image", ""), host_reachable=reachable
            )
            answer = admission.judge(free, asked, policy, now_ms)
            if isinstance(answer, Admitted):
                return answer
        return None


def _check_same(instance: Instance, answer: Disposition, operation: Operation, parameters: dict[str, Any]) -> None:
    """Raise `InUse` if a redundant submission has other parameters than the earlier request.

    The policy compares `hard`. Secrets are not stored, so two requests with one always differ.
    """
    earlier = answer.request if isinstance(answer, Redundant) else None
    if earlier is None or earlier.operation is not operation:
        return
    mine, theirs = _without_hard(parameters), _without_hard(earlier.parameters)
    if mine != theirs or CATALOGUE[operation].parameters.secret is not None:
        raise InUse(
            f"The {operation.value} {earlier.id} of {instance.name} has not ended and has different parameters.",
            remedy="Retry when it has ended.",
        )


def _without_hard(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name != "hard"}
