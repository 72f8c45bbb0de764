"""`interlock host`: the hosts beside the server's own."""

from __future__ import annotations

from typing import Final

import click

from interlock.api.host_schemas import HostStands
from interlock.api.other_host_schemas import Fencing, OtherHost, OtherHostList
from interlock.cli.client import Client
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.naming import completer, path_of, suggesting
from interlock.cli.wording import age
from interlock.ports import HostState

HOSTS = "/v1/hosts"
_WORDS: Final = {"memory_mib": "Memory (MiB)", "vcpus": "Virtual processors", "disk_mib": "Disk (MiB)"}


@click.command("list")
@json_option
@needs_invocation
def list_hosts(invocation: Invocation) -> None:
    """List the hosts, apart from the server's own."""
    reply = invocation.client.get(HOSTS)
    if invocation.answer(reply):
        return
    found, now = reply.decode(OtherHostList), invocation.client.now
    invocation.table(
        ("NAME", "STATE", "AGENT", "SEEN", "VMS", "ADDRESS"),
        (
            (
                one.name,
                one.state.value,
                "connected" if one.linked else "away",
                age(one.last_seen_at, now),
                str(one.instances),
                one.address or "-",
            )
            for one in found.items
        ),
    )
    invocation.say(f"The server runs on {found.own}.", error=True)


def host_text(client: Client, name: str) -> str:
    """A host by its name, with what is wrong with it. With the server's own, which is not listed, nothing is."""
    try:
        host = client.get(path_of(HOSTS, name)).decode(OtherHost)
    except Failure:
        return name
    match host.state:
        case HostState.FENCED:
            return f"{name} (fenced: its guests have ended; `vm evacuate` takes a VM up elsewhere)"
        case HostState.LOST:
            return f"{name} (lost: nothing tells whether its guests run)"
        case HostState.UP:
            return name if host.linked else f"{name} (its agent is away: what is asked waits until it is back)"


def show_other(invocation: Invocation, name: str) -> None:
    """Print what is known of one of them. Raises `Failure`."""
    with suggesting(invocation.client, HOSTS, name):
        reply = invocation.client.get(path_of(HOSTS, name))
    if not invocation.answer(reply):
        _say(invocation, reply.decode(OtherHost))


def _say(invocation: Invocation, host: OtherHost) -> None:
    fenced = f", fenced by {host.fenced_by}" if host.fenced_by else ""
    rows = {
        "state": f"{host.state.value}{fenced}",
        "agent": "connected" if host.linked else "away",
        "last seen": age(host.last_seen_at, invocation.client.now),
        "VMs": str(host.instances),
        "address": host.address or "takes no guests from other hosts",
        "shared folder": host.shared or "none",
    }
    invocation.say(host.name)
    for name, value in rows.items():
        invocation.say(f"  {name:<14}{value}")
    say_room(invocation, host)


def say_room(invocation: Invocation, stands: HostStands | OtherHost) -> None:
    """Print what a host has, what is promised of it, and what is free."""
    invocation.table(
        ("", "TOTAL", "PROMISED", "FREE"),
        (
            (title, *(_amount(getattr(one, what)) for one in (stands.total, stands.promised, stands.free)))
            for what, title in _WORDS.items()
        ),
    )
    if stands.disk_free_mib is not None:
        invocation.say(f"Free on its disk now: {stands.disk_free_mib} MiB")


def _amount(value: int | None) -> str:
    return "no limit" if value is None else str(value)


@click.command("fence")
@click.argument("name", shell_complete=completer(HOSTS))
@click.option(
    "--i-am-sure",
    "sure",
    is_flag=True,
    required=True,
    help="That its guests have ended, such as because it is switched off.",
)
@json_option
@needs_invocation
def fence_host(invocation: Invocation, *, name: str, sure: bool) -> None:
    """Say that the guests of a lost host have ended.

    Its VMs may then be evacuated. If they run after all, two copies of one
    guest can damage its disks. The server does this by itself when the
    host's lease has run out.
    """
    with suggesting(invocation.client, HOSTS, name):
        reply = invocation.client.post(path_of(HOSTS, name, "fence"), Fencing(guests_have_ended=sure))
    if not invocation.answer(reply):
        _say(invocation, reply.decode(OtherHost))


@click.command("forget")
@click.argument("name", shell_complete=completer(HOSTS))
@json_option
@needs_invocation
def forget_host(invocation: Invocation, *, name: str) -> None:
    """Forget a host that is fenced and has no VMs any more."""
    with suggesting(invocation.client, HOSTS, name):
        reply = invocation.client.delete(path_of(HOSTS, name))
    if invocation.json:
        click.echo(reply.body or b"{}")
    else:
        invocation.say(f"Forgotten: {name}")


COMMANDS: tuple[click.Command, ...] = (list_hosts, fence_host, forget_host)
"""What `interlock host` has besides `show`."""
