"""`interlock why`, `interlock stuck` and `interlock request`: decisions, stuck operations and requests."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from interlock.api.schemas.responses import (
    AllowedOperation,
    AllowedOperations,
    Approved,
    Cancelled,
    Instance,
    Request,
    RequestPage,
    Stuck,
    StuckList,
)
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.commands.submission import REQUESTS, progress_text, wait_for_end, wait_option
from interlock.cli.completion import OperationName, vm_argument
from interlock.cli.context import Cell, Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import STATE_COLOURS, clock, duration, humanize
from interlock.cli.output.refusals import why_text
from interlock.core.holds import ApprovalOutcome
from interlock.core.operations import Operation
from interlock.core.records import Cancellation, Status
from interlock.core.states import NO_TASK
from interlock.ports import HostState

_PAGE = 500
_NOT_IN_THIS_STATE = "not_in_this_state"
"""The reason of operations that mean nothing in a state: listed in one line, since most of them do in most states."""


@click.command()
@vm_argument
@click.argument("operation", type=OperationName(), required=False)
@click.option(
    "--with",
    "named",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of OPERATION, such as volume=data. May be given more than once.",
)
@with_json
def why(invocation: Invocation, *, vm: str, operation: Operation | None, named: tuple[str, ...]) -> None:
    """Show what the gate would decide now, and why.

    Without OPERATION, show every operation. Without parameters, an operation that requires some is denied only if no
    parameters would be admitted.
    """
    if named:
        _why_exactly(invocation, vm, operation, named)
        return
    reply = invocation.client.get(path_of(INSTANCES, vm, "allowed"))
    allowed = reply.decode(AllowedOperations)
    if operation is None:
        if not invocation.print_json(reply):
            _print_all(invocation, allowed)
        return
    answer = next((one for one in allowed.operations if one.operation is operation), None)
    if answer is None:
        raise Failure(ExitCode.NOT_FOUND, f"Operation {operation.value} not supported by the server.")
    if invocation.json:
        invocation.emit(answer)
        return
    invocation.echo(why_text(answer, allowed.name, invocation.client.now))
    if answer.disposition == "denied":
        instead = [humanize(one.operation) for one in allowed.operations if one.disposition == "admitted"]
        invocation.echo(f"  Allowed now: {', '.join(instead) or 'nothing'}")


def _why_exactly(invocation: Invocation, vm: str, operation: Operation | None, named: tuple[str, ...]) -> None:
    """Show what the gate would decide now about a submission with these parameters."""
    if operation is None:
        raise Failure(ExitCode.USAGE, "--with requires an OPERATION.")
    parameters: dict[str, Any] = {}
    for one in named:
        name, equals, text = one.partition("=")
        if not name or not equals:
            raise Failure(ExitCode.USAGE, f"Invalid --with {one[:80]!r}: expected NAME=VALUE.")
        parameters[name.replace("-", "_")] = _value(text)
    body = {"operation": operation.value, "parameters": parameters}
    reply = invocation.client.post(path_of(INSTANCES, vm, "allowed"), body)
    if not invocation.print_json(reply):
        invocation.echo(why_text(reply.decode(AllowedOperation), vm, invocation.client.now))


def _value(text: str) -> Any:
    """Parse an integer, `true` or `false`; return everything else as text."""
    words = {"true": True, "false": False}
    if text.isascii() and text.isdecimal():
        return int(text)
    return words.get(text, text)


def _print_all(invocation: Invocation, answers: AllowedOperations) -> None:
    colours = {"admitted": "green", "redundant": "yellow", "denied": "red"}
    elsewhere = [humanize(one.operation) for one in answers.operations if one.reason == _NOT_IN_THIS_STATE]
    state = humanize(answers.vm_state)
    task = "" if answers.task_state == NO_TASK else f", task {humanize(answers.task_state)}"
    invocation.echo(f"{answers.name} is {state}{task}.")
    invocation.table(
        ("OPERATION", "ANSWER", "REASON", "RETRY AT", "WHY"),
        (
            (
                humanize(one.operation),
                Cell(one.disposition, colours[one.disposition]),
                one.reason or "-",
                _retry_at(one, invocation.client.now),
                one.because or ("-" if one.disposition == "admitted" else one.detail),
            )
            for one in answers.operations
            if one.reason != _NOT_IN_THIS_STATE
        ),
    )
    if elsewhere:
        invocation.echo(f"Not possible while {state} ({_NOT_IN_THIS_STATE}): {', '.join(elsewhere)}")


def _retry_at(one: AllowedOperation, now: float | None) -> str:
    return clock(one.allowed_at, now) if one.allowed_at is not None else "-"


@click.command()
@with_json
def stuck(invocation: Invocation) -> None:
    """List stuck VMs, and what can be done.

    An operation without progress for longer than the policy's threshold is stuck, as is one that will not end, such as
    a live migration that does not converge, and a guest in trouble: its QEMU does not respond, or its host is lost or
    fenced.
    """
    reply = invocation.client.get("/v1/stuck")
    if invocation.print_json(reply):
        return
    items = reply.decode(StuckList).items
    if not items:
        invocation.echo("Nothing is stuck.")
    now = invocation.client.now
    for one in items:
        invocation.echo(click.style(f"{one.name}: {_reason(one)}", fg="red", bold=True))
        invocation.echo(f"  {one.why}")
        if one.request is not None and one.takes_over:
            invocation.echo(f"  In {one.task_state} since {clock(one.silent_since_at, now)}, request {one.request.id}")
            invocation.echo(f"  Would take over: {', '.join(humanize(each) for each in one.takes_over)}")
        elif one.request is not None and one.request.warning is not None:
            invocation.echo(f"  {one.request.detail or ''}")
            invocation.echo(f"  `interlock request cancel {one.request.id}` cancels it; the VM is not affected.")
        if one.fenced_at is not None:
            invocation.echo(f"  {one.host} is fenced at {clock(one.fenced_at, now)}, unless it is back before.")
        if one.remedy is not None:
            invocation.echo(f"  {one.remedy}")
        invocation.echo(f"  Allowed now: {', '.join(humanize(each) for each in one.allowed)}")


def _reason(one: Stuck) -> str:
    lasts = duration(one.silent_s)
    if one.request is not None and one.takes_over:
        return f"{humanize(one.request.operation)} silent for {lasts}"
    if one.request is not None and one.request.warning is not None:
        return f"{humanize(one.request.operation)} {one.request.warning}"
    if one.host_state is not HostState.UP:
        return f"host {one.host} {one.host_state.value} for {lasts}"
    return f"{humanize(one.guest_trouble or 'in trouble')} for {lasts}"


@click.group("request")
def request_commands() -> None:
    """Requests: admitted operations."""


@request_commands.command("list")
@vm_argument
@click.option(
    "--limit", type=click.IntRange(1, _PAGE), default=20, show_default=True, help="Maximum number, newest first."
)
@with_json
def list_(invocation: Invocation, *, vm: str, limit: int) -> None:
    """List the requests of a VM, newest first."""
    columns = {
        "REQUEST": lambda one: one.id,
        "OPERATION": lambda one: humanize(one.operation),
        "STATUS": lambda one: Cell(one.status.value, STATE_COLOURS.get(one.status.value)),
        "ADMITTED": lambda one: clock(one.admitted_at, invocation.client.now),
        "DURATION": lambda one: duration(one.duration_s) if one.duration_s is not None else "-",
        "BY": lambda one: one.requested_by,
        "REASON": lambda one: one.message or one.reason or "-",
    }
    invocation.print_items(
        invocation.client.get(path_of(INSTANCES, vm, "requests"), {"limit": limit}), RequestPage, columns
    )


@request_commands.command()
@click.argument("request")
@wait_option
def show(invocation: Invocation, *, request: str, wait: bool) -> None:
    """Show a request; with --wait, wait for it to end."""
    reply = invocation.client.get(path_of(REQUESTS, request))
    one = reply.decode(Request)
    if wait:
        wait_for_end(invocation, one, _name_of(invocation, one))
    elif not invocation.print_json(reply):
        print_request(invocation, one)


def _name_of(invocation: Invocation, request: Request) -> str:
    """Return the name of a request's VM, or its id if it is not found."""
    try:
        return invocation.client.get(path_of(INSTANCES, request.instance)).decode(Instance).name
    except Failure as failure:
        if failure.code is not ExitCode.NOT_FOUND:
            raise
        return request.instance


