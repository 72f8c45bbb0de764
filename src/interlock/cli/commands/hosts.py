"""`interlock host`: list, show, fence, replace, rename and delete hosts."""

from __future__ import annotations

from typing import Final

import click

from interlock.api.schemas.hosts import (
    FenceConfirmation,
    Host,
    HostCapacity,
    HostDrain,
    HostEnrolment,
    HostEventList,
    HostList,
    HostRenameRequest,
)
from interlock.cli.client.http_client import Client
from interlock.cli.client.paths import path_of
from interlock.cli.completion import completer
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import Failure
from interlock.cli.output.formatting import age, clock
from interlock.ports import HostState

HOSTS = "/v1/hosts"
_named = click.argument("name", shell_complete=completer(HOSTS))
_sure = click.option(
    "--i-am-sure",
    "sure",
    is_flag=True,
    required=True,
    help="Confirm that the guests on it have ended, for example because it is powered off.",
)
_WORDS: Final = {"memory_mib": "Memory (MiB)", "vcpus": "vCPUs", "disk_mib": "Disk (MiB)"}


@click.group("host")
def host_commands() -> None:
    """The hosts that VMs run on."""


@host_commands.command("show")
@click.argument("name", required=False, shell_complete=completer(HOSTS))
@with_json
def show(invocation: Invocation, *, name: str | None) -> None:
    """Show a host's total, claimed and free capacity.

    Without NAME, show the server's own host; for another host, also show its
    state and its agent's connection.
    """
    reply = invocation.client.get("/v1/host" if name is None else path_of(HOSTS, name))
    if invocation.print_json(reply):
        return
    if name is not None:
        _print_host(invocation, reply.decode(Host))
        return
    host = reply.decode(HostCapacity)
    hypervisor = host.hypervisor if host.accelerator is None else f"{host.hypervisor} ({host.accelerator})"
    invocation.echo(f"{host.name}: {host.guests} VMs, hypervisor {hypervisor}")
    _print_capacity(invocation, host)
    _print_protections(invocation, host)


@host_commands.command("list")
@with_json
def list_hosts(invocation: Invocation) -> None:
    """List the hosts other than the server's own."""
    reply = invocation.client.get(HOSTS)
    if invocation.print_json(reply):
        return
    found, now = reply.decode(HostList), invocation.client.now
    if not found.items:
        invocation.echo(f"No other hosts. The server runs on {found.own}{drain_text(found.own_drain)}.", error=True)
        return
    invocation.table(
        ("NAME", "STATE", "AGENT", "SEEN", "VMS", "ADDRESS"),
        (
            (
                one.name,
                state_text(one, now) + drain_text(one.drain),
                "connected" if one.linked else "disconnected",
                age(one.last_seen_at, now),
                str(one.instances),
                one.address or "-",
            )
            for one in found.items
        ),
    )
    invocation.echo(f"The server runs on {found.own}{drain_text(found.own_drain)}.", error=True)


def state_text(host: Host, now: float | None) -> str:
    """Return a host's state; of a lost one, with the time at which it is fenced."""
    if host.state is not HostState.UP or host.lost_since_at is None:
        return host.state.value
    until = "" if host.fenced_at is None else f", fenced {clock(host.fenced_at, now)}"
    return f"lost{until}"


def drain_text(drain: HostDrain | None) -> str:
    """Return the state of a host's drain."""
    if drain is None:
        return ""
    return f", draining ({drain.left} left)" if drain.left else ", drained"


def host_text(client: Client, name: str) -> str:
    """Return a host's name with its trouble, if any. The server's own host, which is not listed, has none."""
    try:
        host = client.get(path_of(HOSTS, name)).decode(Host)
    except Failure:
        return name
    waits = "requests wait until it is back"
    until = "" if host.fenced_at is None else f", or are denied once it is fenced, {clock(host.fenced_at, client.now)}"
    match host.state:
        case HostState.FENCED:
            return f"{name} (fenced: its guests have ended; `vm evacuate` moves a VM to another host)"
        case HostState.LOST:
            return f"{name} (lost: unknown whether its guests run; {waits}{until})"
        case HostState.UP:
            lost = "lost: its guests may still run" if host.lost_since_at else "its agent is disconnected"
            return name if host.linked else f"{name} ({lost}; {waits}{until})"


def _print_host(invocation: Invocation, host: Host) -> None:
    now = invocation.client.now
    fenced = f", fenced by {host.fenced_by}" if host.fenced_by else ""
    rows = {
        "state": f"{state_text(host, now)}{fenced}{drain_text(host.drain)}",
        "agent": ("connected" if host.linked else "disconnected") + _former_text(host),
        "last seen": age(host.last_seen_at, invocation.client.now),
        "VMs": f"{host.instances}, to be evacuated" if host.to_evacuate else str(host.instances),
        "identity": host.identity or "unknown",
        "address": host.address or "none (no incoming migrations)",
        "certificate": "issued" if host.certified else "none (no encrypted live migration)",
        "shared folder": host.shared or "none",
    }
    invocation.echo(host.name)
    for name, value in rows.items():
        invocation.echo(f"  {name:<14}{value}")
    _print_capacity(invocation, host)
    _print_protections(invocation, host)


