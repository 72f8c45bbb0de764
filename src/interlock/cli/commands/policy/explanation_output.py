"""Printing of a policy decision's explanation: the rules evaluated, what would change it, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import msgspec

from interlock.cli.context import Invocation
from interlock.cli.output.formatting import clock, duration, humanize, printable

if TYPE_CHECKING:
    from interlock.core.operations import Operation
    from interlock.core.policy import CompiledPolicy
    from interlock.core.records import Disposition, Instance, Submission
    from interlock.core.views import View
    from interlock.policies.explanation.counterfactuals import Way
    from interlock.policies.explanation.explainer import Explanation, Tried

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
    from interlock.policies.explanation.counterfactuals import ways
    from interlock.policies.explanation.explainer import explain as explained

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
