"""`interlock policy explain`: why one answer, what would have to change, and when.

Asked of a state that need not exist, or of a VM of the server. What is said of it is found out in
`interlock.policies.explaining` and `counterfactuals`; here are the words on the command line and the printing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import msgspec

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.naming import OperationName
from interlock.cli.wording import clock, duration, printable, spoken
from interlock.core.errors import PolicyError

if TYPE_CHECKING:
    from interlock.core.operations import Operation
    from interlock.core.policy import CompiledPolicy, View
    from interlock.core.records import Disposition, Instance, Submission
    from interlock.core.states import VmState
    from interlock.policies.counterfactuals import Way
    from interlock.policies.explaining import Explanation, Tried

_FOLDED_MIN: Final = 3
"""How many rules in a row must fail for the same cause before they are told together."""
_WANTED_WIDTH: Final = 60
_COLOURS: Final = {"Admitted": "green", "Redundant": "yellow", "Denied": "red", "Held": "yellow"}
_WORDS: Final = {"Admitted": "Allowed", "Redundant": "Redundant", "Denied": "Refused", "Held": "Held"}


class Question(NamedTuple):
    """What is asked, of whom, and when."""

    title: str
    policy: CompiledPolicy
    instance: Instance
    submission: Submission
    now_ms: int
    real: bool
    """Whether the moments are those of a clock, and not only counted from now."""


class LengthOfTime(click.ParamType[int]):
    """A length of time as in a policy, in milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from interlock.policies.durations import EXPECTED, parse_duration

        if isinstance(value, int):
            return value
        parsed = parse_duration(value)
        if parsed is None:
            raise click.BadParameter(f"{value!r} is no length of time; expected {EXPECTED}.", ctx=ctx, param=param)
        return parsed


class OperationNames(click.ParamType[tuple[Any, ...]]):
    """Operations with commas between them."""

    name = "operations"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(OperationName().convert(word.strip(), param, ctx) for word in value.split(",") if word.strip())


