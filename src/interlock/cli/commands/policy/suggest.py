"""`interlock policy suggest`: propose thresholds from recorded history."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.context import Cell, Invocation, with_json
from interlock.cli.failures import ExitCode, Failure, writing
from interlock.cli.options.configuration import (
    FILE,
    Span,
    errors_as_failures,
    moment,
    open_history,
    read_config,
    span_of,
    span_options,
)
from interlock.cli.output.formatting import humanize, printable
from interlock.core.errors import PolicyError

if TYPE_CHECKING:
    from interlock.policies.history.threshold_advisor import OperationStatistics, Proposal, Suggestion


@policy_commands.command()
@click.option("--policy", "name", metavar="NAME|FILE", help="Today's policy. Default: the configured one.")
@span_options
@click.option("--percentile", type=click.FloatRange(50, 99.999), default=99.0, show_default=True, help="In per cent.")
@click.option(
    "--confidence",
    type=click.FloatRange(50, 99.999),
    default=95.0,
    show_default=True,
    help="Confidence of the percentile's upper bound, in per cent.",
)
@click.option(
    "--factor", type=click.FloatRange(1, 1000), default=3.0, show_default=True, help="Multiple of the percentile."
)
@click.option("--out", type=FILE, metavar="FILE", help="Write a policy file with the proposed thresholds.")
@click.option(
    "--picture",
    type=FILE,
    metavar="FILE",
    help="Plot the times without progress and the thresholds: .png, .svg or .html.",
)
@with_json
def suggest(
    invocation: Invocation,
    *,
    name: str | None,
    database: Path | None,
    path: Path | None,
    since: str | None,
    until: str | None,
    out: Path | None,
    picture: Path | None,
    percentile: float,
    confidence: float,
    factor: float,
) -> None:
    """Propose thresholds from the recorded times without progress.

    For each operation that a rule can take over from: a percentile of the
    longest time without progress of those that succeeded, its upper bound with
    the given confidence, times the factor. Nothing is proposed from too few
    records.

    Not all progress is recorded as an event, so recorded times are upper bounds.
    """
    from interlock.policies.history.threshold_advisor import Aim, record
    from interlock.policies.history.threshold_advisor import suggest as suggest_thresholds
    from interlock.policies.language.loader import load

    aim = Aim(percentile=percentile, confidence=confidence, factor=factor)
    today = name if name is not None else read_config(path, invocation.environment).policy
    with errors_as_failures():
        policy = load(today)
        _check_targets(out, picture)
    with open_history(invocation, database, path) as history:
        span = span_of(history, since, until)
        recorded = record(history.service(span.since_ms, span.until_ms), policy)
        suggestion = suggest_thresholds(policy, recorded, aim)
    if not any(finding.healthy for finding in suggestion.findings):
        raise span.no_records("operation that a threshold is about and that succeeded")
    if out is not None:
        _write_policy(out, today, suggestion, span)
    if picture is not None:
        from interlock.policies.history.threshold_plot import draw

        with errors_as_failures(), writing(picture):
            draw(suggestion, recorded, picture)
    if invocation.json:
        written = {"out": None if out is None else str(out), "picture": None if picture is None else str(picture)}
        invocation.emit({**msgspec.to_builtins(suggestion), **written})
        return
    _show_suggestion(invocation, suggestion, out, picture)


def _check_targets(out: Path | None, picture: Path | None) -> None:
    """Raise `Failure` for invalid output files, before a long history is read."""
    if out is not None and out.exists():
        raise Failure(ExitCode.USAGE, f"--out: {out} already exists.", remedy="Choose another file, or move it.")
    if out is not None and out.suffix != ".toml":
        raise Failure(ExitCode.USAGE, f"Invalid --out {out}: expected a name that ends in .toml.")
    for option, file in (("out", out), ("picture", picture)):
        if file is not None and not file.absolute().parent.is_dir():
            raise Failure(ExitCode.USAGE, f"--{option}: folder {file.absolute().parent} not found.")
    if picture is not None:
        from interlock.policies.history.threshold_plot import check_suffix

        check_suffix(picture)


def _write_policy(out: Path, today: str, suggestion: Suggestion, span: Span) -> None:
    from interlock.policies.history.suggested_policies import policy_text
    from interlock.policies.language.loader import load

    begin, end = moment(span.since_ms or span.first_ms), moment(span.until_ms or span.last_ms)
    with errors_as_failures(), writing(out):
        out.write_text(policy_text(suggestion, _extends(today, out), f"what was recorded from {begin} to {end}"))
        try:
            load(out)
        except PolicyError:
            out.unlink()
            raise


def _extends(today: str, out: Path) -> str:
    """Return the `extends` of the new file."""
    from interlock.policies.language.loader import builtin_names

    if today in builtin_names():
        return today
    relative = os.path.relpath(Path(today).absolute(), out.absolute().parent)
    return relative if "/" in relative or relative.endswith(".toml") else f"./{relative}"


def _show_suggestion(invocation: Invocation, suggestion: Suggestion, out: Path | None, picture: Path | None) -> None:
    aim = suggestion.aim
    invocation.echo(
        f"Policy {printable(suggestion.policy)}: the {aim.percentile:g}th percentile of healthy operations, bounded "
        f"with {aim.confidence:g} % confidence, times {aim.factor:g}. That takes {suggestion.needed} of an operation."
    )
    seen = [finding for finding in suggestion.findings if finding.healthy]
    measured = ("HEALTHY", "MEDIAN", f"P{aim.percentile:g}", "BOUND", "LONGEST")
    titles = ("OPERATION", *measured, "PROPOSED", "TODAY", "CUT SHORT", "MEASURED")
    invocation.table(titles, (_finding_row(finding) for finding in seen))
    unseen = sorted({_subject(finding) for finding in suggestion.findings} - {_subject(finding) for finding in seen})
    if unseen:
        invocation.echo(f"Never seen to succeed: {', '.join(unseen)}.")
    invocation.echo("")
    _show_proposals(invocation, suggestion.proposals)
    if suggestion.fixed:
        invocation.echo(f"Fixed, and left as they are: {', '.join(map(printable, suggestion.fixed))}.")
    if out is not None:
        invocation.echo(f"The policy is in {out}. Judge history by it: interlock policy replay --policy {out}")
    if picture is not None:
        invocation.echo(f"The picture is in {picture}.")


def _subject(finding: OperationStatistics) -> str:
    """Return a finding's operation and phases."""
    phases = "" if finding.all_phases else f" ({', '.join(map(humanize, finding.phases))})"
    return f"{humanize(finding.operation)}{phases}"


