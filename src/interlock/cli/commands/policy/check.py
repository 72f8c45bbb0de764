"""`interlock policy check` and `interlock policy test`: lint and test a policy, without a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import SEVERITY_COLOURS, finding_lines, paragraph
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import errors_as_failures
from interlock.cli.output.formatting import printable

if TYPE_CHECKING:
    from interlock.policies.lint import Finding
    from interlock.policies.rehearsal.scenarios import Failed, ScenarioResults


@policy_commands.command()
@click.argument("policies", metavar="NAME|FILE...", nargs=-1)
@click.option("--explain", metavar="CODE", help="Explain a kind of finding, with an example, and check nothing.")
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@click.option(
    "--verbose", is_flag=True, help="Show every finding, also overruled rules and parts that never decide, ungrouped."
)
@with_json
def check(
    invocation: Invocation, *, policies: tuple[str, ...], explain: str | None, strict: bool, verbose: bool
) -> None:
    """Check policies, without a server.

    Finds unreachable rules, contradictions of fixed rules, states without an exit or in which nothing can be deleted,
    thresholds that never pass, and operations admitted in states that no driver supports. `interlock policy explore`
    finds faults that need several requests.

    Exits with 1 on an error (with --strict, also on a warning), and with 2 if a policy does not exist.
    """
    from interlock.policies.lint import check_file, grouped

    if explain is not None:
        _explain(invocation, explain)
        return
    if not policies:
        raise Failure(ExitCode.USAGE, "Missing argument NAME|FILE.", remedy="Name a policy file or a built-in policy.")
    results = []
    for name in policies:
        _must_exist(name)
        results.append((name, check_file(name)))
    severities = [one.severity.value for _, findings in results for one in findings]
    failed = "error" in severities or (strict and "warning" in severities)
    if invocation.json:
        invocation.emit(
            {
                "policies": [
                    {"policy": name, "findings": findings, "groups": grouped(findings)} for name, findings in results
                ],
                "errors": severities.count("error"),
                "warnings": severities.count("warning"),
                "notes": severities.count("note"),
                "passed": not failed,
            }
        )
    else:
        for name, findings in results:
            _print_findings(invocation, name, findings, verbose=verbose)
    if failed:
        raise Failure(ExitCode.ENDED_OTHERWISE, "", text="")


def _must_exist(name: str) -> None:
    """Raise `Failure` if a policy does not exist; faults inside a file are findings."""
    from interlock.policies.language.loader import builtin_names
    from interlock.policies.language.vocabulary import nearest

    if name in builtin_names() or os.path.lexists(name):
        return
    if "/" in name or name.endswith(".toml"):
        raise Failure(ExitCode.USAGE, f"File {name!r} not found.", remedy="Name a policy file or a built-in policy.")
    raise Failure(
        ExitCode.USAGE,
        f"Policy {name!r} not found.",
        remedy=f"{nearest(name, builtin_names())} A file is named by its path, ending in .toml.",
    )


def _print_findings(invocation: Invocation, name: str, findings: Sequence[Finding], *, verbose: bool) -> None:
    shown = [one for one in findings if verbose or not one.detail]
    for line in finding_lines(shown, singly=verbose):
        invocation.echo(line)
    counts = {severity: sum(one.severity.value == severity for one in findings) for severity in SEVERITY_COLOURS}
    parts = [f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts.items() if count]
    hidden = len(findings) - len(shown)
    more = f" ({hidden} of them with --verbose)" if hidden else ""
    invocation.echo(f"{printable(name)}: {', '.join(parts) + more if parts else 'no findings'}.")


def _explain(invocation: Invocation, code: str) -> None:
    from interlock.policies.language.vocabulary import nearest
    from interlock.policies.lint import KINDS

    kind = KINDS.get(code)
    if kind is None:
        raise Failure(ExitCode.USAGE, f"Unknown finding {code!r}.", remedy=nearest(code, KINDS))
    if invocation.json:
        invocation.emit(kind)
        return
    severity = click.style(kind.severity.value, fg=SEVERITY_COLOURS[kind.severity.value], bold=True)
    invocation.echo(f"{kind.code} ({severity})")
    for title, text in (("", kind.meaning), ("Remedy: ", kind.remedy)):
        for line in paragraph(title, text, indent=2):
            invocation.echo(line)
    if kind.example:
        invocation.echo("  Example:")
        for line in kind.text().splitlines():
            invocation.echo(f"    {line}".rstrip())


@policy_commands.command("test")
@click.argument("policies", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--scenarios",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Scenarios to play instead of those next to the policy. May be repeated.",
)
@click.option("--coverage", is_flag=True, help="List the policy's own rules that no scenario covers.")
@with_json
def test_policies(
    invocation: Invocation, *, policies: tuple[str, ...], scenarios: tuple[Path, ...], coverage: bool
) -> None:
    """Run the scenarios of a policy, like unit tests.

    For my-cloud.toml they are my-cloud.tests.jsonl and my-cloud.tests/*.jsonl: events of `interlock rehearse`, one per
    line, each with the expected keys of its result as "expect": {...}. {"test": "name"} starts another scenario with a
    new instance. Lines that start with # or // are comments.

    Exits with 1 if a scenario fails, and with 2 if there is none.
    """
    results = [_run_scenarios(name, scenarios) for name in policies]
    if invocation.json:
        invocation.emit({"policies": results, "passed": not any(one.failures for one in results)})
    else:
        for one in results:
            _print_results(invocation, one, coverage=coverage)
    if any(one.failures for one in results):
        raise Failure(ExitCode.ENDED_OTHERWISE, "", text="")


def _run_scenarios(name: str, named: tuple[Path, ...]) -> ScenarioResults:
    from interlock.policies.language.loader import read
    from interlock.policies.rehearsal.scenarios import files_beside, read_all, run

    with errors_as_failures():
        policy = read(name)
        files = named or files_beside(Path(name))
        scenarios = read_all(files)
    if not scenarios:
        beside = Path(name).with_suffix("")
        raise Failure(
            ExitCode.USAGE,
            f"Scenarios for {name} not found." if not files else f"No scenario in {files[0]}.",
            remedy=f"Write {beside}.tests.jsonl, or name a file with --scenarios.",
        )
    return run(policy, scenarios)


def _print_results(invocation: Invocation, results: ScenarioResults, *, coverage: bool) -> None:
    invocation.echo(click.style(printable(results.policy), bold=True))
    for one in results.scenarios:
        if one.failed is None:
            invocation.echo(f"  {click.style('ok', fg='green')}      {printable(one.name)}")
        else:
            invocation.echo(f"  {click.style('FAILED', fg='red', bold=True)}  {printable(one.name)}")
            _print_failed(invocation, one.failed)
    if coverage:
        for rule in results.untouched:
            invocation.echo(f"  {printable(rule.place)}: no scenario touches {printable(rule.rule)!r}")
    count = len(results.scenarios)
    touched = results.rules - len(results.untouched)
    inherited = (
        f", and {results.inherited_touched} of {results.inherited} that it inherits" if results.inherited else ""
    )
    invocation.echo(
        f"{count} scenario{'s' * (count != 1)}, {results.failures} failed; "
        f"{touched} of {results.rules} own rules touched{inherited}."
    )


def _print_failed(invocation: Invocation, failed: Failed) -> None:
    event = f": {printable(failed.event)}" if failed.event else ""
    invocation.echo(f"          {printable(failed.place)}{event}")
    if not failed.differences:
        invocation.echo(f"          {printable(failed.message)}")
    width = max((len(one.key) for one in failed.differences), default=0)
    for one in failed.differences:
        invocation.echo(click.style(f"          - {one.key:<{width}}  {_json(one.expected)}", fg="green"))
        invocation.echo(click.style(f"          + {one.key:<{width}}  {_json(one.got)}", fg="red"))


def _json(value: Any) -> str:
    return printable(msgspec.json.encode(value).decode())
