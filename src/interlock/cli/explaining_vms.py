"""A VM of the server, explained: its state is fetched, and judged by the server's policy or by another one.

The server answers for its own policy; the rules that it shows are asked again here, to say which failed and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from interlock.api import schemas
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation
from interlock.cli.naming import INSTANCES, path_of, suggesting
from interlock.cli.policy_explanations import Question, compiled, submission_of, tell
from interlock.cli.refusals import why_text
from interlock.cli.wording import seconds_of, spoken
from interlock.core.operations import Operation
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import Held, Instance, Request
from interlock.core.states import VmState

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROLES: Final = ("admin", "member", "reader")


def ask_of_vm(
    invocation: Invocation,
    vm: str,
    operation: Operation,
    policy_name: str | None,
    described: dict[str, Any],
    *,
    everything: bool,
) -> None:
    """Explain what an operation of this VM would be answered now."""
    for option in ("silent", "running", "outstanding", "held", "locked", "blocked", "tags", "not_launched"):
        if described[option]:
            word = {"tags": "tag"}.get(option, option).replace("_", "-")
            raise Failure(
                ExitCode.USAGE,
                f"--{word} describes a state, and {vm!r} is the name of a VM, which has its own.",
                remedy="A STATE is written active, stopped, active/rebooting.",
            )
    chosen = None if policy_name is None else compiled(policy_name)
    with suggesting(invocation.client, INSTANCES, vm):
        wire = invocation.client.get(path_of(INSTANCES, vm)).decode(schemas.Instance)
    if chosen is None and (described["hard"] or described["role"] or described["unreachable"]):
        raise Failure(
            ExitCode.USAGE,
            "The server answers for you and the soft variant, about the host as it is.",
            remedy="With --policy NAME|FILE the VM is judged here, for any role and variant.",
        )
    reply = invocation.client.get(path_of(INSTANCES, wire.id, "allowed")).decode(schemas.AllowedOperations)
    if chosen is not None:
        described = {**described, "unreachable": described["unreachable"] or not reply.host_reachable}
        role = described["role"] or "member"
        title = f"{spoken(operation.value)} of {wire.name}, asked by a caller with the role {role}"
        now_ms = round((invocation.client.now or seconds_of(wire.updated_at)) * 1000)
        submission = submission_of(operation, described, role)
        question = Question(title, chosen, instance_of(wire), submission, now_ms, real=True)
        tell(invocation, question, everything=everything)
        return
    _ask_server(invocation, wire, reply, operation, described, everything=everything)


def _ask_server(
    invocation: Invocation,
    wire: schemas.Instance,
    reply: schemas.AllowedOperations,
    operation: Operation,
    described: dict[str, Any],
    *,
    everything: bool,
) -> None:
    answer = next((one for one in reply.operations if one.operation is operation), None)
    if answer is None:
        raise Failure(ExitCode.NOT_FOUND, f"The server knows no operation {operation.value}.")
    policy = policy_of(invocation.client.get("/v1/policy").decode(dict[str, Any]))
    now_ms = round(seconds_of(reply.at) * 1000)
    described = {**described, "unreachable": not reply.host_reachable}
    question = _agreeing(wire, operation, policy, described, now_ms, answer.rule)
    if invocation.json and question is None:
        invocation.emit({"policy": policy.stamp, "now_ms": now_ms, "answer": answer})
        return
    if not invocation.json:
        invocation.say(why_text(answer, reply.name, invocation.client.now))
    if question is None:
        invocation.say("  Its rules, asked here, do not lead to that answer: the VM has changed meanwhile. Ask again.")
        return
    tell(invocation, question, everything=everything, answered=True)


def _agreeing(
    wire: schemas.Instance,
    operation: Operation,
    policy: CompiledPolicy,
    described: dict[str, Any],
    now_ms: int,
    rule: str,
) -> Question | None:
    """The question as the server was asked it. It does not say whom it takes us for, so the role is found by trying."""
    from interlock.core.admission import judge

    instance = instance_of(wire)
    for role in _ROLES:
        submission = submission_of(operation, described, role)
        answer = judge(instance, submission, policy, now_ms)
        if not isinstance(answer, Held) and answer.rule == rule:
            title = f"{spoken(operation.value)} of {wire.name}"
            return Question(title, policy, instance, submission, now_ms, real=True)
    return None


def instance_of(wire: schemas.Instance) -> Instance:
    """The record of an instance, so far as it goes over the wire."""
    return Instance(
        id=wire.id,
        name=wire.name,
        project=wire.project,
        host=wire.host,
        vm_state=wire.vm_state,
        prior_vm_state=wire.prior_vm_state,
        further_vm_states=wire.further_vm_states,
        power_state=wire.power_state,
        generation=wire.generation,
        created_at_ms=_ms(wire.created_at) or 0,
        updated_at_ms=_ms(wire.updated_at) or 0,
        launched_at_ms=_ms(wire.launched_at),
        locked_by=wire.locked_by,
        blocked_operations=wire.blocked_operations,
        tags=wire.tags,
        error=wire.error,
        outstanding=tuple(_request_of(request) for request in wire.outstanding),
        held=tuple(_request_of(request) for request in wire.held),
    )


def _request_of(wire: schemas.Request) -> Request:
    return Request(
        id=wire.id,
        instance_id=wire.instance,
        operation=wire.operation,
        parameters=wire.parameters,
        requested_by=wire.requested_by,
        role=wire.role,
        rule=wire.rule,
        admitted_at_ms=_ms(wire.admitted_at) or 0,
        status=wire.status,
        preempts=wire.preempts,
        phase=wire.phase,
        taken_at_ms=_ms(wire.taken_at),
        last_progress_at_ms=_ms(wire.last_sign_of_life_at),
        interrupt_at_ms=_ms(wire.interrupt_at),
        interrupt_deadline_ms=_ms(wire.interrupt_deadline_at),
        interrupted_for=wire.interrupted_for,
    )


def _ms(moment: str | None) -> int | None:
    return None if moment is None else round(seconds_of(moment) * 1000)


def policy_of(document: dict[str, Any]) -> CompiledPolicy:
    """The policy that a server shows, for asking its rules; names that this command line does not know are left out."""
    rules = tuple(_rule_of(rule) for rule in document.get("rules", ()))
    limit = int(document.get("outstanding_max", 16))
    digest = str(document.get("digest", ""))
    policy = Policy(name=str(document.get("name", "")), rules=rules, outstanding_max=limit, digest=digest)
    return CompiledPolicy(policy)


def _rule_of(wire: dict[str, Any]) -> Rule:
    facts: dict[str, Any] = {
        key: wire[key]
        for key in ("locked", "blocked", "host_reachable", "hard", "launched", "in_turn", "reason", "because", "fixed")
        if key in wire
    }
    tasks, roles, tags = (_words(wire, key) for key in ("task_state", "roles", "tags"))
    return Rule(
        id=wire["id"],
        source=wire.get("source", ""),
        verdict=Verdict(wire["verdict"]),
        operations=_known(Operation, wire["operations"]),
        vm_states=None if wire.get("vm_state") is None else _known(VmState, wire["vm_state"]),
        task_states=tasks,
        roles=roles,
        tags=tags,
        outstanding=None if wire.get("outstanding") is None else _known(Operation, wire["outstanding"]),
        held=None if wire.get("held") is None else _known(Operation, wire["held"]),
        silent_ms_min=_milliseconds(wire.get("silent_s_min")),
        threshold_ms=_milliseconds(wire.get("threshold_s")),
        measured_from=MeasuredFrom(wire.get("measured_from") or MeasuredFrom.LAST_PROGRESS),
        before=Before(wire.get("before") or Before.DENY),
        grace_ms=_milliseconds(wire.get("grace_s")) or 0,
        **facts,
    )


def _words(wire: dict[str, Any], key: str) -> frozenset[str] | None:
    return None if wire.get(key) is None else frozenset(wire[key])


def _known(kind: Any, words: Iterable[str]) -> frozenset[Any]:
    values = {member.value for member in kind}
    return frozenset(kind(word) for word in words if word in values)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