def print_request(invocation: Invocation, one: Request) -> None:
    """Print a request, one field per line."""
    now = invocation.client.now
    facts: dict[str, Any] = {
        "Request": one.id,
        "Operation": " ".join((humanize(one.operation), *map(_parameter, one.parameters.items()))),
        "VM": one.instance,
        "Status": click.style(one.status.value, fg=STATE_COLOURS.get(one.status.value)),
        "Phase": one.phase,
        "Progress": progress_text(one),
        "Detail": one.detail,
        "Warning": one.warning,
        "Requested by": f"{one.requested_by} ({one.role}) at {clock(one.admitted_at, now)}",
        "Approved by": ", ".join(f"{each.by} at {clock(each.at, now)}" for each in one.approvals) or None,
        f"{_decision(one)} by": f"rule {one.rule}",
        "Started": one.taken_at and clock(one.taken_at, now),
        "Last progress": one.last_sign_of_life_at and clock(one.last_sign_of_life_at, now),
        "Ended": one.ended_at and clock(one.ended_at, now),
        "Duration": duration(one.duration_s) if one.duration_s is not None else None,
        "Reason": one.reason,
        "Message": one.message,
    }
    invocation.print_facts(facts, 15)


def _parameter(named: tuple[str, Any]) -> str:
    """Format a parameter, such as `host=north`; what is not a text, as in JSON."""
    name, value = named
    return f"{name}={value if isinstance(value, str) else msgspec.json.encode(value).decode()}"


