"""`interlock policy explain`: why a policy decides as it does, what would change it, and when.

The subject is a hypothetical state or a VM of the server. The server decides by its own policy; its rules are evaluated
again locally, to show which failed and why.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import msgspec

from interlock.api.schemas import responses
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.client.records import instance_of, policy_of
from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import caller_of, caller_options, compiled
from interlock.cli.completion import OperationName, OperationNames
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.quantities import Duration
from interlock.cli.output.formatting import clock, duration, humanize, printable, seconds_of
from interlock.cli.output.refusals import why_text
from interlock.core.conditions import CALLER
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.preconditions import RULE
from interlock.core.records import Held, Submission
from interlock.core.states import VmState
from interlock.core.view_classes import callers
from interlock.policies.time_windows import resolved

if TYPE_CHECKING:
    from interlock.core.records import Disposition, Instance
    from interlock.core.views import View
    from interlock.policies.explanation.explainer import Explanation, Tried, Way


@policy_commands.command()
@click.argument("subject", metavar="VM|STATE")
@click.argument("operation", type=OperationName())
@click.option("--policy", "policy_name", metavar="NAME|FILE", help="Policy  [standard; for a VM the server's]")
@caller_options(defaults=False)
@click.option("--hard", is_flag=True, help="The hard variant of the operation.")
@click.option("--silent", type=Duration(), default=0, metavar="TIME", help="Time without progress, such as 2m.")
@click.option("--running", type=Duration(), default=0, metavar="TIME", help="Time since the task started.")
@click.option("--outstanding", type=OperationNames(), default=(), metavar="A,B", help="Queued operations, in order.")
@click.option("--held", type=OperationNames(), default=(), metavar="A,B", help="Held operations.")
@click.option("--locked", is_flag=True, help="The VM is locked.")
@click.option("--blocked", is_flag=True, help="The operation is blocked on the VM.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag of the VM. May be repeated.")
@click.option("--not-launched", is_flag=True, help="The VM has never run.")
@click.option("--unreachable", is_flag=True, help="The host of the VM is not reachable.")
@click.option(
    "--all", "everything", is_flag=True, help="Show every rule, including those that failed for the same cause."
)
@with_json
def explain(
    invocation: Invocation,
    /,
    *,
    subject: str,
    operation: Operation,
    policy_name: str | None,
    everything: bool,
    **described: Any,
) -> None:
    """Explain a decision: why, what would change it, and when.

    STATE is a vm_state, optionally with a task_state: active, active/rebooting. It requires no server. Anything else is
    a VM of the server; with --policy that policy is evaluated locally.
    """
    state = _state_of(subject)
    if state is None:
        try:
            ask_of_vm(invocation, subject, operation, policy_name, described, everything=everything)
        except Failure as failure:
            if failure.code in {ExitCode.NOT_REACHABLE, ExitCode.NOT_FOUND} and (state_meant := _close_state(subject)):
                failure.remedy = f"Did you mean the state {state_meant!r}? {failure.remedy or ''}".strip()
            raise
        return
    question = _imagined(state, operation, policy_name or "standard", described)
    print_explanation(invocation, question, everything=everything)


def _described(submission: Submission) -> str:
    """Describe who asks: the role, and what else is not as usual."""
    parts = [f"with the role {submission.role}"]
    for condition in CALLER:
        value = getattr(submission, condition.reads)
        if condition.reads != "role" and value != condition.usual:
            parts.append(condition.because(value))
    return " ".join(parts)


def _close_state(subject: str) -> str | None:
    from interlock.core.states import VmState

    close = difflib.get_close_matches(subject, [state.value for state in VmState], n=1, cutoff=0.75)
    return close[0] if close else None


def _state_of(subject: str) -> tuple[VmState, str] | None:
    """Parse a vm_state and task_state; None if it is the name of a VM."""
    from interlock.core.states import NO_TASK
    from interlock.policies.language.vocabulary import OPERATIONS, TASKS, VM_STATES, nearest, phases_of

    word, slash, task = subject.replace("-", "_").partition("/")
    if word not in VM_STATES.words:
        if slash:
            raise Failure(ExitCode.USAGE, f"Unknown vm_state {word!r}.", remedy=nearest(word, VM_STATES.words))
        return None
    if not slash:
        return VM_STATES.words[word], NO_TASK
    if task not in TASKS.words:
        named = OPERATIONS.words.get(task)
        phases = [each for each in TASKS.words if named is not None and each in phases_of(named)]
        hint = f"The phases of {task} are {', '.join(phases)}." if phases else nearest(task, TASKS.words)
        raise Failure(ExitCode.USAGE, f"Unknown task_state {task!r}.", remedy=hint)
    return VM_STATES.words[word], task


def _imagined(
    state: tuple[VmState, str], operation: Operation, policy_name: str, described: dict[str, Any]
) -> Question:
    from interlock.core.operations import CATALOGUE, Lane
    from interlock.policies.explanation.explainer import imagined
    from interlock.policies.rehearsal.runner import BEGINNING_MS

    for kind in described["outstanding"]:
        if CATALOGUE[kind].lane is Lane.RECORD:
            raise Failure(ExitCode.USAGE, f"{kind.value} is a record operation, and is never outstanding.")
    instance = imagined(
        *state,
        BEGINNING_MS,
        silent_ms=described["silent"],
        running_ms=described["running"],
        waiting=described["outstanding"],
        held=described["held"],
        locked=described["locked"],
        blocked=(operation,) if described["blocked"] else (),
        tags=described["tags"],
        launched=not described["not_launched"],
    )
    caller = caller_of(described)
    submission = submission_of(operation, described, caller)
    vm_state, task = state
    where = vm_state.value if task == "none" else f"{vm_state.value}/{task}"
    title = f"{humanize(operation.value)} in {where}, requested {_described(submission)}"
    return Question(title, compiled(policy_name), instance, submission, BEGINNING_MS, real=False)


def ask_of_vm(
    invocation: Invocation,
    vm: str,
    operation: Operation,
    policy_name: str | None,
    described: dict[str, Any],
    *,
    everything: bool,
) -> None:
    """Explain the decision about an operation of this VM now."""
    for option in ("silent", "running", "outstanding", "held", "locked", "blocked", "tags", "not_launched"):
        if described[option]:
            word = {"tags": "tag"}.get(option, option).replace("_", "-")
            raise Failure(
                ExitCode.USAGE,
                f"--{word} requires a STATE; {vm!r} is the name of a VM.",
                remedy="Expected a STATE such as active, stopped or active/rebooting.",
            )
    chosen = None if policy_name is None else compiled(policy_name)
    wire = invocation.client.get(path_of(INSTANCES, vm)).decode(responses.Instance)
    if chosen is None and (described["hard"] or caller_of(described) or described["unreachable"]):
        options = ", ".join(["--hard", *(f"--{condition.reads.replace('_', '-')}" for condition in CALLER)])
        raise Failure(
            ExitCode.USAGE,
            f"{options} and --unreachable require --policy for a VM.",
            remedy="Add --policy NAME|FILE to evaluate a policy locally.",
        )
    reply = invocation.client.get(path_of(INSTANCES, wire.id, "allowed")).decode(responses.AllowedOperations)
    if chosen is not None:
        described = {**described, "unreachable": described["unreachable"] or not reply.host_reachable}
        now_ms = round((invocation.client.now or seconds_of(wire.updated_at)) * 1000)
        submission = submission_of(operation, described, caller_of(described))
        title = f"{humanize(operation.value)} of {wire.name}, requested {_described(submission)}"
        question = Question(title, resolved(chosen, now_ms, 0), instance_of(wire), submission, now_ms, real=True)
        print_explanation(invocation, question, everything=everything)
        lacking = next((one for one in reply.operations if one.operation is operation and one.rule == RULE), None)
        if lacking is not None and not invocation.json:
            invocation.echo("Independent of the policy:")
            invocation.echo(why_text(lacking, reply.name, invocation.client.now))
        return
    _ask_server(invocation, wire, reply, operation, described, everything=everything)


def _ask_server(
    invocation: Invocation,
    wire: responses.Instance,
    reply: responses.AllowedOperations,
    operation: Operation,
    described: dict[str, Any],
    *,
    everything: bool,
) -> None:
    answer = next((one for one in reply.operations if one.operation is operation), None)
    if answer is None:
        raise Failure(ExitCode.NOT_FOUND, f"Operation {operation.value} not supported by the server.")
    if answer.rule == RULE:
        # A precondition: no rule of a policy decides it.
        if invocation.json:
            invocation.emit({"answer": answer})
        else:
            invocation.echo(why_text(answer, reply.name, invocation.client.now))
        return
    now_ms = round(seconds_of(reply.at) * 1000)
    policy = resolved(policy_of(invocation.client.get("/v1/policy").decode(dict[str, Any])), now_ms, 0)
    described = {**described, "unreachable": not reply.host_reachable}
    question = _matching_question(wire, operation, policy, described, now_ms, answer.rule)
    if invocation.json and question is None:
        invocation.emit({"policy": policy.stamp, "now_ms": now_ms, "answer": answer})
        return
    if not invocation.json:
        invocation.echo(why_text(answer, reply.name, invocation.client.now))
    if question is None:
        invocation.echo("  The local evaluation differs: the VM has changed meanwhile. Retry.")
        return
    print_explanation(invocation, question, everything=everything, without_answer=True)


def _matching_question(
    wire: responses.Instance,
    operation: Operation,
    policy: CompiledPolicy,
    described: dict[str, Any],
    now_ms: int,
    rule: str,
) -> Question | None:
    """Return the question as the server evaluated it. Who asked is unknown, so one caller of each class is tried."""
    from interlock.core.admission import judge

    instance = instance_of(wire)
    rules = [rule for rule in policy.rules if operation in rule.operations]
    for caller in sorted(callers(rules), key=lambda caller: caller.get("role", "")):
        submission = submission_of(operation, described, caller)
        answer = judge(instance, submission, policy, now_ms)
        if not isinstance(answer, Held) and answer.rule == rule:
            title = f"{humanize(operation.value)} of {wire.name}"
            return Question(title, policy, instance, submission, now_ms, real=True)
    return None


_FOLDED_MIN: Final = 3
"""How many consecutive rules must fail for the same cause to be printed as one row."""
_WANTED_WIDTH: Final = 60
_COLOURS: Final = {"Admitted": "green", "Redundant": "yellow", "Denied": "red", "Held": "yellow"}
_WORDS: Final = {"Admitted": "Allowed", "Redundant": "Redundant", "Denied": "Denied", "Held": "Held"}


class Question(NamedTuple):
    """A submission to explain: policy, instance and time."""

    title: str
    policy: CompiledPolicy
    instance: Instance
    submission: Submission
    now_ms: int
    real: bool
    """Whether `now_ms` is the time of a clock; otherwise times are relative to it."""


def submission_of(operation: Operation, described: dict[str, Any], caller: dict[str, Any]) -> Submission:
    """Return the submission that the options describe; `caller` has what is unusual of who asks."""
    from interlock.core.records import Submission

    return Submission(
        request_id="explained",
        operation=operation,
        parameters={"hard": True} if described["hard"] else {},
        host_reachable=not described["unreachable"],
        **{"requested_by": "", **caller},
    )


def print_explanation(
    invocation: Invocation, question: Question, *, everything: bool, without_answer: bool = False
) -> None:
    """Explain a decision and print it; `without_answer` if the decision itself is printed already."""
    from interlock.policies.explanation.explainer import explain as explained
    from interlock.policies.explanation.explainer import ways

    instance, submission = question.instance, question.submission
    explanation = explained(instance, submission, question.policy, question.now_ms)
    found = ways(instance, submission, question.policy, question.now_ms)
    if invocation.json:
        view = question.policy.view(instance, submission, question.now_ms)
        invocation.emit(document(question, view, explanation, found))
        return
    if not without_answer:
        _print_answer(invocation, question, explanation)
    _print_tried(invocation, explanation, everything=everything)
    _print_ways(invocation, question, explanation.disposition, found)


def document(question: Question, view: View, explanation: Explanation, found: Sequence[Way]) -> dict[str, Any]:
    """Return the explanation as a JSON document. Times are milliseconds on the clock of `now_ms`."""
    return {
        "policy": question.policy.stamp,
        "now_ms": question.now_ms,
        "view": msgspec.structs.asdict(view),
        **msgspec.structs.asdict(explanation),
        "ways": [
            {**msgspec.structs.asdict(way), "in_s": None if way.at_ms is None else (way.at_ms - question.now_ms) / 1000}
            for way in found
        ],
    }


def _print_answer(invocation: Invocation, question: Question, explanation: Explanation) -> None:
    answer = explanation.disposition
    kind = type(answer).__name__
    reason = getattr(answer, "reason", None)
    head = f"{_WORDS[kind]}: {question.title}" + (f" ({reason})" if reason else "")
    invocation.echo(click.style(head, fg=_COLOURS[kind], bold=True))
    if because := getattr(answer, "because", None):
        invocation.echo(f"  {printable(because)}")
    there = explanation.foreseen
    where = "" if there is None else f", and in the foreseen state: {there.value}"
    invocation.echo(f"  Policy {printable(question.policy.policy.name)}, evaluated as it is now{where}.")
    if supersedes := getattr(answer, "supersedes", ()):
        names = {request.id: request.operation.value for request in question.instance.outstanding}
        invocation.echo(f"  Takes over from: {', '.join(names[each] for each in supersedes)}.")


def _print_tried(invocation: Invocation, explanation: Explanation, *, everything: bool) -> None:
    invocation.echo("")
    _print_rules(invocation, "Rules evaluated, in order:", explanation.tried, everything=everything)
    if explanation.foreseen is not None:
        title = f"Evaluated again in the foreseen state {explanation.foreseen.value}:"
        _print_rules(invocation, title, explanation.tried_foreseen, everything=everything)


def _print_rules(invocation: Invocation, title: str, tried: Sequence[Tried], *, everything: bool) -> None:
    invocation.echo(click.style(title, bold=True))
    rows = list(_rows(tried, everything=everything))
    widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
    for sign, rule, place, why in rows:
        line = f"  {sign} {rule:<{widths[0]}}  {place:<{widths[1]}}  {why}".rstrip()
        invocation.echo(click.style(line, fg="green" if sign == "→" else None, bold=sign == "→"))


def _rows(tried: Sequence[Tried], *, everything: bool) -> Iterator[tuple[str, str, str, str]]:
    """Yield one row per rule; consecutive rules that fail for the same cause share a row."""
    for key, group in groupby(tried, key=lambda one: one.key):
        rules = list(group)
        if key is None:
            for one in rules:
                yield "→", printable(one.rule), printable(one.source), f"matches: {one.verdict.value}"
        elif len(rules) < _FOLDED_MIN or everything:
            for one in rules:
                yield " ", printable(one.rule), printable(one.source), _cut(printable(one.failed or ""), everything)
        else:
            found = (rules[0].failed or "").rpartition(", found ")[2]
            yield " ", f"({len(rules)} rules)", "", printable(f"{key}: require another value than {found}")


def _cut(text: str, everything: bool) -> str:
    """Shorten the list of required values in a rule's condition."""
    wanted, found, rest = text.rpartition(", found ")
    if everything or len(wanted) <= _WANTED_WIDTH:
        return text
    return wanted[:_WANTED_WIDTH].rpartition(", ")[0] + ", …" + found + rest


