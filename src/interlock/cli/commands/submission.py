"""Submitting operations and printing the gate's disposition."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import click

from interlock.api.schemas.responses import Admitted, Held, Redundant
from interlock.cli.client.http_client import Reply
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.commands.request_waiter import report, wait_for_end
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import Failure
from interlock.cli.output.formatting import clock, humanize
from interlock.cli.output.refusals import as_refusal, if_silent, refusal_text
from interlock.core.operations import Operation
from interlock.core.records import Status

Command = Callable[..., None]


def wait_option(command: Command) -> Command:
    """Add `--wait/--no-wait` and `--json`, and pass the invocation."""
    option = click.option(
        "--wait/--no-wait", default=False, help="Wait for it to end, showing its phases. Default: do not wait."
    )
    return option(with_json(command))


def operation_options(command: Command) -> Command:
    """Add the options of every operation, `--hold`, `--wait/--no-wait` and `--json`, and pass the invocation."""
    option = click.option("--hold", metavar="TIME", help="If denied, keep retrying for up to TIME (for example 10m).")
    return option(wait_option(command))


def post(invocation: Invocation, path: str, body: Any, name: str) -> Reply:
    """Send what the gate decides on, so that a retry is safe. Raises `Failure` with the text of a denial."""
    try:
        return invocation.client.post(path, body, {"Idempotency-Key": secrets.token_hex(16)})
    except Failure as failure:
        if (refusal := as_refusal(failure.document)) is not None:
            failure.text = refusal_text(refusal, name, invocation.client.now)
        raise


def post_operation(
    invocation: Invocation,
    vm: str,
    operation: Operation,
    parameters: dict[str, Any] | None = None,
    hold: str | None = None,
) -> Reply:
    """Submit an operation, and return the reply. Raises `Failure`."""
    body: dict[str, Any] = {"operation": operation.value, "parameters": parameters or {}}
    if hold is not None:
        body["hold"] = hold
    return post(invocation, path_of(INSTANCES, vm, "requests"), body, vm)


def submit(
    invocation: Invocation,
    vm: str,
    operation: Operation,
    *,
    wait: bool,
    hold: str | None = None,
    parameters: dict[str, Any] | None = None,
) -> None:
    """Submit an operation, print its disposition, and wait for its end if `wait`.

    Raises:
        Failure: denied, not found, not reachable, or not succeeded.
    """
    reply = post_operation(invocation, vm, operation, parameters, hold)
    answer = reply.decode(Admitted | Redundant | Held)  # type: ignore[arg-type]
    print_disposition(invocation, answer, operation, vm, wait=wait)
    if wait and answer.request is not None:
        with _print_password(invocation, answer):
            wait_for_end(invocation, answer.request, vm)
    else:
        invocation.print_json(reply)


@contextlib.contextmanager
def _print_password(invocation: Invocation, answer: Admitted | Redundant | Held) -> Iterator[None]:
    """Print the generated password once it is set, or when the wait is interrupted."""
    password = None if isinstance(answer, Redundant) or invocation.json else answer.password
    try:
        yield
    except KeyboardInterrupt:
        if password is not None:
            invocation.echo(f"  If it is set, the password is: {password}")
        raise
    if password is not None:
        invocation.echo(f"The password, shown only once: {password}")


def print_disposition(
    invocation: Invocation, answer: Admitted | Redundant | Held, operation: Operation, vm: str, *, wait: bool
) -> None:
    """Print a disposition, unless `--json` prints the document."""
    if invocation.json:
        return
    what = f"{humanize(operation)} of {vm}"
    if isinstance(answer, Redundant):
        _print_redundant(invocation, answer, what)
    elif isinstance(answer, Held):
        _print_held(invocation, answer, what)
    elif answer.request.status is Status.SUCCEEDED and not wait:
        report(invocation, answer.request, vm)
    elif not wait or answer.supersedes or answer.cancels or answer.loses or answer.waits_for_host:
        _print_admitted(invocation, answer, what)
    if not wait and not isinstance(answer, Redundant) and answer.password is not None:
        invocation.echo(f"  Once that has succeeded, the password is: {answer.password}")


def _print_redundant(invocation: Invocation, answer: Redundant, what: str) -> None:
    invocation.echo(click.style("Redundant", fg="yellow", bold=True) + f": {what} ({answer.reason})")
    if answer.because:
        invocation.echo(f"  {answer.because}")
    if answer.request is not None:
        invocation.echo(f"  Outstanding: {humanize(answer.request.operation)} {answer.request.id}")
    if answer.allowed_at is not None:
        now = invocation.client.now
        moment = clock(answer.allowed_at, now)
        invocation.echo(f"  A retry from {moment} would take over{if_silent(answer, now)}.")


def _print_held(invocation: Invocation, answer: Held, what: str) -> None:
    now = invocation.client.now
    head = click.style("Held", fg="yellow", bold=True)
    invocation.echo(f"{head}: {what} ({answer.reason}), request {answer.request.id}")
    invocation.echo(f"  {answer.because or answer.detail}")
    if answer.remedy is not None:
        invocation.echo(f"  {answer.remedy}")
        invocation.echo(f"  They approve it with `interlock request approve {answer.request.id}`.")
    if answer.allowed_at is not None:
        held_for = if_silent(answer, now) or ", unless something changes before"
        invocation.echo(f"  It will be admitted at {clock(answer.allowed_at, now)}{held_for}.")
    until = f"  Held until {clock(answer.until_at, now)}"
    invocation.echo(f"{until}; `interlock request cancel {answer.request.id}` cancels it.")


def _print_admitted(invocation: Invocation, answer: Admitted, what: str) -> None:
    invocation.echo(click.style("Admitted", fg="green", bold=True) + f": {what}, request {answer.request.id}")
    if answer.supersedes:
        invocation.echo(f"  Takes over from: {', '.join(answer.supersedes)}")
    if answer.cancels:
        invocation.echo(f"  Cancels: {', '.join(answer.cancels)}")
    if answer.waits_for_host is not None:
        host = answer.waits_for_host
        invocation.echo(
            f"  The host {host} does not respond: the request waits until it is back (`interlock host show {host}`)."
        )
    for loss in answer.loses:
        invocation.echo(f"  {loss}")