def _decision(one: Request) -> str:
    """Return what the rule of a request did."""
    if one.status is Status.HELD:
        return "Denied"
    if one.status is Status.CANCELLED and one.held_until_at is not None and one.taken_at is None:
        # It may have been cancelled before or after its admission.
        return "Decided"
    return "Admitted"


@request_commands.command()
@click.argument("request")
@with_json
def approve(invocation: Invocation, *, request: str) -> None:
    """Approve a held request of somebody else.

    A rule of the policy says who may, by role or group. The request is then
    evaluated again: it is admitted, or stays held if another rule denies it.
    """
    reply = invocation.client.post(path_of(REQUESTS, request, "approve"), None)
    answer = reply.decode(Approved)
    if not invocation.print_json(reply):
        one = answer.request
        head = "Approved" if answer.outcome is ApprovalOutcome.APPROVED else "Already approved"
        invocation.echo(f"{head}: {humanize(one.operation)} {one.id} of {one.requested_by}, now {one.status.value}")


@request_commands.command()
@click.argument("request")
@with_json
def cancel(invocation: Invocation, *, request: str) -> None:
    """Cancel a request. One in flight is interrupted, if possible."""
    reply = invocation.client.delete(path_of(REQUESTS, request))
    answer = reply.decode(Cancelled)
    if not invocation.print_json(reply):
        what = f"{humanize(answer.request.operation)} {answer.request.id}"
        match answer.outcome:
            case Cancellation.CANCELLED:
                invocation.echo(f"Cancelled: {what}")
            case Cancellation.STOPPING:
                invocation.echo(f"Stopping: {what} is in flight and is being interrupted")
            case Cancellation.TOO_LATE:
                invocation.echo(
                    f"Too late: {what} is {answer.request.status.value} and cannot be cancelled", error=True
                )
    if answer.outcome is Cancellation.TOO_LATE:
        raise Failure(ExitCode.REFUSED, "", text="")