def _print_ways(invocation: Invocation, question: Question, answer: Disposition, found: Sequence[Way]) -> None:
    if type(answer).__name__ == "Admitted":
        return
    invocation.echo("")
    if not found:
        invocation.echo("No single change would make it admitted.")
        return
    invocation.echo(click.style("It would be admitted:", bold=True))
    for way in found:
        if way.turn == "vm_state":
            continue
        text = way.text
        if way.at_ms is not None:
            text = _moment(question, way.at_ms) + ", unless there is progress before" * way.if_silent
        if way.if_silent and way.latest_ms is not None:
            text += f"; at the latest {_moment(question, way.latest_ms)}"
        invocation.echo(f"  {printable(text)}  (rule {printable(way.rule)})")
    states = [way for way in found if way.turn == "vm_state"]
    near = [way for way in states if way.by]
    for way in near:
        how = " or ".join(humanize(operation.value) for operation in way.by)
        invocation.echo(f"  if it is {way.value}: {how} leads there, and is allowed now  (rule {printable(way.rule)})")
    if others := [str(way.value) for way in states if not way.by]:
        invocation.echo(f"  if it is {', '.join(others)}")


def _moment(question: Question, at_ms: int) -> str:
    moment = f", at {clock_of(at_ms)}" if question.real else ""
    return f"in {duration((at_ms - question.now_ms) / 1000)}{moment}"


def clock_of(at_ms: int) -> str:
    """Format a time in local time."""
    from datetime import UTC, datetime

    return clock(datetime.fromtimestamp(at_ms / 1000, UTC).isoformat())
