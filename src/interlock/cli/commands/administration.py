"""`interlock project`, `token` and `audit`: projects with their quotas, access tokens, and who administered what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
import msgspec

from interlock.api.schemas.inventory import MadeToken, NewToken, Token, TokenList, TokenRotation
from interlock.api.schemas.projects import AuditEntries, AuditEntry, NewProject, Project, ProjectList, QuotaChange
from interlock.cli.client.paths import PROJECTS, TOKENS, path_of
from interlock.cli.completion import completer
from interlock.cli.context import Invocation, with_json
from interlock.cli.options.quantities import Duration, Size
from interlock.cli.output.confirmation import confirm, yes_option
from interlock.cli.output.formatting import age, clock, printable
from interlock.core.durations import short_time
from interlock.core.quotas import RESOURCES
from interlock.core.roles import Role
from interlock.ports.audit import Outcome

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_TITLES: Final = {what: resource.title for what, resource in RESOURCES.items()}
_NONE: Final = "none"


class _Limit(click.ParamType[int | str]):
    """A limit: a number as another type reads it, or `none`."""

    name = "limit"

    def __init__(self, number: click.ParamType[int]) -> None:
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return _NONE if value == _NONE else self._number.convert(value, param, ctx)


def _limit_options(command: CommandT) -> CommandT:
    """Add an option for each limit."""
    count = click.IntRange(min=0)
    sizes = {"memory_mib": ("--memory", Size("MiB", 0)), "disk_mib": ("--disk", Size("MiB", 0, bare="GiB"))}
    examples = {"memory_mib": ", such as 65536 (MiB) or 64GiB", "disk_mib": ", such as 500 (GiB)"}
    for field, title in reversed(_TITLES.items()):
        option, number = sizes.get(field, (f"--{field.replace('_', '-')}", count))
        what = f"Limit of {title.partition(' (')[0]}{examples.get(field, '')}; `none`: no limit."
        command = click.option(option, field, type=_Limit(number), metavar="LIMIT", help=what)(command)
    return command


def _change(limits: dict[str, int | str | None]) -> QuotaChange:
    named = {field: None if limit == _NONE else limit for field, limit in limits.items() if limit is not None}
    return QuotaChange(**named)  # type: ignore[arg-type]


@click.group("project")
def project_commands() -> None:
    """Projects, and what they may use."""


@project_commands.command("create")
@click.argument("name")
@click.option(
    "--with-history",
    is_flag=True,
    help="Confirm that its members may see records of VMs of an earlier project of that name.",
)
@_limit_options
@with_json
def create_project(invocation: Invocation, /, *, name: str, with_history: bool, **limits: int | str | None) -> None:
    """Create the project NAME, by default without limits. For admins."""
    new = NewProject(name=name, quota=_change(limits), with_history=with_history)
    reply = invocation.client.post(PROJECTS, new)
    if not invocation.print_json(reply):
        invocation.echo(f"Created: project {name}")


@project_commands.command("list")
@with_json
def list_projects(invocation: Invocation) -> None:
    """List the projects with what they use of their quotas. Those who are not admins see their own."""
    columns = {"NAME": lambda one: one.name} | {
        title.upper(): lambda one, field=field: _used(one, field) for field, title in _TITLES.items()
    }
    columns["AGE"] = lambda one: "-" if one.created_at is None else age(one.created_at, invocation.client.now)
    invocation.print_items(invocation.client.get(PROJECTS), ProjectList, columns)


def _used(project: Project, field: str) -> str:
    limit = getattr(project.quota, field)
    used = str(getattr(project.used, field))
    return used if limit is None else f"{used}/{limit}"


@project_commands.command("show")
@click.argument("project", shell_complete=completer(PROJECTS))
@with_json
def show_project(invocation: Invocation, *, project: str) -> None:
    """Show a project, its quota, what it uses and what is left."""
    _show(invocation, project)


def _show(invocation: Invocation, project: str) -> None:
    reply = invocation.client.get(path_of(PROJECTS, project))
    if not invocation.print_json(reply):
        _print(invocation, reply.decode(Project))


def _print(invocation: Invocation, project: Project) -> None:
    by = f" by {project.created_by}" if project.created_by else ""
    when = "" if project.created_at is None else f", created {age(project.created_at, invocation.client.now)} ago{by}"
    invocation.echo(f"{project.name}{when}")
    rows = []
    for field, title in _TITLES.items():
        used, limit = getattr(project.used, field), getattr(project.quota, field)
        left = "unlimited" if limit is None else str(max(0, limit - used))
        rows.append((title, str(used), "none" if limit is None else str(limit), left))
    invocation.table(("", "USED", "LIMIT", "LEFT"), rows)


@project_commands.command("quota")
@click.argument("project", shell_complete=completer(PROJECTS))
@_limit_options
@with_json
def project_quota(invocation: Invocation, /, *, project: str, **limits: int | str | None) -> None:
    """Change limits of a project, or show them. For admins; whoever is in the project may see them.

    What the project uses already stays, also beyond a limit; only more is
    refused.
    """
    if all(limit is None for limit in limits.values()):
        _show(invocation, project)
        return
    reply = invocation.client.patch(path_of(PROJECTS, project, "quota"), _change(limits))
    if not invocation.print_json(reply):
        _print(invocation, reply.decode(Project))


@project_commands.command("delete")
@click.argument("project", shell_complete=completer(PROJECTS))
@yes_option
@with_json
def delete_project(invocation: Invocation, *, project: str, yes: bool) -> None:
    """Delete a project with nothing in it, after confirmation. For admins.

    Its VMs, volumes, images and tokens must be deleted first. Records of
    deleted VMs are kept.
    """
    confirm(f"Delete the project {project}?", yes=yes)
    invocation.print_removed(invocation.client.delete(path_of(PROJECTS, project)), f"Deleted: {project}")


@click.group("token")
def token_commands() -> None:
    """Access tokens. For admins, and for a project_admin in its own project."""


def _time_option(name: str, help_text: str) -> Callable[[CommandT], CommandT]:
    """Return an option with a time, such as `90d`, which is passed on in the server's spelling."""

    def spelled(_context: click.Context, _parameter: click.Parameter, milliseconds: int | None) -> str | None:
        return None if milliseconds is None else short_time(milliseconds)

    return click.option(name, type=Duration(), callback=spelled, metavar="TIME", help=help_text)


