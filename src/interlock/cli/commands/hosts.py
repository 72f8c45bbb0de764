"""`interlock host`: list, show, fence, replace, rename and delete hosts, and move their VMs in bulk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

import click

from interlock.api.schemas.hosts import (
    FenceConfirmation,
    Host,
    HostCapacity,
    HostDrain,
    HostDrainRequest,
    HostEnrolment,
    HostEvacuationRequest,
    HostEventList,
    HostList,
    HostMove,
    HostMoveProgress,
    HostMoves,
    HostRenameRequest,
    RebalanceRequest,
)
from interlock.api.schemas.responses import Request
from interlock.cli.client.http_client import Client, Reply
from interlock.cli.client.paths import HOSTS, path_of
from interlock.cli.commands.submission import describe
from interlock.cli.completion import completer
from interlock.cli.context import Cell, Invocation, json_option, needs_invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import age, clock, duration, humanize
from interlock.core.records import ENDS, Status
from interlock.ports import HostState

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
    """List what confines the host's VMs, and which networks they can have, with how or why not."""
    if host.protections:
        invocation.echo("  protections of VMs:")
    for one in host.protections:
        invocation.echo(f"    {one.name:<19}{'on' if one.on else 'OFF':<5}{one.detail}")
    if host.networks:
        invocation.echo("  kinds of network:")
    for ability in host.networks:
        invocation.echo(f"    {ability.kind.value:<19}{'yes' if ability.available else 'NO':<5}{ability.detail}")


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


MOVES: Final = "/v1/host-moves"
_POLL_S: Final = 0.5
_IDS_MAX: Final = 50

_dry_run = click.option("--dry-run", is_flag=True, help="Only print the plan for each VM.")
_wait = click.option(
    "--wait/--no-wait", default=True, help="Wait until all have moved, showing progress. Default: wait."
)