def _print_protections(invocation: Invocation, host: HostCapacity | Host) -> None:
    """List what confines the host's VMs: what is on with how it is done, what is off with the reason."""
    if host.protections:
        invocation.echo("  protections of VMs:")
    for one in host.protections:
        invocation.echo(f"    {one.name:<19}{'on' if one.on else 'OFF':<5}{one.detail}")


def _former_text(host: Host) -> str:
    if host.former is None:
        return ""
    return f", as {host.former}: start it with --name {host.name} next time"


@host_commands.command("rename")
@_named
@click.argument("new")
@with_json
def rename_host(invocation: Invocation, *, name: str, new: str) -> None:
    """Rename a host, with its VMs and its agent's tokens.

    A running agent is not affected; start it with --name NEW the next time.
    No VM may be migrating to or from the host.
    """
    reply = invocation.client.post(path_of(HOSTS, name, "rename"), HostRenameRequest(name=new))
    if not invocation.print_json(reply):
        host = reply.decode(Host)
        invocation.echo(f"Renamed: {name} is {host.name} now. Start its agent with --name {host.name} from now on.")


def _print_capacity(invocation: Invocation, host: HostCapacity | Host) -> None:
    """Print a host's total, claimed and free capacity."""
    invocation.table(
        ("", "TOTAL", "CLAIMED", "FREE"),
        (
            (title, *(_amount(getattr(one, what)) for one in (host.total, host.promised, host.free)))
            for what, title in _WORDS.items()
        ),
    )
    if host.disk_free_mib is not None:
        invocation.echo(f"Free disk space: {host.disk_free_mib} MiB")


def _amount(value: int | None) -> str:
    return "unlimited" if value is None else str(value)


@host_commands.command("events")
@click.argument("name", required=False, shell_complete=completer(HOSTS))
@with_json
def host_events(invocation: Invocation, *, name: str | None) -> None:
    """Show what happened to a host: joined, lost, fenced, back.

    Its VMs have the same as events of their own (`vm events`). Without
    NAME it is the server's own host: clock_jumped, disk_full,
    disk_has_space.
    """
    if name is None:
        name = invocation.client.get(HOSTS).decode(HostList).own
    columns = {
        "WHEN": lambda one: clock(one.at, invocation.client.now),
        "EVENT": lambda one: one.kind,
        "BY": lambda one: one.by or "-",
        "DETAIL": lambda one: one.detail or "-",
    }
    invocation.print_items(invocation.client.get(path_of(HOSTS, name, "events")), HostEventList, columns)


@host_commands.command("enroll")
@click.argument("name")
@with_json
def enroll_host(invocation: Invocation, *, name: str) -> None:
    """Create a one-time secret for the first connection of a host's agent.

    Where the server requires certificates of agents, an agent without one
    connects with the secret (`interlock agent --enrolment-file FILE`), besides
    its token, and gets the host's certificate, which it renews by itself. The
    secret is printed only once, on standard output.
    """
    reply = invocation.client.post(path_of(HOSTS, name, "enrolment"), {})
    if invocation.print_json(reply):
        return
    made = reply.decode(HostEnrolment)
    until = clock(made.expires_at, invocation.client.now)
    invocation.echo(f"Enrolment of {made.host}: valid once, until {until}. Its secret is shown only here:", error=True)
    invocation.echo(made.secret)


@host_commands.command("fence")
@_named
@_sure
@with_json
def fence_host(invocation: Invocation, *, name: str, sure: bool) -> None:
    """Fence a lost host: confirm that its guests have ended.

    Its VMs can then be evacuated. If a guest still runs, two instances of it
    can corrupt its disks. The server fences a host automatically when its
    lease has expired.
    """
    reply = invocation.client.post(path_of(HOSTS, name, "fence"), FenceConfirmation(guests_have_ended=sure))
    if not invocation.print_json(reply):
        _print_host(invocation, reply.decode(Host))


@host_commands.command("replace")
@_named
@_sure
@with_json
def replace_host(invocation: Invocation, *, name: str, sure: bool) -> None:
    """Release a host's name for an agent with another data folder.

    The old host is fenced and renamed, for example to NAME-old. Its VMs stay
    recorded there: evacuate or delete them, then forget that host. The next
    agent that connects as NAME gets the name.
    """
    reply = invocation.client.post(path_of(HOSTS, name, "replace"), FenceConfirmation(guests_have_ended=sure))
    if not invocation.print_json(reply):
        old = reply.decode(Host)
        invocation.echo(f"The name {name} is free for another agent. The old host is now {old.name}:")
        _print_host(invocation, old)


@host_commands.command("forget")
@_named
@with_json
def forget_host(invocation: Invocation, *, name: str) -> None:
    """Delete a fenced host without VMs."""
    reply = invocation.client.delete(path_of(HOSTS, name))
    invocation.print_removed(reply, f"Deleted: host {name}")
