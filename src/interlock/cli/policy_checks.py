"""`interlock policy check` and `test`: what CI asks of a policy, without a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.policy_explanations import explain
from interlock.cli.wording import printable
from interlock.core.errors import Invalid, PolicyError

if TYPE_CHECKING:
    from interlock.policies.findings import Finding
    from interlock.policies.scenarios import Failed, ScenarioResults

_COLOURS: Final = {"error": "red", "warning": "yellow", "note": "cyan"}


@click.command()
@click.argument("policies", metavar="NAME|FILE...", nargs=-1, required=True)
@click.option("--strict", is_flag=True, help="Let warnings count as errors.")
@click.option("--verbose", is_flag=True, help="Show every note: also what is overruled, and parts that never decide.")
@json_option
@needs_invocation
def check(invocation: Invocation, *, policies: tuple[str, ...], strict: bool, verbose: bool) -> None:
    """Look for what is wrong with policies, without a server.

    Finds rules that never decide, contradictions of fixed rules, states without an exit or in which nothing can be
    deleted, thresholds that never pass, and operations admitted where no driver performs them. What only shows when
    several requests meet, `interlock policy explore` finds.

    Ends with 1 if there is an error (with --strict, also if there is a warning), and with 2 if no such policy exists.
    """
    from interlock.policies.checking import check_file

    results = []
    for name in policies:
        _must_exist(name)
        results.append((name, check_file(name)))
    severities = [one.severity.value for _, findings in results for one in findings]
    failed = "error" in severities or (strict and "warning" in severities)
    if invocation.json:
        invocation.emit(
            {
                "policies": [{"policy": name, "findings": findings} for name, findings in results],
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
    """A name that stands for nothing is a slip on the command line; whatever is wrong inside a file is a finding."""
    from interlock.policies.reading import builtin_names
    from interlock.policies.vocabulary import nearest

    if name in builtin_names() or os.path.lexists(name):
        return
    if "/" in name or name.endswith(".toml"):
        raise Failure(ExitCode.USAGE, f"There is no file {name!r}.", remedy="Name a policy file or a built-in policy.")
    raise Failure(
        ExitCode.USAGE,
        f"There is no policy {name!r}.",
        remedy=f"{nearest(name, builtin_names())} A file is named by its path, ending in .toml.",
    )


def _print_findings(invocation: Invocation, name: str, findings: Sequence[Finding], *, verbose: bool) -> None:
    shown = [one for one in findings if verbose or not one.detail]
    for one in shown:
        severity = click.style(f"{one.severity.value}:", fg=_COLOURS[one.severity.value], bold=True)
        invocation.say(f"{printable(one.place)}: {severity} {printable(one.message)} [{one.code}]")
        if one.remedy:
            invocation.say(f"    {printable(one.remedy)}")
    counts = {severity: sum(one.severity.value == severity for one in findings) for severity in _COLOURS}
    told = [f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts.items() if count]
    hidden = len(findings) - len(shown)
    more = f" ({hidden} of them with --verbose)" if hidden else ""
    invocation.say(f"{printable(name)}: {', '.join(told) + more if told else 'nothing is wrong'}.")


@click.command("test")
@click.argument("policies", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--scenarios",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Scenarios to play instead of those beside the policy; may be given again.",
)
@click.option("--coverage", is_flag=True, help="List the policy's own rules that no scenario touched.")
@json_option
@needs_invocation
def test_policies(
    invocation: Invocation, *, policies: tuple[str, ...], scenarios: tuple[Path, ...], coverage: bool
) -> None:
    """Play the scenarios that sit beside a policy, like unit tests.

    For my-cloud.toml they are my-cloud.tests.jsonl and my-cloud.tests/*.jsonl: the events of `interlock rehearse`, one
    a line, each with the keys of its answer that matter as "expect": {...}. {"test": "name"} begins another with a
    fresh instance. Lines that begin with # or // are passed over.

    Ends with 1 if a scenario fails, and with 2 if there is none.
    """
    results = [_tested(name, scenarios) for name in policies]
    if invocation.json:
        invocation.emit({"policies": results, "passed": not any(one.failures for one in results)})
    else:
        for one in results:
            _print_results(invocation, one, coverage=coverage)
    if any(one.failures for one in results):
        raise Failure(ExitCode.ENDED_OTHERWISE, "", text="")


def _tested(name: str, named: tuple[Path, ...]) -> ScenarioResults:
    from interlock.policies.reading import read
    from interlock.policies.scenarios import files_beside, read_all, run

    try:
        policy = read(name)
        files = named or files_beside(Path(name))
        scenarios = read_all(files)
    except (PolicyError, Invalid) as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None
    if not scenarios:
        beside = Path(name).with_suffix("")
        raise Failure(
            ExitCode.USAGE,
            f"There are no scenarios for {name}." if not files else f"There is no scenario in {files[0]}.",
            remedy=f"Write {beside}.tests.jsonl, or name a file with --scenarios.",
        )
    return run(policy, scenarios)


def _print_results(invocation: Invocation, results: ScenarioResults, *, coverage: bool) -> None:
    invocation.say(click.style(printable(results.policy), bold=True))
    for one in results.scenarios:
        if one.failed is None:
            invocation.say(f"  {click.style('ok', fg='green')}      {printable(one.name)}")
        else:
            invocation.say(f"  {click.style('FAILED', fg='red', bold=True)}  {printable(one.name)}")
            _print_failed(invocation, one.failed)
    if coverage:
        for rule in results.untouched:
            invocation.say(f"  {printable(rule.place)}: no scenario touches {printable(rule.rule)!r}")
    count = len(results.scenarios)
    touched = results.rules - len(results.untouched)
    inherited = (
        f", and {results.inherited_touched} of {results.inherited} that it inherits" if results.inherited else ""
    )
    invocation.say(
        f"{count} scenario{'s' * (count != 1)}, {results.failures} failed; "
        f"{touched} of {results.rules} own rules touched{inherited}."
    )


def _print_failed(invocation: Invocation, failed: Failed) -> None:
    event = f": {printable(failed.event)}" if failed.event else ""
    invocation.say(f"          {printable(failed.place)}{event}")
    if not failed.differences:
        invocation.say(f"          {printable(failed.message)}")
    width = max((len(one.key) for one in failed.differences), default=0)
    for one in failed.differences:
        invocation.say(click.style(f"          - {one.key:<{width}}  {_json(one.expected)}", fg="green"))
        invocation.say(click.style(f"          + {one.key:<{width}}  {_json(one.got)}", fg="red"))


def _json(value: Any) -> str:
    return printable(msgspec.json.encode(value).decode())


COMMANDS: tuple[click.Command, ...] = (check, test_policies, explain)
