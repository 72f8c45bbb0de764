"""`interlock policy fleet`: decisions about all of the caller's VMs now, and what another policy would change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from interlock.api.schemas.hosts import HostList
from interlock.api.schemas.responses import InstancePage
from interlock.cli.client.paths import HOSTS, INSTANCES
from interlock.cli.client.records import instance_of, policy_of
from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import caller_of, caller_options
from interlock.cli.context import Cell, Invocation, with_json
from interlock.cli.options.configuration import errors_as_failures
from interlock.cli.output.formatting import humanize, printable
from interlock.core.conditions import CALLER
from interlock.ports import HostState

if TYPE_CHECKING:
    from interlock.core.operations import Operation
    from interlock.core.policy import CompiledPolicy
    from interlock.core.records import Instance
    from interlock.policies.fleet.gate import FleetAnswers, FleetChange

_REASONS_SHOWN: Final = 3
_CHANGES_SHOWN: Final = 25
_DONE: Final = {"admitted": "accept", "redundant": "call redundant", "denied": "refuse"}
_COLOURS: Final = {"admitted": "green", "redundant": "yellow", "denied": "red"}


@policy_commands.command()
@click.option("--policy", "name", metavar="NAME|FILE", help="Show what this policy would change.")
@caller_options()
@click.option("--hard", is_flag=True, help="The hard variant of the operations.")
@with_json
def fleet(invocation: Invocation, /, *, name: str | None, hard: bool, **asked: Any) -> None:
    """Count how many of your VMs would accept each operation now.

    Nothing is submitted. With --policy, list where that policy would decide
    differently.
    """
    from interlock.core.policy import CompiledPolicy
    from interlock.policies.fleet.gate import compare, judge_fleet
    from interlock.policies.language.loader import load
    from interlock.policies.time_windows import resolved

    caller = caller_of(asked)
    with errors_as_failures():
        candidate = None if name is None else load(name)
    server_policy = policy_of(invocation.client.get("/v1/policy").decode(dict[str, Any]))
    pages = invocation.client.pages(INSTANCES)
    instances = [instance_of(one) for page in pages for one in page.decode(InstancePage).items]
    newest_s = max((one.updated_at_ms / 1000 for one in instances), default=0.0)
    hosts = invocation.client.get(HOSTS).decode(HostList).items
    fenced = {host.name for host in hosts if host.state is HostState.FENCED}
    now_ms = round((invocation.client.now or newest_s) * 1000)
    present = resolved(server_policy, now_ms, 0)
    answers = judge_fleet(instances, present, now_ms, hard=hard, caller=caller, unreachable_hosts=fenced)
    changes: tuple[FleetChange, ...] = ()
    if candidate is not None:
        other = resolved(CompiledPolicy(candidate, _performed(present)), now_ms, 0)
        then = judge_fleet(instances, other, now_ms, hard=hard, caller=caller, unreachable_hosts=fenced)
        changes = compare(answers, then)
    if invocation.json:
        invocation.emit(_document((present.policy.name, name, caller), answers, instances, changes))
        return
    invocation.echo(f"Policy {printable(present.policy.name)} on {_vms(len(instances))}, {_described(caller)}.")
    if not instances:
        return
    _show(invocation, answers)
    if name is not None:
        _show_changes(invocation, changes, instances, name)


def _described(caller: dict[str, Any]) -> str:
    return ", ".join(
        f"{condition.title} {condition.kind.found(caller[condition.reads])}"
        for condition in CALLER
        if condition.reads in caller
    )


def _performed(policy: CompiledPolicy) -> frozenset[Operation]:
    """Return the operations that the server's driver supports."""
    from interlock.core.operations import Operation

    missing = (rule.operations for rule in policy.rules if rule.id == "not-performed")
    return frozenset(Operation).difference(*missing)


def _show(invocation: Invocation, answers: FleetAnswers) -> None:
    from interlock.policies.fleet.gate import Answered

    rows = []
    for operation, counts in answers.counts().items():
        reasons = [f"{reason} {count}" for (_, reason), count in answers.reasons(operation).items()]
        more = len(reasons) - _REASONS_SHOWN
        why = ", ".join(reasons[:_REASONS_SHOWN]) + (f", and {more} more" if more > 0 else "")
        admitted = str(counts[Answered.ADMITTED])
        rows.append(
            (
                humanize(operation.value),
                Cell(admitted, _COLOURS["admitted"] if counts[Answered.ADMITTED] else None),
                str(counts[Answered.REDUNDANT]),
                str(counts[Answered.DENIED]),
                why or "-",
            )
        )
    invocation.table(("OPERATION", "ACCEPT", "REDUNDANT", "REFUSE", "WHY NOT"), rows)


def _show_changes(
    invocation: Invocation, changes: tuple[FleetChange, ...], instances: list[Instance], name: str
) -> None:
    invocation.echo("")
    if not changes:
        invocation.echo(f"{printable(name)} would change nothing.")
        return
    invocation.echo(f"What {printable(name)} would change:")
    for change in changes[:_CHANGES_SHOWN]:
        before, after = change.before.name.lower(), change.after.name.lower()
        examples = ", ".join(printable(instances[row].name) for row in change.examples)
        why = "" if change.reason_after is None else f" ({change.reason_after})"
        more = ", …" if change.instances > len(change.examples) else ""
        line = (
            f"  {_vms(change.instances)} would {_DONE[after]} {humanize(change.operation.value)} by the rule "
            f"{printable(change.rule_after)}{why}, and {_DONE[before]} it now: {examples}{more}"
        )
        invocation.echo(click.style(line, fg=_COLOURS[after]))
    if len(changes) > _CHANGES_SHOWN:
        rest = changes[_CHANGES_SHOWN:]
        invocation.echo(f"  and {len(rest)} more differences; --json lists them all.")


def _vms(count: int) -> str:
    return "1 VM" if count == 1 else f"{count} VMs"


def _document(
    by: tuple[str, str | None, dict[str, Any]],
    answers: FleetAnswers,
    instances: list[Instance],
    changes: tuple[FleetChange, ...],
) -> dict[str, Any]:
    policy, candidate, caller = by
    document: dict[str, Any] = {
        "policy": policy,
        **caller,
        "vms": len(instances),
        "operations": [
            {
                "operation": operation,
                **{answered.name.lower(): count for answered, count in counts.items()},
                "reasons": [
                    {"disposition": answered.name.lower(), "reason": reason, "vms": count}
                    for (answered, reason), count in answers.reasons(operation).items()
                ],
            }
            for operation, counts in answers.counts().items()
        ],
    }
    if candidate is not None:
        document["candidate"] = candidate
        document["changes"] = [
            {
                "operation": change.operation,
                "vms": change.instances,
                "now": {"disposition": change.before.name.lower(), "rule": change.rule_before}
                | {"reason": change.reason_before},
                "then": {"disposition": change.after.name.lower(), "rule": change.rule_after}
                | {"reason": change.reason_after},
                "examples": [instances[row].name for row in change.examples],
            }
            for change in changes
        ]
    return document
