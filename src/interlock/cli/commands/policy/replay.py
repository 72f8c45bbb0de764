"""`interlock policy replay`: evaluate recorded submissions by another policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.context import Cell, Invocation, with_json
from interlock.cli.options.configuration import errors_as_failures, moment, open_history, span_of, span_options
from interlock.cli.output.formatting import humanize, printable

if TYPE_CHECKING:
    from interlock.policies.history.replay import RecordedAnswer, Replay, ReplayDifference

_LINES: Final = 25
_PROJECTS_NAMED: Final = 3
_EFFECT_COLOURS: Final = {"admitted": "green", "refused": "red", "redundant": "yellow"}
_TOTALS: Final = (
    ("same", "would be decided the same", None),
    ("other_reason", "the same, for another reason", None),
    ("admitted", "would be admitted, and were not", "green"),
    ("refused", "would be denied, and were not", "red"),
    ("redundant", "would be redundant, and were not", "yellow"),
    ("cannot_be_told", "unknown", None),
)
_UNTOLD: Final = {
    "foreseen_not_recorded": "an older version did not record where what was outstanding would have led",
    "earlier_not_known": "whether the same had preempted already was not recorded",
    "launched_not_recorded": "an older version did not record whether the instance had ever run",
    "unchanged_not_recorded": "an older version did not record whether it would have changed anything",
}


@policy_commands.command()
@click.option("--policy", "name", required=True, metavar="NAME|FILE", help="Policy to evaluate.")
@span_options
@click.option("--project", metavar="PROJECT", help="Only submissions of this project.")
@click.option("--reasons", is_flag=True, help="Also list decisions that differ only in the reason.")
@with_json
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
    """Evaluate every recorded submission by another policy.

    Shows which would have been decided differently, by operation, rule and
    project. It only reads the database, also while the server runs.

    Each submission is evaluated in its recorded state; consequences of another
    decision are not simulated.
    """
    from interlock.policies.history.replay import replay as judge_all
    from interlock.policies.language.loader import compile_named

    with errors_as_failures():
        policy = compile_named(name)
    with open_history(invocation, database, path) as history:
        span = span_of(history, since, until)
        rows = history.submissions(span.since_ms, span.until_ms, project)
        result = judge_all(rows, policy, history.instance_id)
    if not result.totals.submissions and not result.unreadable:
        raise span.no_records("submission" if project is None else f"submission of the project {printable(project)}")
    if invocation.json:
        invocation.emit(result)
        return
    _show_replay(invocation, result, reasons=reasons)


def _show_replay(invocation: Invocation, result: Replay, *, reasons: bool) -> None:
    totals = result.totals
    when = ""
    if result.first_at_ms is not None and result.last_at_ms is not None:
        when = f", {moment(result.first_at_ms)} to {moment(result.last_at_ms)}"
    invocation.echo(f"Policy {printable(result.policy)} on {totals.submissions} submissions{when}.")
    before = ", ".join(f"{printable(one.name) or 'not recorded'} ({one.submissions})" for one in result.decided_by)
    invocation.echo(f"Decided then by: {before}.")
    for field, text, colour in _TOTALS:
        count = getattr(totals, field)
        if count or field in {"same", "admitted", "refused"}:
            line = f"{count:>9}  {_share(count, totals.submissions):>6}  {text}"
            invocation.echo(click.style(line, fg=colour) if colour and count else line)
    for cause, count in result.untold.items():
        invocation.echo(f"{'':>9}  {'':>6}  {count}: {_UNTOLD[cause]}")
    if result.unreadable:
        invocation.echo(f"{result.unreadable} events are not readable by this version.")
    shown = [one for one in result.differences if reasons or one.effect != "other_reason"]
    if shown:
        _show_differences(invocation, shown)


def _show_differences(invocation: Invocation, differences: list[ReplayDifference]) -> None:
    invocation.echo("")
    invocation.table(
        ("HOW MANY", "OPERATION", "WAS", "WOULD BE", "PROJECTS", "FOR EXAMPLE"),
        (
            (
                str(one.submissions),
                humanize(one.operation),
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
        invocation.echo(f"... and {len(differences) - _LINES} more lines with {rest} submissions; --json has them all.")


def _answer(answer: RecordedAnswer) -> str:
    reason = f" ({answer.reason})" if answer.reason else ""
    return printable(f"{answer.disposition} by {answer.rule}{reason}")


def _projects(projects: dict[str, int]) -> str:
    named = [f"{printable(name)} {count}" for name, count in list(projects.items())[:_PROJECTS_NAMED]]
    rest = len(projects) - len(named)
    return ", ".join(named) + (f" +{rest}" if rest else "")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
