"""`interlock policy show` and `schema`, and `interlock rehearse`: the policy in force, and playing a script."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Final, assert_never

import click

from interlock.api.schemas.policy import Policy, PolicyRule
from interlock.cli.commands.policy.output import walk_text
from interlock.cli.context import Cell, Invocation, with_json
from interlock.cli.options.configuration import errors_as_failures
from interlock.cli.output.formatting import clock, duration, printable
from interlock.core.condition_kinds import Takes
from interlock.core.conditions import CONDITIONS, Condition

_BLOCK_BYTES: Final = 64 * 1024
_COLOURS: Final = {"admit": "green", "preempt": "cyan", "redundant": "yellow", "after": "yellow", "deny": "red"}
_NAMES_SHOWN: Final = 3
_WHEN_WIDTH: Final = 60


@click.group("policy")
def policy_commands() -> None:
    """The policy: the rules by which the gate decides."""


@policy_commands.command()
@with_json
def show(invocation: Invocation) -> None:
    """Show the rules of the server's policy, in the order of evaluation."""
    reply = invocation.client.get("/v1/policy")
    if invocation.print_json(reply):
        return
    policy = reply.decode(Policy)
    refused = policy.configured_refused
    if refused is not None:
        head = f"The configured policy {printable(refused.name)} is rejected; {printable(policy.name)} stays in force."
        invocation.echo(click.style(head, fg="red", bold=True))
        tried = clock(refused.at, invocation.client.now)
        invocation.echo(f"  {printable(refused.why)}")
        if refused.remedy:
            invocation.echo(f"  {printable(refused.remedy)}")
        invocation.echo(f"  Tried at {tried}; fix it and reload it (SIGHUP).")
    invocation.echo(
        f"Policy {policy.name}: {len(policy.rules)} rules; the first match decides; without a match: denied."
    )
    invocation.echo(f"At most {policy.outstanding_max} requests may be outstanding for one VM.")
    if policy.protected_tags:
        tags = ", ".join(map(printable, policy.protected_tags))
        invocation.echo(f"Only an admin may set or remove these tags: {tags}.")
    if limits := [
        f"{name.replace('_', ' ')} {duration(most)}" for name, most in policy.served_at_most_s.items() if most
    ]:
        invocation.echo(f"A request is served at most for: {', '.join(limits)}.")
    if policy.exploration is None:
        invocation.echo("Its states were not explored by this server; `interlock policy explore` does that.")
    else:
        invocation.echo(walk_text(policy.exploration))
    invocation.table(
        ("RULE", "VERDICT", "OPERATIONS", "WHEN", "WHY"),
        (
            (
                rule.id,
                Cell(rule.verdict, _COLOURS.get(rule.verdict)),
                _some(rule.operations),
                shorten(conditions(rule)),
                printable(rule.because or rule.reason or ""),
            )
            for rule in policy.rules
        ),
    )


def conditions(rule: PolicyRule) -> str:
    """Describe a rule's conditions."""
    parts = [
        f"{title} {_some(values)}" for title, values in (("state", rule.vm_state), ("task", rule.task_state)) if values
    ]
    for condition in CONDITIONS:
        value = getattr(rule, condition.wire)
        if value is not None:
            parts.append(_condition(condition, value))
    if rule.threshold_s is not None:
        parts.append(f"from {duration(rule.threshold_s)} on")
    return ", ".join(parts) or "always"


def _condition(condition: Condition, value: Any) -> str:
    title = condition.title
    match condition.kind.takes:
        case Takes.FLAG:
            *before, last = title.split()
            return title if value else " ".join((*before, "not", last))
        case Takes.TIME:
            return f"{title} {duration(value)}"
        case Takes.COUNT:
            return f"{title} {value}"
        case Takes.KINDS | Takes.WORDS | Takes.TEXTS:
            return f"{title} {_some(value) if value else 'nothing'}"
        case _:
            assert_never(condition.kind.takes)


def shorten(text: str) -> str:
    """Truncate a text for a table; `--json` has all of it."""
    return text if len(text) <= _WHEN_WIDTH else text[: _WHEN_WIDTH - 1] + "…"


def _some(names: Iterable[str]) -> str:
    every = list(names)
    if len(every) <= _NAMES_SHOWN:
        return " ".join(every)
    return f"{' '.join(every[: _NAMES_SHOWN - 1])} +{len(every) - _NAMES_SHOWN + 1}"


@click.command()
@click.option(
    "--policy",
    "name",
    required=True,
    metavar="NAME|FILE",
    help="Built-in policy (standard, take2, propolis, nova) or file.",
)
def rehearse(*, name: str) -> None:
    """Play a script against a policy, without a server.

    Reads one JSON event per line from standard input, and writes one JSON object per line for each. The events are
    described in docs/reference/policies.md.
    """
    from interlock.policies.language.loader import compile_named
    from interlock.policies.rehearsal.runner import rehearse as play

    with errors_as_failures():
        policy = compile_named(name)
    play_through(sys.stdin.fileno(), lambda lines: play(lines, policy), sys.stdout.buffer)


def play_through(source: int, play: Callable[[Iterable[bytes]], Iterator[bytes]], out: BinaryIO) -> None:
    """Write one result per line read from a file descriptor.

    Results are written in blocks while input is available, and flushed when it is not, so that an interactive user
    gets each result before the next line.
    """

    def lines() -> Iterator[bytes]:
        rest = b""
        while True:
            out.flush()
            block = os.read(source, _BLOCK_BYTES)
            if not block:
                break
            first, *others = block.split(b"\n")
            rest += first
            for other in others:
                yield rest
                rest = other
        if rest:
            yield rest

    # A result is written before the next line is read, so `lines` flushes every result of what was read.
    out.writelines(answer + b"\n" for answer in play(lines()))
    out.flush()


@policy_commands.command("schema")
@with_json
def schema_command(invocation: Invocation) -> None:
    """Print the JSON Schema of policy files, for editors.

    Editors such as VS Code with Even Better TOML complete and validate a policy whose first line is `#:schema
    ./policy.schema.json`. With --json, the schema is printed on one line.
    """
    from interlock.policies.language.json_schema import schema

    if invocation.json:
        invocation.emit(schema())
    else:
        click.echo(schema_page(), nl=False)


def schema_page() -> str:
    """Return docs/reference/policy.schema.json."""
    from interlock.policies.language.json_schema import schema

    return json.dumps(schema(), indent=2) + "\n"
