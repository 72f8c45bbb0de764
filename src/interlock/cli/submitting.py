"""Asking for an operation, and saying what the gate answered."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import click

from interlock.api.schemas import Admitted, Held, Redundant
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option
from interlock.cli.naming import INSTANCES, path_of, suggesting
from interlock.cli.refusals import explain_failure
from interlock.cli.waiting import report, wait_for_end
from interlock.cli.wording import clock, printable, spoken
from interlock.core.operations import Operation
from interlock.core.records import Status

Command = Callable[..., None]


def wait_option(command: Command) -> Command:
    """`--wait/--no-wait`, and `--json` with it."""
    option = click.option(
        "--wait/--no-wait", default=False, help="Stay until it has ended, showing its phases. Default: do not."
    )
    return option(json_option(command))


def asking_options(command: Command) -> Command:
    """What every operation takes: `--hold`, `--wait/--no-wait` and `--json`."""
    option = click.option(
        "--hold", metavar="TIME", help="If it is refused now, ask until the policy allows it, for so long (as in 10m)."
    )
    return option(wait_option(command))


def fresh_key() -> dict[str, str]:
    """The header that makes a submission safe to send twice, should the connection break."""
    return {"Idempotency-Key": secrets.token_hex(16)}


def submit(
    invocation: Invocation,
    vm: str,
    operation: Operation,
    *,
    wait: bool,
    hold: str | None = None,
    parameters: dict[str, Any] | None = None,
) -> None:
    """Ask for an operation on a VM, print the answer, and follow it to its end if `wait`.

    Raises:
        Failure: refused, not found, not reachable; or it ended other than well.
    """
    body: dict[str, Any] = {"operation": operation.value, "parameters": parameters or {}}
    if hold is not None:
        body["hold"] = hold
    client = invocation.client
    try:
        with suggesting(client, INSTANCES, vm):
            reply = client.post(path_of(INSTANCES, vm, "requests"), body, fresh_key())
    except Failure as failure:
        explain_failure(failure, vm, client.now)
        raise
    answer = reply.decode(Admitted | Redundant | Held)  # type: ignore[arg-type]
    say_answer(invocation, answer, operation, vm, wait=wait)
    if wait and answer.request is not None:
        wait_for_end(invocation, answer.request, vm)
    else:
        invocation.answer(reply)


def say_answer(
    invocation: Invocation, answer: Admitted | Redundant | Held, operation: Operation, vm: str, *, wait: bool
) -> None:
    """Say what was admitted, or why nothing had to be; with `--json` that is the document's to say."""
    if invocation.json:
        return
    what = f"{spoken(operation)} of {vm}"
    if not isinstance(answer, Redundant) and answer.password is not None:
        invocation.say(f"The password, told this once: {answer.password}")
    if isinstance(answer, Redundant):
        _say_redundant(invocation, answer, what)
    elif isinstance(answer, Held):
        _say_held(invocation, answer, what)
    elif answer.request.status is Status.SUCCEEDED and not wait:
        report(invocation, answer.request, vm)
    elif not wait or answer.supersedes or answer.cancels:
        _say_admitted(invocation, answer, what)


def _say_redundant(invocation: Invocation, answer: Redundant, what: str) -> None:
    invocation.say(click.style("Nothing to do", fg="yellow", bold=True) + f": {what} ({answer.reason})")
    if answer.because:
        invocation.say(f"  {answer.because}")
    if answer.request is not None:
        invocation.say(f"  On its way: {spoken(answer.request.operation)} {answer.request.id}")
    if answer.allowed_at is not None:
        moment = clock(answer.allowed_at, invocation.client.now)
        invocation.say(f"  Asking again from {moment} would take over, unless it shows life before.")


def _say_held(invocation: Invocation, answer: Held, what: str) -> None:
    now = invocation.client.now
    head = click.style("Held", fg="yellow", bold=True)
    invocation.say(f"{head}: {what} ({answer.reason}), request {answer.request.id}")
    invocation.say(f"  {printable(answer.because or answer.detail)}")
    if answer.allowed_at is not None:
        invocation.say(f"  It will be admitted at {clock(answer.allowed_at, now)}, if nothing changes before.")
    until = f"  Asked until {clock(answer.until_at, now)}"
    invocation.say(f"{until}; `interlock request cancel {answer.request.id}` ends it.")


def _say_admitted(invocation: Invocation, answer: Admitted, what: str) -> None:
    invocation.say(click.style("Admitted", fg="green", bold=True) + f": {what}, request {answer.request.id}")
    if answer.supersedes:
        invocation.say(f"  Takes over from: {', '.join(answer.supersedes)}")
    if answer.cancels:
        invocation.say(f"  Cancels: {', '.join(answer.cancels)}")
