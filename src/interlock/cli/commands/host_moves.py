"""`interlock host evacuate`, `drain`, `undrain` and `rebalance`: bulk moves of VMs between hosts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

import click

from interlock.api.schemas.hosts import (
    HostDrainRequest,
    HostEvacuationRequest,
    HostMove,
    HostMoveProgress,
    HostMoves,
    RebalanceRequest,
)
from interlock.api.schemas.responses import Request
from interlock.cli.client.http_client import Reply
from interlock.cli.client.paths import HOSTS, path_of
from interlock.cli.commands.hosts import host_commands
from interlock.cli.commands.request_waiter import describe
from interlock.cli.completion import completer
from interlock.cli.context import Cell, Invocation, json_option, needs_invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import duration, humanize
from interlock.core.records import ENDS, Status

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
