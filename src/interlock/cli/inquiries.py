"""`interlock why`, `interlock stuck` and `interlock request`: what is going on, and what is in the way."""

from __future__ import annotations

from typing import Any

import click

from interlock.api.schemas import (
    AllowedOperation,
    AllowedOperations,
    Cancelled,
    Instance,
    Request,
    RequestPage,
    StuckList,
)
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Cell, Invocation, json_option, needs_invocation
from interlock.cli.naming import INSTANCES, OperationName, path_of, suggesting, vm_argument
from interlock.cli.refusals import why_text
from interlock.cli.submitting import wait_option
from interlock.cli.waiting import REQUESTS, progress_text, wait_for_end
from interlock.cli.wording import STATE_COLOURS, clock, duration, printable, spoken
from interlock.core.operations import Operation
from interlock.core.records import Cancellation

_PAGE = 500


@click.command()
@vm_argument
@click.argument("operation", type=OperationName(), required=False)
@json_option
@needs_invocation
def why(invocation: Invocation, *, vm: str, operation: Operation | None) -> None:
    """Say what would be answered now, and why.

    Without OPERATION it says so for every operation.
    """
    with suggesting(invocation.client, INSTANCES, vm):
        reply = invocation.client.get(path_of(INSTANCES, vm, "allowed"))
    answers = reply.decode(AllowedOperations)
    if operation is None:
        if not invocation.answer(reply):
            _print_all(invocation, answers)
        return
    answer = next((one for one in answers.operations if one.operation is operation), None)
    if answer is None:
        raise Failure(ExitCode.NOT_FOUND, f"The server knows no operation {operation.value}.")
    if invocation.json:
        invocation.emit(answer)
        return
    invocation.say(why_text(answer, answers.name, invocation.client.now))
    if answer.disposition == "denied":
        instead = [spoken(one.operation) for one in answers.operations if one.disposition == "admitted"]
        invocation.say(f"  Allowed now: {', '.join(instead) or 'nothing'}")


def _print_all(invocation: Invocation, answers: AllowedOperations) -> None:
    colours = {"admitted": "green", "redundant": "yellow", "denied": "red"}
    invocation.say(f"{answers.name} is {answers.vm_state.value}, task {answers.task_state}.")
    invocation.table(
        ("OPERATION", "ANSWER", "REASON", "AGAIN", "WHY"),
        (
            (
                spoken(one.operation),
                Cell(one.disposition, colours[one.disposition]),
                one.reason or "-",
                _again(one, invocation.client.now),
                printable(one.because or one.detail),
            )
            for one in answers.operations
        ),
    )


def _again(one: AllowedOperation, now: float | None) -> str:
    return clock(one.allowed_at, now) if one.allowed_at is not None else "-"


@click.command()
@json_option
@needs_invocation
def stuck(invocation: Invocation) -> None:
    """List what is stuck, and the ways out.

    Stuck is what has shown no sign of life for longer than the policy waits for it.
    """
    reply = invocation.client.get("/v1/stuck")
    if invocation.answer(reply):
        return
    items = reply.decode(StuckList).items
    if not items:
        invocation.say("Nothing is stuck.")
    now = invocation.client.now
    for one in items:
        head = f"{one.name}: {spoken(one.request.operation)} silent for {duration(one.silent_s)}"
        invocation.say(click.style(head, fg="red", bold=True))
        invocation.say(f"  {printable(one.why)}")
        invocation.say(f"  In {one.task_state} since {clock(one.silent_since_at, now)}, request {one.request.id}")
        invocation.say(f"  Would take over: {', '.join(spoken(each) for each in one.takes_over)}")
        invocation.say(f"  Allowed now: {', '.join(spoken(each) for each in one.allowed)}")


@click.group("request")
def request_commands() -> None:
    """Requests: operations that were asked for and admitted."""


