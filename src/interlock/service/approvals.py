"""Approvals: a caller approves the held request of another, where a rule of the policy demands it."""

from __future__ import annotations

from interlock.core import holds
from interlock.core.errors import Forbidden, InUse
from interlock.core.holds import ApprovalOutcome
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Approval, Change, Instance, Request
from interlock.core.roles import Role
from interlock.ports import Store, counts_around
from interlock.service.auth import Caller
from interlock.service.hosts import HostService


async def approve(
    store: Store, policy: CompiledPolicy, hosts: HostService, caller: Caller, request: Request
) -> ApprovalOutcome:
    """Approve a request as the caller, and evaluate it again in the same commit; durable when this returns.

    Raises:
        Forbidden: the caller is a reader, it is the caller's own request, or no rule lets the caller approve it.
        InUse: it is not held, or no rule demands an approval.
    """
    caller.require(Role.MEMBER, "approve requests")
    belongs = (f"role:{caller.role.value}", *(f"group:{group}" for group in caller.groups))

    def decide(instance: Instance, now_ms: int) -> Change[ApprovalOutcome]:
        approval = Approval(by=caller.name, belongs=belongs, at_ms=now_ms)
        reachable = hosts.leases.reachable(instance.host)
        counts = counts_around(instance, policy, store)
        return holds.approve(instance, request.id, approval, policy, host_reachable=reachable, counts=counts)

    outcome = await store.change(request.instance_id, decide)
    what = f"{request.operation.value} {request.id}"
    match outcome:
        case ApprovalOutcome.OWN_REQUEST:
            raise Forbidden(
                f"Permission denied: {caller.name} requested {what}, and nobody approves their own request.",
                remedy="Let somebody else approve it.",
            )
        case ApprovalOutcome.NOT_AN_APPROVER:
            raise Forbidden(
                f"Permission denied: no rule lets {caller.name} ({', '.join(belongs)}) approve {what}.",
                remedy=f"`interlock request show {request.id}` says whose approval it needs.",
            )
        case ApprovalOutcome.NOT_AWAITED:
            raise InUse(
                f"{what} is {request.status.value}, and does not wait for an approval.",
                remedy=f"Look at it with `interlock request show {request.id}`.",
            )
        case ApprovalOutcome.APPROVED | ApprovalOutcome.ALREADY:
            return outcome
