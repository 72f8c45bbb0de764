"""`interlock policy load`, `rollback` and `history`: switch the policy of a running server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from interlock.api.schemas.policy import (
    PolicyBlockedVm,
    PolicyFinding,
    PolicyHistory,
    PolicyLoaded,
    PolicyProblem,
)
from interlock.cli.client.http_client import Reply
from interlock.cli.commands.policy.explore import read_certificate
from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import compiled, finding_lines, story_lines, walk_text
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import errors_as_failures
from interlock.cli.output.formatting import clock, printable
from interlock.policies.laws import LAWS

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_CHECK_S: Final = 60.0
"""Timeout of reading and checking a policy, in addition to its exploration."""
_WALK_S: Final = 60.0
"""Default timeout of the exploration."""
_DIGEST_SHOWN: Final = 16
_BLOCKED_SHOWN: Final = 5
_STORIES_SHOWN: Final = 2
"""How many violations are printed."""


def _number(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """Reject NaN."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("Invalid number of seconds: nan.")
    return value


def _terms(command: CommandT) -> CommandT:
    """Add the options of a policy switch."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Only verify it."),
        click.option(
            "--explore",
            "explore_seconds",
            type=click.FloatRange(0, 86_400),
            metavar="SECONDS",
            callback=_number,
            help="Time limit for exploring the reachable states first; 0: none.",
        ),
        click.option(
            "--outstanding",
            type=click.Choice(["keep", "rejudge"]),
            default="keep",
            show_default=True,
            help="Whether to keep admitted requests, or to evaluate them again.",
        ),
    ):
        command = option(command)
    return command


@policy_commands.command()
@click.argument("name", metavar="NAME|FILE")
@_terms
@click.option(
    "--certificate",
    "certificate_path",
    type=click.Path(path_type=Path),
    help="A signed certificate of `policy explore`, in place of an exploration by the server.",
)
@click.option("--if-in-force", "digest", metavar="DIGEST", help="Only if this policy is in force now.")
@with_json
def load(
    invocation: Invocation, /, *, name: str, certificate_path: Path | None, digest: str | None, **terms: Any
) -> None:
    """Load a policy into the server.

    NAME is a built-in policy; a FILE is sent with the files that it extends.

    The server checks and explores it first. If it is rejected, nothing
    changes, and the exit code is 1.
    """
    body = {**_policy_fields(name), **_given(terms)}
    if certificate_path is not None:
        body["certificate"] = read_certificate(certificate_path)
    headers = {} if digest is None else {"If-Match": f'"{digest}"'}
    with _findings_in_failure(name):
        reply = invocation.client.put("/v1/policy", body, headers, wait_s=_patience_s(terms))
    _show(invocation, reply, dry_run=terms["dry_run"], built_in="main" not in body)


@policy_commands.command()
@click.option(
    "--to", type=click.IntRange(min=1), metavar="NUMBER", help="Number in the history, instead of the previous policy."
)
@_terms
@with_json
def rollback(invocation: Invocation, /, **terms: Any) -> None:
    """Put the previous policy in force again."""
    with _findings_in_failure():
        reply = invocation.client.post("/v1/policy/rollback", _given(terms), wait_s=_patience_s(terms))
    _show(invocation, reply, dry_run=terms["dry_run"])


@policy_commands.command()
@click.option("--limit", type=click.IntRange(1, 500), default=20, show_default=True, help="Maximum number.")
@with_json
def history(invocation: Invocation, *, limit: int) -> None:
    """List the policies that were in force, newest first."""
    columns = {
        "NUMBER": lambda one: str(one.number),
        "SINCE": lambda one: clock(one.at, invocation.client.now),
        "POLICY": lambda one: printable(one.name),
        "DIGEST": lambda one: one.digest[:_DIGEST_SHOWN],
        "HOW": lambda one: one.source.value.replace("_", " "),
        "BY": lambda one: printable(one.by),
        "OUTSTANDING": lambda one: (
            one.outstanding.value + (f", {one.cancelled} cancelled" if one.cancelled is not None else "")
        ),
    }
    invocation.print_items(invocation.client.get("/v1/policy/history", {"limit": limit}), PolicyHistory, columns)


# ---------------------------------------------------------------------------------------------------------- sending


def _policy_fields(name: str) -> dict[str, object]:
    """Return the body's policy: its name, or its text and the files that it extends."""
    if "/" not in name and not name.endswith(".toml"):
        return {"name": name}
    from interlock.policies.language.bundle import bundle_of

    with errors_as_failures():
        bundle = bundle_of(Path(name))
    return {"main": bundle.main, "files": bundle.files}


