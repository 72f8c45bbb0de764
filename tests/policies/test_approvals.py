"""Two-person rules (`unless_approved_by`): a request is held until another caller approves it."""

from __future__ import annotations

import json

import pytest
from policy_samples import START_MS, instance
from test_requested_by import asked, written

from interlock.core import holds, lifecycle
from interlock.core.admission import admit, judge
from interlock.core.holds import ApprovalOutcome
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Approval, Cancellation, Change, Denied, Held, Instance, Status, Submission
from interlock.core.request_queue import replace
from interlock.core.states import VmState
from interlock.policies.comparison import differ
from interlock.policies.explanation import explain, ways
from interlock.policies.language.loader import load
from interlock.policies.model_checker import explore
from interlock.policies.rehearsal.runner import rehearse

O = Operation  # noqa: E741
V = VmState
HOUR_MS = 3_600_000
TWO = """
[policy]
name = "bank"
extends = "standard"

[[rule]]
id = "two-persons"
operations = ["delete", "rebuild"]
unless_approved_by = ["role:admin", "group:audit"]
approve_within = "4h"
verdict = "deny"
reason = "approval_required"
because = "Another person must approve it."
"""


def bank(text: str = TWO) -> CompiledPolicy:
    return CompiledPolicy(written(text))


def submitted(operation: Operation = O.REBUILD, policy: CompiledPolicy | None = None) -> Instance:
    """An instance with one request of alice, which waits for an approval."""
    change = admit(instance(V.ACTIVE), _real(operation), policy or bank(), START_MS)
    assert isinstance(change.answer, Held)
    return change.instance


def _real(operation: Operation) -> Submission:
    return replace(asked("alice", operation), approvable=True)


def approved(
    there: Instance, by: str, *belongs: str, policy: CompiledPolicy | None = None, at_ms: int = START_MS
) -> Change[ApprovalOutcome]:
    approval = Approval(by=by, belongs=belongs, at_ms=at_ms)
    return holds.approve(there, "r1", approval, policy or bank(), host_reachable=True)


def test_a_request_waits_for_an_approval_and_says_whose() -> None:
    change = admit(instance(V.ACTIVE), _real(O.REBUILD), bank(), START_MS)
    answer = change.answer
    assert isinstance(answer, Held)
    assert answer.denied.reason == "approval_required"
    expected = "It needs the approval of another caller than alice, in the group audit or with the role admin."
    assert answer.denied.remedy == expected
    assert answer.request.held_until_ms == START_MS + 4 * HOUR_MS
    assert [event.kind for event in change.events] == ["request.held"]


def test_once_another_person_has_approved_it_is_admitted_with_the_approver_on_record() -> None:
    change = approved(submitted(), "bob", "role:member", "group:audit", at_ms=START_MS + 5)
    assert change.answer is ApprovalOutcome.APPROVED
    (request,) = change.instance.outstanding
    assert (request.status, request.requested_by, request.rule) == (Status.QUEUED, "alice", "rescue-rebuild")
    assert request.approvals == (Approval(by="bob", belongs=("role:member", "group:audit"), at_ms=START_MS + 5),)
    assert request.approver == ("group:audit",)
    assert [event.kind for event in change.events] == ["request.approved", "request.admitted"]
    assert change.events[0].data == {"by": "bob", "operation": "rebuild", "approver": ["group:audit"]}
    assert not change.instance.held


@pytest.mark.parametrize(
    ("by", "belongs", "outcome"),
    [
        ("alice", ("role:admin",), ApprovalOutcome.OWN_REQUEST),
        ("bob", ("role:member", "group:ops"), ApprovalOutcome.NOT_AN_APPROVER),
    ],
)
def test_neither_the_requester_nor_somebody_whom_no_rule_names_approves_it(
    by: str, belongs: tuple[str, ...], outcome: ApprovalOutcome
) -> None:
    there = submitted()
    change = approved(there, by, *belongs)
    assert (change.answer, change.instance, change.events) == (outcome, there, ())


def test_an_approved_request_that_another_rule_denies_stays_held_and_a_second_approval_is_redundant() -> None:
    locked = replace(submitted(), locked_by="admin")
    first = approved(locked, "bob", "group:audit")
    assert first.answer is ApprovalOutcome.APPROVED
    (held,) = first.instance.held
    assert (held.status, held.approver) == (Status.HELD, ("group:audit",))
    second = approved(first.instance, "bob", "group:audit")
    assert (second.answer, second.instance, second.events) == (ApprovalOutcome.ALREADY, first.instance, ())
    unlocked = lifecycle.expire(replace(first.instance, locked_by=None, held_due_ms=START_MS), bank(), START_MS)
    assert [request.operation for request in unlocked.instance.outstanding] == [O.REBUILD]


def test_two_rules_are_approved_by_two_persons() -> None:
    other = (
        TWO[TWO.index("[[rule]]") :]
        .replace("two-persons", "three")
        .replace('"role:admin", "group:audit"', '"group:ops"')
    )
    policy = bank(TWO + other)
    first = approved(submitted(policy=policy), "bob", "group:audit", policy=policy)
    assert [one.status for one in first.instance.held] == [Status.HELD]
    second = approved(first.instance, "olga", "group:ops", policy=policy)
    assert [one.approver for one in second.instance.outstanding] == [("group:audit", "group:ops")]