def _finding_row(finding: OperationStatistics) -> tuple[str | Cell, ...]:
    from interlock.policies.history.suggested_policies import shown, written

    def length(milliseconds: int | None) -> str:
        return "-" if milliseconds is None else shown(milliseconds)

    proposed = "too few" if finding.proposed_ms is None else written(finding.proposed_ms)
    cut_short = "-" if finding.proposed_ms is None else str(finding.cut_short)
    return (
        _subject(finding),
        str(finding.healthy),
        length(finding.median_ms),
        length(finding.percentile_ms),
        length(finding.bound_ms),
        length(finding.longest_ms),
        Cell(proposed, None if finding.proposed_ms is None else "green"),
        " ".join(written(one) for one in finding.today_ms),
        f"{cut_short} (today {finding.cut_short_today})",
        "silence" if finding.measured_from == "last_progress" else "time since it was taken",
    )


def _show_proposals(invocation: Invocation, proposals: Iterable[Proposal]) -> None:
    from interlock.policies.history.suggested_policies import titled, written

    every = list(proposals)
    changed = [proposal for proposal in every if proposal.changed]
    if not changed:
        invocation.echo("Nothing speaks for another threshold than today's.")
        return
    invocation.table(
        ("RULE", "TODAY", "PROPOSED", "TAKES OVER FROM"),
        (
            (
                printable(title),
                written(proposal.today_ms),
                Cell(written(proposal.proposed_ms), "green" if proposal.proposed_ms < proposal.today_ms else "yellow"),
                ", ".join(humanize(operation) for operation in proposal.operations),
            )
            for title, proposal in titled(changed, every)
        ),
    )
