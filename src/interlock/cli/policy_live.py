"""`interlock policy load`, `rollback` and `history`: the policy of a server that runs, and putting another there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from interlock.api.policy_schemas import PolicyFinding, PolicyHistory, PolicyLoaded, PolicyProblem, PolicyWalk
from interlock.cli.client import Reply
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.wording import clock, duration, printable
from interlock.core.errors import PolicyError

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_CHECK_S: Final = 60.0
"""How long a server may take to read and check a policy, on top of the time for walking it."""
_WALK_S: Final = 60.0
"""How long it may walk where nobody says."""
_DIGEST_SHOWN: Final = 16
_STORIES_SHOWN: Final = 2
"""How many ways in which laws can be broken are told to people; the rest says little that is new."""
_COLOURS: Final = {"error": "red", "warning": "yellow", "note": None}
_HOW: Final = {"configured": "configured", "reloaded": "reloaded", "loaded": "loaded", "rolled_back": "rolled back"}


def _number(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """What may be anything that a float can, except not a number."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no number of seconds.")
    return value


def _terms(command: CommandT) -> CommandT:
    """The options that say on which terms a policy is put in force."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Only have it proved; change nothing."),
        click.option(
            "--explore",
            "explore_seconds",
            type=click.FloatRange(0, 86_400),
            metavar="SECONDS",
            callback=_number,
            help="How long the server walks the reachable states first; 0: not at all.",
        ),
        click.option(
            "--outstanding",
            type=click.Choice(["keep", "rejudge"]),
            default="keep",
            show_default=True,
            help="Whether requests that were admitted keep their promise, or are judged again.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("name", metavar="NAME|FILE")
@_terms
@click.option("--if-in-force", "digest", metavar="DIGEST", help="Only if this policy is in force now.")
@json_option
@needs_invocation
def load(
    invocation: Invocation,
    *,
    name: str,
    outstanding: str,
    explore_seconds: float | None,
    dry_run: bool,
    digest: str | None,
) -> None:
    """Have the server put a policy in force.

    NAME is a built-in's; a FILE is sent with what it extends.

    The server reads, checks and explores it first. If something is wrong with
    it, nothing is changed, and the exit code is 1.
    """
    wish = {**_sent(name), **_wished(outstanding, explore_seconds, dry_run)}
    headers = {} if digest is None else {"If-Match": f'"{digest}"'}
    with _told():
        reply = invocation.client.put("/v1/policy", wish, headers, wait_s=_patience_s(explore_seconds))
    _show(invocation, reply, dry_run=dry_run)


@click.command()
@click.option("--to", type=click.IntRange(min=1), metavar="NUMBER", help="What this line of the history put in force.")
@_terms
@json_option
@needs_invocation
def rollback(
    invocation: Invocation, *, to: int | None, outstanding: str, explore_seconds: float | None, dry_run: bool
) -> None:
    """Put in force again what was in force before the present policy."""
    wish = {**({} if to is None else {"to": to}), **_wished(outstanding, explore_seconds, dry_run)}
    with _told():
        reply = invocation.client.post("/v1/policy/rollback", wish, wait_s=_patience_s(explore_seconds))
    _show(invocation, reply, dry_run=dry_run)


@click.command()
@click.option("--limit", type=click.IntRange(1, 500), default=20, show_default=True, help="How many at most.")
@json_option
@needs_invocation
def history(invocation: Invocation, *, limit: int) -> None:
    """List the policies that were in force, newest first."""
    reply = invocation.client.get("/v1/policy/history", {"limit": limit})
    if invocation.answer(reply):
        return
    invocation.table(
        ("NUMBER", "SINCE", "POLICY", "DIGEST", "HOW", "BY", "OUTSTANDING"),
        (
            (
                str(one.number),
                clock(one.at, invocation.client.now),
                printable(one.name),
                one.digest[:_DIGEST_SHOWN],
                _HOW[one.source.value],
                printable(one.by),
                one.outstanding.value + (f", {one.cancelled} cancelled" if one.cancelled is not None else ""),
            )
            for one in reply.decode(PolicyHistory).items
        ),
    )


COMMANDS: Final[tuple[click.Command, ...]] = (load, rollback, history)


# ---------------------------------------------------------------------------------------------------------- sending


def _sent(name: str) -> dict[str, object]:
    """What is sent of a policy that was named: its name, or its text and that of the files that it extends."""
    if "/" not in name and not name.endswith(".toml"):
        return {"name": name}
    from interlock.policies.sources import bundle_of

    try:
        bundle = bundle_of(Path(name))
    except PolicyError as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None
    return {"main": bundle.main, "files": bundle.files}


def _wished(outstanding: str, explore_seconds: float | None, dry_run: bool) -> dict[str, object]:
    wish: dict[str, object] = {"outstanding": outstanding, "dry_run": dry_run}
    return wish if explore_seconds is None else {**wish, "explore_seconds": explore_seconds}


def _patience_s(explore_seconds: float | None) -> float:
    return _CHECK_S + (_WALK_S if explore_seconds is None else explore_seconds)


class _told:  # noqa: N801 - reads as a sentence where it is used
    """A context in which a refusal of the policy becomes a failure that shows what was found."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Failure) or "problem:policy" not in str(error.document.get("type")):
            return
        if error.code is not ExitCode.REJECTED:
            return
        try:
            problem = msgspec.convert(error.document, PolicyProblem)
        except msgspec.ValidationError:
            # No policy was found to be proved.
            error.code = ExitCode.USAGE
            return
        error.code = ExitCode.ENDED_OTHERWISE
        error.text = _problem_text(problem)