@request_commands.command("list")
@vm_argument
@click.option("--limit", type=click.IntRange(1, _PAGE), default=20, show_default=True, help="How many, newest first.")
@json_option
@needs_invocation
def list_(invocation: Invocation, *, vm: str, limit: int) -> None:
    """List the requests of a VM, newest first."""
    with suggesting(invocation.client, INSTANCES, vm):
        reply = invocation.client.get(path_of(INSTANCES, vm, "requests"), {"limit": limit})
    if invocation.answer(reply):
        return
    now = invocation.client.now
    invocation.table(
        ("REQUEST", "OPERATION", "STATUS", "ASKED", "TOOK", "BY", "REASON"),
        (
            (
                one.id,
                spoken(one.operation),
                Cell(one.status.value, STATE_COLOURS.get(one.status.value)),
                clock(one.admitted_at, now),
                duration(one.duration_s) if one.duration_s is not None else "-",
                one.requested_by,
                printable(one.message or one.reason or "-"),
            )
            for one in reply.decode(RequestPage).items
        ),
    )


@request_commands.command()
@click.argument("request")
@wait_option
@needs_invocation
def show(invocation: Invocation, *, request: str, wait: bool) -> None:
    """Show a request; with --wait, follow it to its end."""
    reply = invocation.client.get(path_of(REQUESTS, request))
    one = reply.decode(Request)
    if wait:
        wait_for_end(invocation, one, _name_of(invocation, one))
    elif not invocation.answer(reply):
        print_request(invocation, one)


def _name_of(invocation: Invocation, request: Request) -> str:
    """The name of a request's VM, or its id if that is gone."""
    try:
        return invocation.client.get(path_of(INSTANCES, request.instance)).decode(Instance).name
    except Failure as failure:
        if failure.code is not ExitCode.NOT_FOUND:
            raise
        return request.instance


def print_request(invocation: Invocation, one: Request) -> None:
    """Print a request, one fact a line."""
    now = invocation.client.now
    facts: dict[str, Any] = {
        "Request": one.id,
        "Operation": spoken(one.operation) + (f" {one.parameters}" if one.parameters else ""),
        "VM": one.instance,
        "Status": click.style(one.status.value, fg=STATE_COLOURS.get(one.status.value)),
        "Phase": one.phase,
        "Progress": progress_text(one),
        "Detail": one.detail and printable(one.detail),
        "Asked by": f"{one.requested_by} ({one.role}) at {clock(one.admitted_at, now)}",
        "Admitted by": f"rule {one.rule}",
        "Taken": one.taken_at and clock(one.taken_at, now),
        "Sign of life": one.last_sign_of_life_at and clock(one.last_sign_of_life_at, now),
        "Ended": one.ended_at and clock(one.ended_at, now),
        "Took": duration(one.duration_s) if one.duration_s is not None else None,
        "Reason": one.reason,
        "Message": one.message and printable(one.message),
    }
    for title, fact in facts.items():
        if fact:
            invocation.say(f"{title + ':':<14}{fact}")


@request_commands.command()
@click.argument("request")
@json_option
@needs_invocation
def cancel(invocation: Invocation, *, request: str) -> None:
    """Withdraw a request. One that is being served is asked to stop half-way, if it can."""
    reply = invocation.client.delete(path_of(REQUESTS, request))
    answer = reply.decode(Cancelled)
    if not invocation.answer(reply):
        what = f"{spoken(answer.request.operation)} {answer.request.id}"
        match answer.outcome:
            case Cancellation.CANCELLED:
                invocation.say(f"Cancelled: {what}")
            case Cancellation.STOPPING:
                invocation.say(f"Stopping: {what} is being served, and was asked to stop half-way")
            case Cancellation.TOO_LATE:
                invocation.say(f"Too late: {what} is {answer.request.status.value} and cannot be stopped", error=True)
    if answer.outcome is Cancellation.TOO_LATE:
        raise Failure(ExitCode.REFUSED, "", text="")