@token_commands.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True, help="Role of the token.")
@click.option("--project", metavar="NAME", help="Project of the token. Default: your own.")
@click.option(
    "--server-admin", is_flag=True, help="Confirm that an admin in another project is to administer the whole server."
)
@click.option("--host", metavar="NAME", help="Host of an agent; only with --role agent.")
@click.option("--group", "groups", metavar="NAME", multiple=True, help="Group of its holder, for policies; repeatable.")
@_time_option(
    "--expires-in", "When it expires, such as 90d. Default: the longest time that the server allows, or never."
)
@with_json
def create_token(invocation: Invocation, /, **fields: Any) -> None:
    """Create the token NAME. Its secret is printed only once, on standard output.

    A project that does not exist is created, without a quota.
    A reader may read, a member may also change what the project has, and a
    project_admin may also administer the project's tokens. An admin administers
    the whole server, whatever its project. A token with the role agent is for
    `interlock agent` on the host --host, and for nothing else.
    """
    reply = invocation.client.post(TOKENS, NewToken(**fields))
    if not invocation.print_json(reply):
        _print_secret(invocation, "Created", reply.decode(MadeToken))


def _print_secret(invocation: Invocation, done: str, made: MadeToken) -> None:
    token = made.token
    expiry = "" if token.expires_at is None else f" It expires at {_moment(invocation, token.expires_at)}."
    invocation.echo(f"{done}: token {token.name} ({_role_text(token)}).{expiry}", error=True)
    if token.former_until_at is not None:
        until = _moment(invocation, token.former_until_at)
        invocation.echo(f"The former secret is valid until {until}.", error=True)
    if made.project_created:
        invocation.echo(f"The project {token.project} is new; it has no quota.", error=True)
    invocation.echo("Its secret is shown only once:", error=True)
    invocation.echo(made.secret)


def _moment(invocation: Invocation, moment: str) -> str:
    return clock(moment, invocation.client.now)


def _role_text(token: Token) -> str:
    if token.role is Role.ADMIN:
        return f"admin of the whole server, in the project {token.project}"
    return f"{token.role.value} of {token.host or token.project}"


@token_commands.command("list")
@with_json
def list_tokens(invocation: Invocation) -> None:
    """List the tokens, without their secrets."""
    columns = {
        "NAME": lambda one: one.name,
        "ROLE": lambda one: one.role.value,
        "PROJECT": lambda one: one.project,
        "GROUPS": lambda one: ", ".join(one.groups) or "-",
        "HOST": lambda one: one.host or "-",
        "AGE": lambda one: age(one.created_at, invocation.client.now),
        "EXPIRES": lambda one: _expiry(invocation, one),
        "LAST USED": lambda one: _last_use(invocation, one),
        "ID": lambda one: one.id,
    }
    invocation.print_items(invocation.client.get(TOKENS), TokenList, columns)


def _expiry(invocation: Invocation, token: Token) -> str:
    text = "never" if token.expires_at is None else _moment(invocation, token.expires_at)
    text = "expired" if token.expired else text
    if token.former_until_at is None:
        return text
    return f"{text}, the former secret {_moment(invocation, token.former_until_at)}"


def _last_use(invocation: Invocation, token: Token) -> str:
    return "never" if token.last_used_at is None else f"{age(token.last_used_at, invocation.client.now)} ago"


@token_commands.command("rotate")
@click.argument("token", shell_complete=completer(TOKENS))
@_time_option("--overlap", "How long the former secret stays valid, such as 1h. Default: it ends at once.")
@_time_option("--expires-in", "When the new secret expires. Default: after as long as the former one was valid for.")
@with_json
def rotate_token(invocation: Invocation, /, *, token: str, **fields: str | None) -> None:
    """Give a token a new secret, printed only once, on standard output.

    Connections that were opened with the former secret close when it ends.
    """
    reply = invocation.client.post(path_of(TOKENS, token, "rotate"), TokenRotation(**fields))
    if not invocation.print_json(reply):
        _print_secret(invocation, "Rotated", reply.decode(MadeToken))


@token_commands.command("delete")
@click.argument("token", shell_complete=completer(TOKENS))
@with_json
def delete_token(invocation: Invocation, *, token: str) -> None:
    """Delete a token and close its connections at once.

    This includes event streams, consoles, displays, and the connection of an
    agent, whose VMs end with the host's lease unless it reconnects with another
    token.
    """
    reply = invocation.client.delete(path_of(TOKENS, token))
    invocation.print_removed(reply, f"Deleted: {token}")


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
        _print_entry(invocation, entry)
    seen = page.next_after
    while following:
        found = invocation.client.get(_PATH, query | {"after": seen, "wait": _WAIT}).decode(AuditEntries)
        for entry in found.items:
            _print_entry(invocation, entry)
        seen = max(seen, found.next_after)


def _print_entry(invocation: Invocation, entry: AuditEntry) -> None:
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