def test_it_expires_and_can_be_cancelled() -> None:
    there = submitted()
    late_ms = START_MS + 4 * HOUR_MS
    settled = lifecycle.expire(lifecycle.expire(there, bank(), START_MS).instance, bank(), late_ms)
    assert [(one.status, one.reason) for one in settled.requests] == [(Status.CANCELLED, "hold_expired")]
    assert approved(settled.instance, "bob", "group:audit").answer is ApprovalOutcome.NOT_AWAITED
    cancelled = lifecycle.cancel(there, "r1", bank(), "alice", START_MS)
    assert cancelled.answer is Cancellation.CANCELLED
    assert not cancelled.instance.held


def test_what_waits_for_no_approval_is_not_approved() -> None:
    plain = admit(instance(V.ACTIVE), asked("alice"), bank(), START_MS).instance
    assert approved(plain, "bob", "role:admin").answer is ApprovalOutcome.NOT_AWAITED


def test_a_dry_run_is_denied_with_the_same_reason_and_holds_nothing() -> None:
    answer = judge(instance(V.ACTIVE), asked("alice", O.REBUILD), bank(), START_MS)
    assert isinstance(answer, Denied)
    assert answer.reason == "approval_required"
    assert "another caller than alice" in (answer.remedy or "")


def test_a_queued_request_keeps_its_approval_when_it_is_judged_again() -> None:
    there = submitted(O.DELETE)
    queued = approved(there, "bob", "role:admin").instance
    assert lifecycle.rejudge(queued, bank(), START_MS).answer == ()
    unapproved = replace(queued, outstanding=tuple(replace(one, approver=()) for one in queued.outstanding))
    later = replace(unapproved, outstanding=tuple(replace(one, preempts=False) for one in unapproved.outstanding))
    assert lifecycle.rejudge(later, bank(), START_MS).answer == ("r1",)


def test_an_explanation_names_who_may_approve() -> None:
    tried = next(
        one
        for one in explain(
            instance(V.ACTIVE), replace(asked("a", O.REBUILD), approver=("role:admin",)), bank(), START_MS
        ).tried
        if one.rule == "two-persons"
    )
    assert tried.failed == "unless_approved_by: wants one of group:audit, role:admin, found role:admin"
    texts = [way.text for way in ways(instance(V.ACTIVE), asked("alice", O.REBUILD), bank(), START_MS)]
    assert "if requested with the approval of group:audit" in texts


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (TWO.replace("role:admin", "admin"), "unless_approved_by must be a list of 1 to 64 approvers"),
        (TWO.replace("role:admin", "role:boss"), "unless_approved_by must be a list of 1 to 64 approvers"),
        (TWO.replace('"deny"', '"admit"'), "unless_approved_by is valid only with verdict = 'deny'"),
        (TWO.replace("unless_approved_by", "groups").replace("role:admin", "ops").replace("group:audit", "audit"),
         "approve_within is valid only with unless_approved_by"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_meant_is_refused(wrong: str, message: str) -> None:
    with pytest.raises(Exception, match=r"site\.toml:\d+:\d+: ") as refused:
        bank(wrong)
    assert message in str(refused.value)


def test_two_policies_differ_in_who_approves() -> None:
    found = differ(load("standard"), bank().policy)
    assert {group.condition for group in found.groups if not group.follows} >= {""}
    other = differ(bank().policy, bank(TWO.replace('"group:audit"', '"group:ops"')).policy)
    assert other.groups


def test_the_model_checker_submits_with_and_without_approval() -> None:
    """A deletion that somebody approves is a way out; one that nobody can approve is none."""
    few = [O.STOP, O.START, O.DELETE]
    assert not explore(bank(), operations=few, outstanding_max=2).violations
    never = bank(TWO.replace('unless_approved_by = ["role:admin", "group:audit"]\napprove_within = "4h"\n', ""))
    assert explore(never, operations=few, outstanding_max=2).violations


def test_a_rehearsal_approves_a_request() -> None:
    lines = [
        '{"instance": {"vm_state": "active", "role": "member"}}',
        '{"submit": "rebuild", "requested_by": "alice"}',
        '{"approve": "r1", "requested_by": "alice", "role": "admin"}',
        '{"approve": "r1", "requested_by": "bob", "groups": ["audit"]}',
        '{"approve": "r2"}',
        '{"submit": "delete", "approver": ["role:admin"]}',
    ]
    answers = [json.loads(answer) for answer in rehearse(lines, bank())]
    assert (answers[1]["disposition"], answers[1]["reason"]) == ("held", "approval_required")
    assert answers[2]["approve"] == "own_request"
    assert (answers[3]["approve"], answers[3]["admitted"]) == ("approved", {"r1": "rescue-rebuild"})
    assert "not found" in answers[4]["error"]
    assert answers[5]["disposition"] == "admitted"


def test_admitted_is_what_an_approved_submission_would_be() -> None:
    answer = judge(instance(V.ACTIVE), replace(asked("alice", O.REBUILD), approver=("role:admin",)), bank(), START_MS)
    assert isinstance(answer, Admitted)
