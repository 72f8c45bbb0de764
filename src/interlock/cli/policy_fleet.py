"""`interlock policy fleet`: what all VMs of the caller would answer now, and what another policy would change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from interlock.api.other_host_schemas import OtherHostList
from interlock.api.schemas import InstancePage
from interlock.cli.explaining_vms import instance_of, policy_of
from interlock.cli.invocation import Cell, Invocation, json_option, needs_invocation
from interlock.cli.naming import INSTANCES
from interlock.cli.other_hosts import HOSTS
from interlock.cli.server import told
from interlock.cli.wording import printable, spoken
from interlock.ports import HostState

if TYPE_CHECKING:
    from interlock.core.operations import Operation
    from interlock.core.policy import CompiledPolicy
    from interlock.core.records import Instance
    from interlock.policies.fleet_comparisons import FleetChange
    from interlock.policies.fleet_gate import FleetAnswers

_PAGE: Final = 500
_REASONS_SHOWN: Final = 3
_CHANGES_SHOWN: Final = 25
_DONE: Final = {"admitted": "accept", "redundant": "call redundant", "denied": "refuse"}
_COLOURS: Final = {"admitted": "green", "redundant": "yellow", "denied": "red"}


@click.command()
@click.option("--policy", "name", metavar="NAME|FILE", help="Say what this policy would change for them.")
@click.option(
    "--role",
    type=click.Choice(["reader", "member", "admin"]),
    default="member",
    show_default=True,
    help="Who would ask.",
)
@click.option("--hard", is_flag=True, help="Ask for the hard variant.")
@json_option
@needs_invocation
def fleet(invocation: Invocation, *, name: str | None, role: str, hard: bool) -> None:
    """Count how many of your VMs would accept which operation now.

    Nothing is asked of any VM. With --policy, it is judged by that policy
    too, and where the two answer differently is listed.
    """
    from interlock.core.policy import CompiledPolicy
    from interlock.policies.fleet_comparisons import compare
    from interlock.policies.fleet_gate import judge_fleet
    from interlock.policies.fleets import Fleet
    from interlock.policies.reading import load

    with told():
        candidate = None if name is None else load(name)
    present = policy_of(invocation.client.get("/v1/policy").decode(dict[str, Any]))
    instances = _all(invocation)
    newest_s = max((one.updated_at_ms / 1000 for one in instances), default=0.0)
    hosts = invocation.client.get(HOSTS).decode(OtherHostList).items
    fenced = {host.name for host in hosts if host.state is HostState.FENCED}
    columns = Fleet.of(instances, round((invocation.client.now or newest_s) * 1000), fenced)
    answers = judge_fleet(columns, present, role, hard=hard)
    changes: tuple[FleetChange, ...] = ()
    if candidate is not None:
        other = CompiledPolicy(candidate, _performed(present))
        changes = compare(answers, judge_fleet(columns, other, role, hard=hard))
    if invocation.json:
        invocation.emit(_document((present.policy.name, name, role), answers, instances, changes))
        return
    invocation.say(f"Policy {printable(present.policy.name)} on {_vms(len(instances))}, asked by the role {role}.")
    if not instances:
        return
    _show(invocation, answers)
    if name is not None:
        _show_changes(invocation, changes, instances, name)


def _performed(policy: CompiledPolicy) -> frozenset[Operation]:
    """What the server's driver performs, which no policy changes."""
    from interlock.core.operations import Operation

    missing = (rule.operations for rule in policy.rules if rule.id == "not-performed")
    return frozenset(Operation).difference(*missing)


def _all(invocation: Invocation) -> list[Instance]:
    found: list[Instance] = []
    cursor: str | None = None
    while True:
        page = invocation.client.get(INSTANCES, {"limit": _PAGE, "cursor": cursor}).decode(InstancePage)
        found += [instance_of(one) for one in page.items]
        cursor = page.next_cursor
        if cursor is None:
            return found


def _show(invocation: Invocation, answers: FleetAnswers) -> None:
    from interlock.policies.fleet_gate import Answered

    rows = []
    for operation, counts in answers.counts().items():
        reasons = [f"{reason} {count}" for (_, reason), count in answers.reasons(operation).items()]
        more = len(reasons) - _REASONS_SHOWN
        why = ", ".join(reasons[:_REASONS_SHOWN]) + (f", and {more} more" if more > 0 else "")
        admitted = str(counts[Answered.ADMITTED])
        rows.append(
            (
                spoken(operation.value),
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
    invocation.say("")
    if not changes:
        invocation.say(f"{printable(name)} would answer none of them otherwise.")
        return
    invocation.say(f"What {printable(name)} would change:")
    for change in changes[:_CHANGES_SHOWN]:
        before, after = change.before.name.lower(), change.after.name.lower()
        examples = ", ".join(printable(instances[row].name) for row in change.examples)
        why = "" if change.reason_after is None else f" ({change.reason_after})"
        more = ", …" if change.instances > len(change.examples) else ""
        line = (
            f"  {_vms(change.instances)} would {_DONE[after]} {spoken(change.operation.value)} by the rule "
            f"{printable(change.rule_after)}{why}, and {_DONE[before]} it now: {examples}{more}"
        )
        invocation.say(click.style(line, fg=_COLOURS[after]))
    if len(changes) > _CHANGES_SHOWN:
        rest = changes[_CHANGES_SHOWN:]
        invocation.say(f"  and {len(rest)} more differences; --json lists them all.")


def _vms(count: int) -> str:
    return "1 VM" if count == 1 else f"{count} VMs"


def _document(
    by: tuple[str, str | None, str], answers: FleetAnswers, instances: list[Instance], changes: tuple[FleetChange, ...]
) -> dict[str, Any]:
    policy, candidate, role = by
    document: dict[str, Any] = {
        "policy": policy,
        "role": role,
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


COMMANDS: Final[tuple[click.Command, ...]] = (fleet,)
