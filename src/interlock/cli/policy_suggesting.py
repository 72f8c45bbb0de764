"""`interlock policy suggest`: thresholds that recorded history speaks for, shown, written and drawn."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Cell, Invocation, json_option, needs_invocation
from interlock.cli.recorded_spans import FILE, Span, moment, opened, span_of, span_options
from interlock.cli.server import read_config, told
from interlock.cli.wording import printable, spoken
from interlock.core.errors import PolicyError

if TYPE_CHECKING:
    from interlock.policies.suggesting import Finding, Proposal, Suggestion


@click.command()
@click.option("--policy", "name", metavar="NAME|FILE", help="Today's policy. Default: the configured one.")
@span_options
@click.option("--percentile", type=click.FloatRange(50, 99.999), default=99.0, show_default=True, help="In per cent.")
@click.option(
    "--confidence",
    type=click.FloatRange(50, 99.999),
    default=95.0,
    show_default=True,
    help="How surely the percentile is no longer than what is taken for it, in per cent.",
)
@click.option("--factor", type=click.FloatRange(1, 1000), default=3.0, show_default=True, help="Times the percentile.")
@click.option("--out", type=FILE, metavar="FILE", help="Write a policy file with the proposed thresholds.")
@click.option("--picture", type=FILE, metavar="FILE", help="Draw the silences and thresholds: .png, .svg or .html.")
@json_option
@needs_invocation
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
    """Propose thresholds from how long recorded operations kept silent.

    For each operation that a rule may take over from, a percentile of the
    longest silence of those that succeeded, with a bound that holds with the
    stated confidence, times the factor. Where too few were recorded, nothing is
    proposed.

    Progress without news leaves no event, so a recorded silence is an upper
    bound of the true one.
    """
    from interlock.policies.reading import load
    from interlock.policies.suggesting import Aim, record
    from interlock.policies.suggesting import suggest as suggest_thresholds

    aim = Aim(percentile=percentile, confidence=confidence, factor=factor)
    today = name if name is not None else read_config(path, invocation.environment).policy
    with told():
        policy = load(today)
        _check_targets(out, picture)
    with opened(invocation, database, path) as history:
        span = span_of(history, since, until)
        recorded = record(history.service(span.since_ms, span.until_ms), policy)
        suggestion = suggest_thresholds(policy, recorded, aim)
    if not any(finding.healthy for finding in suggestion.findings):
        raise span.nothing("operation that a threshold is about and that succeeded")
    if out is not None:
        _write_policy(out, today, suggestion, span)
    if picture is not None:
        from interlock.policies.histograms import draw

        with told(), _writing(picture):
            draw(suggestion, recorded, picture)
    if invocation.json:
        written = {"out": None if out is None else str(out), "picture": None if picture is None else str(picture)}
        invocation.emit({**msgspec.to_builtins(suggestion), **written})
        return
    _show_suggestion(invocation, suggestion, out, picture)


def _check_targets(out: Path | None, picture: Path | None) -> None:
    """Say what cannot be written before a long history is read for it."""
    if out is not None and out.exists():
        raise Failure(ExitCode.USAGE, f"out: {out} is there already.", remedy="Name another file, or move it aside.")
    if out is not None and out.suffix != ".toml":
        raise Failure(ExitCode.USAGE, f"out: {out} is no name of a policy file.", remedy="End it in .toml.")
    for option, file in (("out", out), ("picture", picture)):
        if file is not None and not file.absolute().parent.is_dir():
            raise Failure(ExitCode.USAGE, f"{option}: There is no folder {file.absolute().parent}.")
    if picture is not None:
        from interlock.policies.histograms import check_suffix

        check_suffix(picture)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"{file} cannot be written: {error.strerror}.") from None


def _write_policy(out: Path, today: str, suggestion: Suggestion, span: Span) -> None:
    from interlock.policies.reading import load
    from interlock.policies.suggested_policies import policy_text

    begin, end = moment(span.since_ms or span.first_ms), moment(span.until_ms or span.last_ms)
    with told(), _writing(out):
        out.write_text(policy_text(suggestion, _extends(today, out), f"what was recorded from {begin} to {end}"))
        try:
            load(out)
        except PolicyError:
            out.unlink()
            raise


def _extends(today: str, out: Path) -> str:
    """How the new file names today's policy."""
    from interlock.policies.reading import builtin_names

    if today in builtin_names():
        return today
    relative = os.path.relpath(Path(today).absolute(), out.absolute().parent)
    return relative if "/" in relative or relative.endswith(".toml") else f"./{relative}"


def _show_suggestion(invocation: Invocation, suggestion: Suggestion, out: Path | None, picture: Path | None) -> None:
    aim = suggestion.aim
    invocation.say(
        f"Policy {printable(suggestion.policy)}: the {aim.percentile:g}th percentile of healthy operations, bounded "
        f"with {aim.confidence:g} % confidence, times {aim.factor:g}. That takes {suggestion.needed} of an operation."
    )
    seen = [finding for finding in suggestion.findings if finding.healthy]
    measured = ("HEALTHY", "MEDIAN", f"P{aim.percentile:g}", "BOUND", "LONGEST")
    titles = ("OPERATION", *measured, "PROPOSED", "TODAY", "CUT SHORT", "MEASURED")
    invocation.table(titles, (_finding_row(finding) for finding in seen))
    unseen = sorted({_watched(finding) for finding in suggestion.findings} - {_watched(finding) for finding in seen})
    if unseen:
        invocation.say(f"Never seen to succeed: {', '.join(unseen)}.")
    invocation.say("")
    _show_proposals(invocation, suggestion.proposals)
    if suggestion.fixed:
        invocation.say(f"Fixed, and left as they are: {', '.join(map(printable, suggestion.fixed))}.")
    if out is not None:
        invocation.say(f"The policy is in {out}. Judge history by it: interlock policy replay --policy {out}")
    if picture is not None:
        invocation.say(f"The picture is in {picture}.")


def _watched(finding: Finding) -> str:
    """What a finding is about: an operation, or some of its phases."""
    phases = "" if finding.all_phases else f" ({', '.join(map(spoken, finding.phases))})"
    return f"{spoken(finding.operation)}{phases}"


def _finding_row(finding: Finding) -> tuple[str | Cell, ...]:
    from interlock.policies.suggested_policies import shown, written

    def length(milliseconds: int | None) -> str:
        return "-" if milliseconds is None else shown(milliseconds)

    proposed = "too few" if finding.proposed_ms is None else written(finding.proposed_ms)
    cut_short = "-" if finding.proposed_ms is None else str(finding.cut_short)
    return (
        _watched(finding),
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
    from interlock.policies.suggested_policies import titled, written

    every = list(proposals)
    changed = [proposal for proposal in every if proposal.changed]
    if not changed:
        invocation.say("Nothing speaks for another threshold than today's.")
        return
    invocation.table(
        ("RULE", "TODAY", "PROPOSED", "TAKES OVER FROM"),
        (
            (
                printable(title),
                written(proposal.today_ms),
                Cell(written(proposal.proposed_ms), "green" if proposal.proposed_ms < proposal.today_ms else "yellow"),
                ", ".join(spoken(operation) for operation in proposal.operations),
            )
            for title, proposal in titled(changed, every)
        ),
    )
