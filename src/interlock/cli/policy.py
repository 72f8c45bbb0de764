"""`interlock policy` and `interlock rehearse`: what the server decides by, and trying a policy without a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Final

import click

from interlock.api.schemas import Policy, PolicyRule
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Cell, Invocation, json_option, needs_invocation
from interlock.cli.wording import clock, duration, printable
from interlock.core.errors import PolicyError

_BLOCK_BYTES: Final = 64 * 1024
_COLOURS: Final = {"admit": "green", "preempt": "cyan", "redundant": "yellow", "after": "yellow", "deny": "red"}
_NAMES_SHOWN: Final = 3
_WHEN_WIDTH: Final = 60


@click.group("policy")
def policy_commands() -> None:
    """The policy: the rules by which the server answers."""


@policy_commands.command()
@json_option
@needs_invocation
def show(invocation: Invocation) -> None:
    """Show the rules of the server's policy, in the order in which they are asked."""
    reply = invocation.client.get("/v1/policy")
    if invocation.answer(reply):
        return
    policy = reply.decode(Policy)
    refused = policy.configured_refused
    if refused is not None:
        head = f"The configured policy {printable(refused.name)} is refused; {printable(policy.name)} stays in force."
        invocation.say(click.style(head, fg="red", bold=True))
        tried = clock(refused.at, invocation.client.now)
        invocation.say(f"  {printable(refused.why)}")
        if refused.remedy:
            invocation.say(f"  {printable(refused.remedy)}")
        invocation.say(f"  Tried at {tried}; mend it, and have it read again (SIGHUP).")
    invocation.say(f"Policy {policy.name}: {len(policy.rules)} rules; the first that matches decides, none denies.")
    invocation.say(f"At most {policy.outstanding_max} requests may be outstanding for one VM.")
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
    """When a rule holds, in words."""
    parts = [
        f"{title} {_some(values) if values else 'nothing'}"
        for title, values in (
            ("state", rule.vm_state),
            ("task", rule.task_state),
            ("outstanding", rule.outstanding),
            ("held", rule.held),
            ("role", rule.roles),
            ("tag", rule.tags),
        )
        if values is not None
    ]
    for title in ("locked", "blocked", "hard", "launched"):
        flag = getattr(rule, title)
        if flag is not None:
            parts.append(title if flag else f"not {title}")
    if rule.host_reachable is not None:
        parts.append("host reachable" if rule.host_reachable else "host not reachable")
    if rule.silent_s_min is not None:
        parts.append(f"silent for {duration(rule.silent_s_min)}")
    if rule.threshold_s is not None:
        parts.append(f"from {duration(rule.threshold_s)} on")
    return ", ".join(parts) or "always"


def shorten(text: str) -> str:
    """The text, cut where a table would become too wide to read; `--json` has all of it."""
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
    help="A built-in policy (standard, take2, propolis, nova) or a file.",
)
def rehearse(*, name: str) -> None:
    """Play a script against a policy, without a server.

    Reads one JSON event a line from standard input and answers each with one JSON object a line. The events are
    described in docs/reference/policies.md.
    """
    from interlock.policies.reading import compile_named
    from interlock.policies.rehearsing import rehearse as play

    try:
        policy = compile_named(name)
    except PolicyError as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None
    play_through(sys.stdin.fileno(), lambda lines: play(lines, policy), sys.stdout.buffer)


def play_through(source: int, play: Callable[[Iterable[bytes]], Iterator[bytes]], out: BinaryIO) -> None:
    """Write an answer for every line that can be read from a file descriptor.

    Answers go out together as long as there is more to read, and at once when there is not: a long history is played
    in blocks, and somebody who waits for an answer before the next line gets it.
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

    # An answer is written before the next line is asked for, so whatever is read is answered when `lines` flushes.
    out.writelines(answer + b"\n" for answer in play(lines()))
    out.flush()
