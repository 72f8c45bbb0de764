"""`interlock token`: create, list, rotate and delete."""

from __future__ import annotations

import click

from interlock.api.schemas.inventory import MadeToken, NewToken, Token, TokenList, TokenRotation
from interlock.cli.client.paths import TOKENS, path_of
from interlock.cli.completion import completer
from interlock.cli.context import Invocation, with_json
from interlock.cli.options.quantities import Duration
from interlock.cli.output.formatting import age, clock
from interlock.core.durations import short_time
from interlock.core.roles import Role


@click.group("token")
def token_commands() -> None:
    """Access tokens. For admins, and for a project_admin in its own project."""


@token_commands.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True, help="Role of the token.")
@click.option("--project", metavar="NAME", help="Project of the token. Default: your own.")
@click.option(
    "--server-admin", is_flag=True, help="Confirm that an admin in another project is to administer the whole server."
)
@click.option("--host", metavar="NAME", help="Host of an agent; only with --role agent.")
@click.option("--group", "groups", metavar="NAME", multiple=True, help="Group of its holder, for policies; repeatable.")
@click.option(
    "--expires-in",
    "expires_in_ms",
    type=Duration(),
    metavar="TIME",
    help="When it expires, such as 90d. Default: the longest time that the server allows, or never.",
)
@with_json
def create_token(
    invocation: Invocation,
    *,
    name: str,
    role: str,
    project: str | None,
    server_admin: bool,
    host: str | None,
    groups: tuple[str, ...],
    expires_in_ms: int | None,
) -> None:
    """Create the token NAME. Its secret is printed only once, on standard output.

    A project that does not exist is created, without a quota.
    A reader may read, a member may also change what the project has, and a
    project_admin may also administer the project's tokens. An admin administers
    the whole server, whatever its project. A token with the role agent is for
    `interlock agent` on the host --host, and for nothing else.
    """
    new = NewToken(
        name=name,
        role=Role(role),
        project=project,
        server_admin=server_admin,
        host=host,
        groups=groups,
        expires_in=_span(expires_in_ms),
    )
    reply = invocation.client.post(TOKENS, new)
    if not invocation.print_json(reply):
        _print_secret(invocation, "Created", reply.decode(MadeToken))


def _span(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else short_time(milliseconds)


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
@click.option(
    "--overlap",
    "overlap_ms",
    type=Duration(),
    metavar="TIME",
    help="How long the former secret stays valid, such as 1h. Default: it ends at once.",
)
@click.option(
    "--expires-in",
    "expires_in_ms",
    type=Duration(),
    metavar="TIME",
    help="When the new secret expires. Default: after as long as the former one was valid for.",
)
@with_json
def rotate_token(invocation: Invocation, *, token: str, overlap_ms: int | None, expires_in_ms: int | None) -> None:
    """Give a token a new secret, printed only once, on standard output.

    Connections that were opened with the former secret close when it ends.
    """
    rotation = TokenRotation(overlap=_span(overlap_ms), expires_in=_span(expires_in_ms))
    reply = invocation.client.post(path_of(TOKENS, token, "rotate"), rotation)
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