def _given(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the request, which have the names of their options."""
    return {field: value for field, value in terms.items() if value is not None}


def _patience_s(terms: Mapping[str, Any]) -> float:
    explore_s: float | None = terms["explore_seconds"]
    return _CHECK_S + (_WALK_S if explore_s is None else explore_s)


@contextmanager
def _findings_in_failure(name: str | None = None) -> Iterator[None]:
    """Add the findings to the failure of a rejected policy."""
    try:
        yield
    except Failure as error:
        if "problem:policy" in str(error.document.get("type")) and error.code is ExitCode.REJECTED:
            try:
                error.text = _problem_text(msgspec.convert(error.document, PolicyProblem), name)
                error.code = ExitCode.ENDED_OTHERWISE
            except msgspec.ValidationError:
                error.code = ExitCode.USAGE  # the policy could not be read
        raise


# ---------------------------------------------------------------------------------------------------------- showing


def _show(invocation: Invocation, reply: Reply, *, dry_run: bool, built_in: bool = False) -> None:
    """Print the result. Findings of a built-in policy are only counted."""
    if invocation.print_json(reply):
        return
    loaded = reply.decode(PolicyLoaded)
    invocation.echo(_outcome(loaded, dry_run=dry_run))
    if loaded.exploration is not None:
        invocation.echo(walk_text(loaded.exploration))
    if built_in and loaded.findings:
        count = len(loaded.findings)
        notes = "note on it" if count == 1 else "notes on it"
        invocation.echo(f"{count} {notes}; `interlock policy check {loaded.name}` shows them.")
        return
    for line in _finding_lines(loaded.findings):
        invocation.echo(line)


def _outcome(loaded: PolicyLoaded, *, dry_run: bool) -> str:
    named = f"{printable(loaded.name)} ({loaded.digest[:_DIGEST_SHOWN]})"
    if dry_run:
        return f"{named} can be put in force; nothing was changed."
    if not loaded.changed:
        return f"{named} is in force already."
    before = f"{printable(loaded.previous.name)} ({loaded.previous.digest[:_DIGEST_SHOWN]})"
    if loaded.cancelled is None:
        outstanding = "Admitted requests are kept."
    else:
        requests = "request was" if loaded.cancelled == 1 else "requests were"
        outstanding = f"Queued requests were evaluated again: {loaded.cancelled} {requests} cancelled."
    return click.style(f"{named} is in force", fg="green", bold=True) + f", instead of {before}. {outstanding}"


def _finding_lines(findings: Iterable[PolicyFinding]) -> list[str]:
    from interlock.policies.lint import Finding

    return [*finding_lines(msgspec.convert(one, Finding, from_attributes=True) for one in findings)]


def _blocked_text(blocked: PolicyBlockedVm) -> str:
    request = f"{blocked.operation} {blocked.status.replace('_', ' ')}"
    more = f" The same holds for {blocked.alike} more." if blocked.alike else ""
    return printable(f"VM {blocked.name!r} of project {blocked.project!r}, with {request}: {blocked.because}{more}")


def _problem_text(problem: PolicyProblem, name: str | None) -> str:
    policy = None if name is None or not problem.violations else compiled(name)
    lines = [click.style("Rejected: ", fg="red", bold=True) + printable(problem.detail)]
    if problem.remedy:
        lines.append(printable(problem.remedy))
    lines += _finding_lines(problem.findings)
    for violation in problem.violations[:_STORIES_SHOWN]:
        law = LAWS[violation.law]
        lines.append(f"Law {violation.law} ({law.name}) is violated: {printable(violation.what)}. {law.promise}")
        lines.append("Counterexample, for `interlock rehearse`:")
        lines += [f"  {printable(line)}" for line in story_lines(violation.story, policy)]
    lines += [_blocked_text(one) for one in problem.blocked[1:_BLOCKED_SHOWN]]
    if len(problem.blocked) > _BLOCKED_SHOWN:
        lines.append(f"And {len(problem.blocked) - _BLOCKED_SHOWN} more kinds of VMs; see --json.")
    more = len(problem.violations) - _STORIES_SHOWN
    if more > 0:
        lines.append(f"And {more} more; see `interlock policy explore` or --json.")
    return "\n".join(lines)
