"""`interlock policy diff`: where the decisions of two policies differ, without a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import compiled, paragraph
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import duration, printable

if TYPE_CHECKING:
    from interlock.policies.comparison.differences import Difference, Differences, Side

_GROUPS_SHOWN: Final = 20
_PRODUCTS_SHOWN: Final = 3
_SIGNS: Final = {"looser": ("+", "green"), "tighter": ("-", "red"), "other": ("~", "yellow")}


@policy_commands.command()
@click.argument("before", metavar="NAME|FILE")
@click.argument("after", metavar="NAME|FILE")
@click.option("--all", "everything", is_flag=True, help="Show every group, and all of each.")
@with_json
def diff(invocation: Invocation, *, before: str, after: str, everything: bool) -> None:
    """Show where the decisions of two policies differ, without a server.

    Differences are grouped by the deciding rules, and shown as sets of operations, vm_states and task_states. Decisions
    are compared under every condition in the rules; texts are not compared.

    Exits with 0 if the policies are equivalent, and with 1 if they differ.
    """
    from interlock.policies.comparison.differences import differ

    found = differ(compiled(before), compiled(after))
    if invocation.json:
        invocation.emit(found)
    else:
        for line in _differences(found, everything=everything):
            invocation.echo(line)
    if found.any:
        raise Failure(ExitCode.ENDED_OTHERWISE, "", text="")


def _differences(found: Differences, *, everything: bool) -> Iterator[str]:
    names = f"{printable(found.before['name'])} → {printable(found.after['name'])}"
    if not found.any:
        yield f"{names}: they answer alike in all {found.combinations} combinations."
        return
    count = len(found.groups)
    yield click.style(
        f"{names}: {found.differing} of {found.combinations} combinations differ, "
        f"for {count} pair{'s' * (count != 1)} of rules and circumstances.",
        bold=True,
    )
    if found.outstanding_max is not None:
        yield f"outstanding_max: {found.outstanding_max[0]} → {found.outstanding_max[1]}"
    if found.protected_tags is not None:
        before, after = (", ".join(map(printable, tags)) or "none" for tags in found.protected_tags)
        yield f"protected_tags: {before} → {after}"
    if found.served_at_most is not None:
        limits = (
            ", ".join(f"{name} {duration(ms / 1000)}" for name, ms in one.items()) for one in found.served_at_most
        )
        yield "served_at_most: {} → {}".format(*(one or "none" for one in limits))
    shown = found.groups if everything else [one for one in found.groups if not one.follows][:_GROUPS_SHOWN]
    for group in shown:
        yield ""
        yield from _group(group, found.operations, everything=everything)
    if not found.complete:
        yield ""
        yield "The policies are very intricate: not all circumstances were tried, and there may be more differences."
    left = count - len(shown)
    if left:
        follow = sum(one.follows for one in found.groups)
        yield ""
        yield f"{left} more with --all; {follow} of them show one of these rules under further conditions."


def _group(group: Difference, operations: Sequence[str], *, everything: bool) -> Iterator[str]:
    from interlock.policies.comparison.differences import product_text

    sign, colour = _SIGNS[group.effect.value]
    change = f"{_answer(group.before)} → {_answer(group.after)}{''.join(f', {each}' for each in group.details)}"
    yield f"{click.style(f'{sign} {change}', fg=colour)}"
    when = f" when {group.condition}" if group.condition else ""
    rules = group.before.rule if group.before.rule == group.after.rule else f"{group.before.rule} → {group.after.rule}"
    count = f"{group.combinations} combination{'s' * (group.combinations != 1)}"
    yield f"    {printable(rules)}, in {count}{printable(when)}"
    shown = group.products if everything else group.products[:_PRODUCTS_SHOWN]
    for product in shown:
        yield from paragraph("", product_text(product, operations), indent=6)
    if len(shown) < len(group.products):
        covered = sum(product.size for product in shown)
        yield f"      and {group.combinations - covered} more combinations"


def _answer(side: Side) -> str:
    time = f" {duration(side.threshold_s)}" if side.threshold_s is not None else ""
    return f"{side.verdict.value}{time}" + (f" ({printable(side.reason)})" if side.reason else "")