@click.command()
@click.argument("subject", metavar="VM|STATE")
@click.argument("operation", type=OperationName())
@click.option("--policy", "policy_name", metavar="NAME|FILE", help="By which policy  [standard; for a VM the server's]")
@click.option("--role", type=click.Choice(["reader", "member", "admin"]), help="Who asks  [member]")
@click.option("--hard", is_flag=True, help="Ask for the hard variant.")
@click.option("--silent", type=LengthOfTime(), default=0, metavar="TIME", help="No sign of life for so long: 2m.")
@click.option("--running", type=LengthOfTime(), default=0, metavar="TIME", help="The task was begun so long ago.")
@click.option("--outstanding", type=OperationNames(), default=(), metavar="A,B", help="What waits, in order.")
@click.option("--held", type=OperationNames(), default=(), metavar="A,B", help="What is held.")
@click.option("--locked", is_flag=True, help="The instance is locked.")
@click.option("--blocked", is_flag=True, help="The instance's own list blocks the operation.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="The instance has this tag; may be given again.")
@click.option("--not-launched", is_flag=True, help="The instance has never run.")
@click.option("--unreachable", is_flag=True, help="The instance's host cannot be reached.")
@click.option("--all", "everything", is_flag=True, help="Show every rule, also those that failed for the same cause.")
@json_option
@needs_invocation
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
    """Say why an operation gets its answer, what would have to change, and when.

    STATE is a vm_state, with the task that is being done behind a slash: active, active/rebooting. It needs no server.
    Anything else is a VM, as the server knows it; with --policy it is judged here, by that policy.
    """
    state = _state_of(subject)
    if state is None:
        from interlock.cli.explaining_vms import ask_of_vm

        try:
            ask_of_vm(invocation, subject, operation, policy_name, described, everything=everything)
        except Failure as failure:
            if failure.code in {ExitCode.NOT_REACHABLE, ExitCode.NOT_FOUND} and (state_meant := _close_state(subject)):
                failure.remedy = f"If a state was meant: did you mean {state_meant!r}? {failure.remedy or ''}".strip()
            raise
        return
    question = _imagined(state, operation, policy_name or "standard", described)
    tell(invocation, question, everything=everything)


def _close_state(subject: str) -> str | None:
    from interlock.core.states import VmState

    close = difflib.get_close_matches(subject, [state.value for state in VmState], n=1, cutoff=0.75)
    return close[0] if close else None


def _state_of(subject: str) -> tuple[VmState, str] | None:
    """The vm_state and task_state that are meant; None if it is the name of a VM."""
    from interlock.core.states import NO_TASK
    from interlock.policies.vocabulary import OPERATIONS, TASKS, VM_STATES, nearest, phases_of

    word, slash, task = subject.replace("-", "_").partition("/")
    if word not in VM_STATES.words:
        if slash:
            raise Failure(ExitCode.USAGE, f"{word!r} is no vm_state.", remedy=nearest(word, VM_STATES.words))
        return None
    if not slash:
        return VM_STATES.words[word], NO_TASK
    if task not in TASKS.words:
        named = OPERATIONS.words.get(task)
        phases = [each for each in TASKS.words if named is not None and each in phases_of(named)]
        hint = f"The phases of {task} are {', '.join(phases)}." if phases else nearest(task, TASKS.words)
        raise Failure(ExitCode.USAGE, f"{task!r} is no task_state.", remedy=hint)
    return VM_STATES.words[word], task


def compiled(policy_name: str) -> CompiledPolicy:
    """A policy by name or file; a failure of the command line if it is wrong."""
    from interlock.policies.reading import compile_named

    try:
        return compile_named(policy_name)
    except PolicyError as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None


def submission_of(operation: Operation, described: dict[str, Any], role: str) -> Submission:
    """What is asked for, by the options."""
    from interlock.core.records import Submission

    return Submission(
        request_id="explained",
        operation=operation,
        parameters={"hard": True} if described["hard"] else {},
        requested_by="you",
        role=role,
        host_reachable=not described["unreachable"],
    )


def _imagined(
    state: tuple[VmState, str], operation: Operation, policy_name: str, described: dict[str, Any]
) -> Question:
    from interlock.core.operations import CATALOGUE, Lane
    from interlock.policies.explaining import imagined
    from interlock.policies.rehearsing import BEGINNING_MS

    for kind in described["outstanding"]:
        if CATALOGUE[kind].lane is Lane.RECORD:
            raise Failure(ExitCode.USAGE, f"{kind.value} changes only the record, and is never outstanding.")
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
    submission = submission_of(operation, described, described["role"] or "member")
    vm_state, task = state
    where = vm_state.value if task == "none" else f"{vm_state.value}/{task}"
    title = f"{spoken(operation.value)} in {where}, asked by a caller with the role {submission.role}"
    return Question(title, compiled(policy_name), instance, submission, BEGINNING_MS, real=False)


def tell(invocation: Invocation, question: Question, *, everything: bool, answered: bool = False) -> None:
    """Explain, and print it; with `answered`, the answer itself has been told already."""
    from interlock.core.admission import look
    from interlock.policies.counterfactuals import ways
    from interlock.policies.explaining import explain as explained

    instance, submission = question.instance, question.submission
    explanation = explained(instance, submission, question.policy, question.now_ms)
    found = ways(instance, submission, question.policy, question.now_ms)
    if invocation.json:
        view = look(instance, submission, question.now_ms)
        invocation.emit(document(question, view, explanation, found))
        return
    if not answered:
        _print_answer(invocation, question, explanation)
    _print_tried(invocation, explanation, everything=everything)
    _print_ways(invocation, question, explanation.disposition, found)


def document(question: Question, view: View, explanation: Explanation, found: Sequence[Way]) -> dict[str, Any]:
    """All of it for programs. Times are milliseconds on the clock on which `now_ms` stands."""
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
    invocation.say(click.style(head, fg=_COLOURS[kind], bold=True))
    if because := getattr(answer, "because", None):
        invocation.say(f"  {printable(because)}")
    there = explanation.foreseen
    where = "" if there is None else f", and where all that is outstanding leads: {there.value}"
    invocation.say(f"  By the policy {printable(question.policy.policy.name)}, as it is now{where}.")
    if supersedes := getattr(answer, "supersedes", ()):
        names = {request.id: request.operation.value for request in question.instance.outstanding}
        invocation.say(f"  It takes over from: {', '.join(names[each] for each in supersedes)}.")


def _print_tried(invocation: Invocation, explanation: Explanation, *, everything: bool) -> None:
    invocation.say("")
    _print_rules(invocation, "The rules asked, in order:", explanation.tried, everything=everything)
    if explanation.foreseen is not None:
        title = f"Asked again of {explanation.foreseen.value}, where all that is outstanding leads:"
        _print_rules(invocation, title, explanation.tried_foreseen, everything=everything)


def _print_rules(invocation: Invocation, title: str, tried: Sequence[Tried], *, everything: bool) -> None:
    invocation.say(click.style(title, bold=True))
    rows = list(_rows(tried, everything=everything))
    widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
    for sign, rule, place, why in rows:
        line = f"  {sign} {rule:<{widths[0]}}  {place:<{widths[1]}}  {why}".rstrip()
        invocation.say(click.style(line, fg="green" if sign == "→" else None, bold=sign == "→"))


def _rows(tried: Sequence[Tried], *, everything: bool) -> Iterator[tuple[str, str, str, str]]:
    """A row a rule; rules in a row that fail for the same cause are told together."""
    for key, group in groupby(tried, key=lambda one: one.key):
        rules = list(group)
        if key is None:
            for one in rules:
                yield "→", printable(one.rule), printable(one.source), f"holds: {one.verdict.value}"
        elif len(rules) < _FOLDED_MIN or everything:
            for one in rules:
                yield " ", printable(one.rule), printable(one.source), _cut(printable(one.failed or ""), everything)
        else:
            found = (rules[0].failed or "").rpartition(", found ")[2]
            yield " ", f"({len(rules)} rules)", "", printable(f"{key}: want another than {found}")


def _cut(text: str, everything: bool) -> str:
    """What a rule wants, where it wants one of many, told by the first of them; what was found stays."""
    wanted, found, rest = text.rpartition(", found ")
    if everything or len(wanted) <= _WANTED_WIDTH:
        return text
    return wanted[:_WANTED_WIDTH].rpartition(", ")[0] + ", …" + found + rest


def _print_ways(invocation: Invocation, question: Question, answer: Disposition, found: Sequence[Way]) -> None:
    if type(answer).__name__ == "Admitted":
        return
    invocation.say("")
    if not found:
        invocation.say("No single change would have it admitted.")
        return
    invocation.say(click.style("It would be admitted:", bold=True))
    for way in found:
        if way.turn == "vm_state":
            continue
        text = way.text
        if way.at_ms is not None:
            wait_s = (way.at_ms - question.now_ms) / 1000
            moment = f", at {clock_of(way.at_ms)}" if question.real else ""
            text = f"in {duration(wait_s)}{moment}, if nothing shows life until then"
        invocation.say(f"  {printable(text)}  (rule {printable(way.rule)})")
    states = [way for way in found if way.turn == "vm_state"]
    near = [way for way in states if way.by]
    for way in near:
        how = " or ".join(spoken(operation.value) for operation in way.by)
        invocation.say(f"  if it is {way.value}, to which {how} leads, allowed now  (rule {printable(way.rule)})")
    if others := [str(way.value) for way in states if not way.by]:
        invocation.say(f"  if it is {', '.join(others)}")


def clock_of(at_ms: int) -> str:
    """A moment in local time."""
    from datetime import UTC, datetime

    return clock(datetime.fromtimestamp(at_ms / 1000, UTC).isoformat())
