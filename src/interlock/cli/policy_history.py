"""`interlock policy replay`: recorded history, judged by another policy. What it suggests is in `policy_suggesting`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from interlock.cli.invocation import Cell, Invocation, json_option, needs_invocation
from interlock.cli.policy_suggesting import suggest
from interlock.cli.recorded_spans import moment, opened, span_of, span_options
from interlock.cli.server import told
from interlock.cli.wording import printable, spoken

if TYPE_CHECKING:
    from interlock.policies.recorded_submissions import Answer
    from interlock.policies.replaying import Difference, Replay

_LINES: Final = 25
_PROJECTS_NAMED: Final = 3
_EFFECT_COLOURS: Final = {"admitted": "green", "refused": "red", "redundant": "yellow"}
_TOTALS: Final = (
    ("same", "would be answered the same", None),
    ("other_reason", "the same, for another reason", None),
    ("admitted", "would be admitted, and were not", "green"),
    ("refused", "would be refused, and were not", "red"),
    ("redundant", "would be redundant, and were not", "yellow"),
    ("cannot_be_told", "cannot be told", None),
)
_UNTOLD: Final = {
    "foreseen_not_recorded": "an older version did not record where what was outstanding would have led",
    "earlier_not_known": "whether the same had preempted already was not recorded",
    "launched_not_recorded": "an older version did not record whether the instance had ever run",
}


@click.command()
@click.option("--policy", "name", required=True, metavar="NAME|FILE", help="The policy to judge by.")
@span_options
@click.option("--project", metavar="PROJECT", help="Only the submissions of one project.")
@click.option("--reasons", is_flag=True, help="List also what would be answered the same for another reason.")
@json_option
@needs_invocation
def replay(
    invocation: Invocation,
    *,
    name: str,
    database: Path | None,
    path: Path | None,
    since: str | None,
    until: str | None,
    project: str | None,
    reasons: bool,
) -> None:
    """Judge every recorded submission by another policy.

    Each in the state that it met then.
    Shows who would have been admitted or refused otherwise, by operation, rule
    and project. It only reads, and works beside a running server.

    Each submission is judged by itself: what would have followed from another
    answer is not played through.
    """
    from interlock.policies.reading import compile_named
    from interlock.policies.replaying import replay as judge_all

    with told():
        policy = compile_named(name)
    with opened(invocation, database, path) as history:
        span = span_of(history, since, until)
        rows = history.submissions(span.since_ms, span.until_ms, project)
        result = judge_all(rows, policy, history.instance_id)
    if not result.totals.submissions and not result.unreadable:
        raise span.nothing("submission" if project is None else f"submission of the project {printable(project)}")
    if invocation.json:
        invocation.emit(result)
        return
    _show_replay(invocation, result, reasons=reasons)


def _show_replay(invocation: Invocation, result: Replay, *, reasons: bool) -> None:
    totals = result.totals
    when = ""
    if result.first_at_ms is not None and result.last_at_ms is not None:
        when = f", {moment(result.first_at_ms)} to {moment(result.last_at_ms)}"
    invocation.say(f"Policy {printable(result.policy)} on {totals.submissions} submissions{when}.")
    before = ", ".join(f"{printable(one.name) or 'not recorded'} ({one.submissions})" for one in result.decided_by)
    invocation.say(f"Decided then by: {before}.")
    for field, text, colour in _TOTALS:
        count = getattr(totals, field)
        if count or field in {"same", "admitted", "refused"}:
            line = f"{count:>9}  {_share(count, totals.submissions):>6}  {text}"
            invocation.say(click.style(line, fg=colour) if colour and count else line)
    for cause, count in result.untold.items():
        invocation.say(f"{'':>9}  {'':>6}  {count}: {_UNTOLD[cause]}")
    if result.unreadable:
        invocation.say(f"{result.unreadable} events tell no submission that this version knows.")
    shown = [one for one in result.differences if reasons or one.effect != "other_reason"]
    if shown:
        _show_differences(invocation, shown)


def _show_differences(invocation: Invocation, differences: list[Difference]) -> None:
    invocation.say("")
    invocation.table(
        ("HOW MANY", "OPERATION", "WAS", "WOULD BE", "PROJECTS", "FOR EXAMPLE"),
        (
            (
                str(one.submissions),
                spoken(one.operation),
                _answer(one.recorded),
                Cell(_answer(one.candidate), _EFFECT_COLOURS.get(one.effect)),
                _projects(one.projects),
                f"{printable(one.example.instance)}, {moment(one.example.at_ms)}",
            )
            for one in differences[:_LINES]
        ),
    )
    if len(differences) > _LINES:
        rest = sum(one.submissions for one in differences[_LINES:])
        invocation.say(f"... and {len(differences) - _LINES} more lines with {rest} submissions; --json has them all.")


def _answer(answer: Answer) -> str:
    reason = f" ({answer.reason})" if answer.reason else ""
    return printable(f"{answer.disposition} by {answer.rule}{reason}")


def _projects(projects: dict[str, int]) -> str:
    named = [f"{printable(name)} {count}" for name, count in list(projects.items())[:_PROJECTS_NAMED]]
    rest = len(projects) - len(named)
    return ", ".join(named) + (f" +{rest}" if rest else "")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


COMMANDS: Final[tuple[click.Command, ...]] = (replay, suggest)
