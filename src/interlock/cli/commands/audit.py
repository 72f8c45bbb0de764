"""`interlock audit`: who did what to the server."""

from __future__ import annotations

from typing import Any, Final

import click
import msgspec

from interlock.api.schemas.audit import AuditEntries, AuditEntry
from interlock.cli.context import Invocation, with_json
from interlock.cli.output.formatting import clock, printable
from interlock.ports.audit import Outcome

_PATH: Final = "/v1/audit"
_WAIT: Final = "60s"


@click.command("audit")
@click.option("--action", help="Only this action, such as token.create, or those that it begins, such as token.")
@click.option("--who", help="Only what this caller did: the name of a token.")
@click.option("--outcome", type=click.Choice([one.value for one in Outcome]), help="Only this outcome.")
@click.option("--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="How many entries.")
@click.option("--after", type=click.IntRange(0), help="Entries after this sequence, oldest first.")
@click.option("--follow", "-f", "following", is_flag=True, help="Print new entries as they come.")
@with_json
def audit(
    invocation: Invocation,
    *,
    action: str | None,
    who: str | None,
    outcome: str | None,
    limit: int,
    after: int | None,
    following: bool,
) -> None:
    """Show the audit log: who did what to the server, from where. For admins.

    Tokens, policies, hosts, resets, consoles and failed logins. With --follow
    and --json, one JSON object per line, for a log collector; --after N
    resumes after the entry with the sequence N.
    """
    filters = {"action": action, "who": who, "outcome": outcome}
    query: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
    place = {} if after is None else {"after": after}
    reply = invocation.client.get(_PATH, query | place | {"limit": limit})
    page = reply.decode(AuditEntries)
    if not following and invocation.print_json(reply):
        return
    items = page.items if after is not None else tuple(reversed(page.items))
    if not items and not following:
        invocation.echo("No entries.", error=True)
    for entry in items:
        _print(invocation, entry)
    seen = page.next_after
    while following:
        found = invocation.client.get(_PATH, query | {"after": seen, "wait": _WAIT}).decode(AuditEntries)
        for entry in found.items:
            _print(invocation, entry)
        seen = max(seen, found.next_after)


def _print(invocation: Invocation, entry: AuditEntry) -> None:
    if invocation.json:
        click.echo(msgspec.json.encode(entry))
        return
    who = f"{entry.who or 'unknown'}{f' at {entry.address}' if entry.address else ''}"
    details = " ".join(f"{name}={value}" for name, value in entry.details.items())
    parts = (
        f"{entry.sequence:>6}",
        clock(entry.at, invocation.client.now),
        entry.outcome.value,
        entry.action,
        entry.target,
        f"by {who}",
        details,
    )
    line = printable("  ".join(part for part in parts if part))
    invocation.echo(line if entry.outcome is Outcome.SUCCEEDED else click.style(line, fg="red"))