# ---------------------------------------------------------------------------------------------------------- showing


def _show(invocation: Invocation, reply: Reply, *, dry_run: bool) -> None:
    if invocation.answer(reply):
        return
    loaded = reply.decode(PolicyLoaded)
    invocation.say(_outcome(loaded, dry_run=dry_run))
    if loaded.exploration is not None:
        invocation.say(_walk_text(loaded.exploration))
    for finding in loaded.findings:
        invocation.say(_finding_text(finding))


def _outcome(loaded: PolicyLoaded, *, dry_run: bool) -> str:
    named = f"{printable(loaded.name)} ({loaded.digest[:_DIGEST_SHOWN]})"
    if dry_run:
        return f"{named} can be put in force; nothing was changed."
    if not loaded.changed:
        return f"{named} is in force already."
    before = f"{printable(loaded.previous.name)} ({loaded.previous.digest[:_DIGEST_SHOWN]})"
    if loaded.cancelled is None:
        outstanding = "What was admitted keeps its promise."
    else:
        requests = "request was" if loaded.cancelled == 1 else "requests were"
        outstanding = f"What waited was judged again: {loaded.cancelled} {requests} cancelled."
    return click.style(f"{named} is in force", fg="green", bold=True) + f", instead of {before}. {outstanding}"


def _walk_text(walk: PolicyWalk) -> str:
    seen = f"{walk.states:,} states in {duration(walk.seconds)}"
    if walk.complete:
        return f"Explored: all {seen}, and no law broken."
    return f"Explored: {seen}, and no law broken in them; there are more, which `interlock policy explore` can see."


def _finding_text(finding: PolicyFinding) -> str:
    severity = click.style(finding.severity, fg=_COLOURS[finding.severity])
    text = f"{printable(finding.place)}: {severity}: {printable(finding.message)}"
    return text if finding.remedy is None else f"{text}\n  {printable(finding.remedy)}"


def _problem_text(problem: PolicyProblem) -> str:
    lines = [click.style("Refused: ", fg="red", bold=True) + printable(problem.detail)]
    if problem.remedy:
        lines.append(printable(problem.remedy))
    lines += [_finding_text(finding) for finding in problem.findings]
    for violation in problem.violations[:_STORIES_SHOWN]:
        lines.append(f"Law {violation.law} can be broken: {printable(violation.what)}. How, for `interlock rehearse`:")
        lines += [f"  {printable(line)}" for line in violation.story]
    more = len(problem.violations) - _STORIES_SHOWN
    if more > 0:
        lines.append(f"And {more} more ways; `interlock policy explore` and --json tell them all.")
    return "\n".join(lines)