def _host_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument NAME, `--wait` and `--json`."""
    named = click.argument("name", shell_complete=completer(HOSTS))
    return named(_wait(json_option(needs_invocation(command))))


@host_commands.command()
@click.option("--host", default="any", show_default=True, help="Target host, or `any` for those with free capacity.")
@click.option("--from-image", is_flag=True, help="Recreate root disks that are lost with the host from their images.")
@_dry_run
@_host_options
def evacuate(invocation: Invocation, *, name: str, host: str, from_image: bool, dry_run: bool, wait: bool) -> None:
    """Evacuate all VMs of a fenced host.

    Each evacuation is a request of its own, and may be denied with a reason.
    --dry-run assumes that the host is fenced.
    """
    body = HostEvacuationRequest(host=host, from_image=from_image, dry_run=dry_run)
    reply = invocation.client.post(path_of(HOSTS, name, "evacuate"), body)
    _follow_all(invocation, reply, wait=wait)


@host_commands.command()
@click.option("--cold", is_flag=True, help="Cold-migrate VMs that cannot be live-migrated.")
@_dry_run
@_host_options
def drain(invocation: Invocation, *, name: str, cold: bool, dry_run: bool, wait: bool) -> None:
    """Drain a host for maintenance, until `host undrain`.

    No new VMs are scheduled to it, and its running VMs are live-migrated away.
    VMs that cannot be moved stay, with the reason, and are retried until the
    host is empty, also after a restart of the server.
    """
    reply = invocation.client.post(path_of(HOSTS, name, "drain"), HostDrainRequest(cold=cold, dry_run=dry_run))
    if dry_run:
        _follow_all(invocation, reply, wait=False)
    elif not wait or invocation.json:
        if not invocation.print_json(reply):
            left = len(reply.decode(HostMoves).items)
            invocation.echo(f"Draining: {name}, {left} VMs left; `interlock host drain {name}` follows it")
    else:
        _follow_drain(invocation, name)


@host_commands.command()
@click.argument("name", shell_complete=completer(HOSTS))
@with_json
def undrain(invocation: Invocation, *, name: str) -> None:
    """Stop draining a host. Migrations in flight continue."""
    reply = invocation.client.delete(path_of(HOSTS, name, "drain"))
    invocation.print_removed(reply, f"Undrained: {name}")


@host_commands.command()
@click.option("--yes", is_flag=True, help="Do it. Default: only print the plan.")
@click.option("--dry-run", is_flag=True, help="Only print the plan. This is the default.")
@_wait
@with_json
def rebalance(invocation: Invocation, *, yes: bool, dry_run: bool, wait: bool) -> None:
    """Rebalance running VMs over the hosts by live migrations.

    Without --yes, only print the plan.
    """
    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run are mutually exclusive.")
    reply = invocation.client.post(MOVES, RebalanceRequest(dry_run=not yes))
    _follow_all(invocation, reply, wait=wait)


# ------------------------------------------------------------------------------------------------------- output


def _follow_all(invocation: Invocation, reply: Reply, *, wait: bool) -> None:
    """Print the plan, and follow the submitted requests to their end. Raises `Failure` if a VM stays."""
    if invocation.print_json(reply):
        return
    moves = reply.decode(HostMoves)
    if not moves.items:
        invocation.echo("No VMs to move.")
        return
    _table(invocation, moves.items)
    if moves.dry_run:
        invocation.echo("Nothing was changed.", error=True)
        return
    stay = [move for move in moves.items if move.reason is not None]
    failed = _follow(invocation, moves.items) if wait else 0
    if stay or failed:
        raise Failure(ExitCode.REFUSED, f"{_vms(len(stay) + failed)}, of {len(moves.items)}.")


def _vms(count: int) -> str:
    return "1 VM stays" if count == 1 else f"{count} VMs stay"


def _table(invocation: Invocation, moves: Iterable[HostMove]) -> None:
    invocation.table(
        ("VM", "PROJECT", "STATE", "OPERATION", "FROM", "TO", "REASON OR LOSSES"),
        (
            (
                one.name,
                one.project,
                one.vm_state.value,
                "-" if one.operation is None else humanize(one.operation),
                one.host,
                Cell("stays", "red") if one.target is None or one.reason else one.target,
                one.reason or " ".join(one.losses) or "-",
            )
            for one in moves
        ),
    )


def _follow(invocation: Invocation, moves: Iterable[HostMove]) -> int:
    """Print how each request ends. Return how many did not succeed."""
    names = {one.request: one.name for one in moves if one.request is not None}
    open_ones, failed, total = dict(names), 0, len(names)
    shown: dict[str, str] = {}
    while open_ones:
        for request in _requests(invocation, list(open_ones)):
            if request.status in ENDS:
                name = open_ones.pop(request.id)
                failed += request.status is not Status.SUCCEEDED
                _print_end(invocation, request, name, f"{total - len(open_ones)} of {total}")
            else:
                _print_warning(invocation, shown, request, open_ones[request.id])
        if open_ones:
            time.sleep(_POLL_S)
    return failed


def _requests(invocation: Invocation, ids: list[str]) -> list[Request]:
    found: list[Request] = []
    for start in range(0, len(ids), _IDS_MAX):
        reply = invocation.client.get(MOVES, {"requests": ",".join(ids[start : start + _IDS_MAX])})
        found += reply.decode(HostMoveProgress).items
    return found


def _print_end(invocation: Invocation, request: Request, name: str, count: str) -> None:
    took = f" in {duration(request.duration_s)}" if request.duration_s else ""
    done = request.status is Status.SUCCEEDED
    head = click.style("Moved" if done else request.status.value.capitalize(), fg="green" if done else "red")
    why = f": {request.message}" if request.message and not done else ""
    invocation.echo(f"{head}: {name}{took} ({count}){why}")


def _print_warning(invocation: Invocation, shown: dict[str, str], request: Request, name: str) -> None:
    """Print a request's warning, once each."""
    if request.warning is not None and shown.get(request.id) != request.warning:
        shown[request.id] = request.warning
        invocation.echo(f"  {describe(request, name)}", error=True)


def _follow_drain(invocation: Invocation, name: str) -> None:
    """Print progress until the host is empty, or until no VM can move now. Raises `Failure`."""
    shown: dict[str, str] = {}
    before: dict[str, HostMove] = {}
    while True:
        left = invocation.client.get(path_of(HOSTS, name, "drain")).decode(HostMoves).items
        now = {one.instance: one for one in left}
        for key, one in before.items():
            if key not in now:
                invocation.echo(f"{click.style('Moved', fg='green')}: {one.name} ({len(now)} left)")
        for key, one in now.items():
            text = f"to {one.target} by {humanize(one.operation)}" if one.operation and one.target else one.reason
            if text is not None and shown.get(key) != text:
                shown[key] = text
                invocation.echo(f"  {one.name}: {text}")
        if not now:
            invocation.echo(f"{click.style('Drained', fg='green', bold=True)}: {name} has no VMs")
            return
        if all(one.reason is not None for one in now.values()):
            raise Failure(
                ExitCode.REFUSED,
                f"{_vms(len(now))} on {name} for now. The drain continues and retries them.",
            )
        before = now
        time.sleep(_POLL_S)
