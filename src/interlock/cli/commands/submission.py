"""Submitting operations, printing the gate's disposition, and waiting for the end of requests."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

from interlock.api.schemas.responses import Admitted, Held, Instance, Redundant, Request
from interlock.cli.client.http_client import Query, Reply
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import clock, duration, humanize, seconds_of, size
from interlock.cli.output.progress import LiveLine, Progress
from interlock.cli.output.refusals import as_refusal, if_silent, refusal_text
from interlock.core.operations import Operation
from interlock.core.records import ENDS, Status

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


REQUESTS: Final = "/v1/requests"
_WAIT_S: Final = 20
_PAUSES_S: Final = (0.2, 0.5, 1.0, 2.0)
_STILL_S: Final = 15.0
"""After this time without a change a hint is shown."""
_PERCENT: Final = 100


def wait_for_end(invocation: Invocation, request: Request, name: str) -> None:
    """Show a request's progress until it ends, and print the result. Ctrl-C ends only the wait.

    Raises:
        Failure: not succeeded, or reconnecting timed out.
    """
    now = invocation.client.now
    since_s = 0 if now is None else max(0, now - seconds_of(request.admitted_at))
    try:
        with invocation.progress(since_s) as line:
            reply = _follow(invocation, request, name, line)
    except (KeyboardInterrupt, Failure) as ended_early:
        lost = isinstance(ended_early, KeyboardInterrupt) or _may_come_back(ended_early)
        if lost and not invocation.json:
            _print_still_running(invocation, request, name)
        raise
    ended = reply.decode(Request)
    if not invocation.print_json(reply):
        report(invocation, ended, name)
    if ended.status is not Status.SUCCEEDED:
        raise Failure(ExitCode.ENDED_OTHERWISE, "", text="")


def _print_still_running(invocation: Invocation, request: Request, name: str) -> None:
    invocation.echo(f"\n{humanize(request.operation).capitalize()} of {name} continues.", error=True)
    invocation.echo(f"  Watch it:  interlock request show {request.id} --wait", error=True)
    invocation.echo(f"  Cancel it: interlock request cancel {request.id}", error=True)


def _follow(invocation: Invocation, request: Request, name: str, line: LiveLine) -> Reply:
    client = invocation.client
    line.update(describe(request, name), _progress_of(request, name))
    generation = 0
    disconnected_since: float | None = None
    attempt = 0
    moves = _StallHint()
    while True:
        try:
            reply = client.get(path_of(REQUESTS, request.id))
            latest = reply.decode(Request)
            if latest.status in ENDS:
                return reply
            hint = moves.hint(latest, name)
            line.update(describe(latest, name) + hint, None if hint else _progress_of(latest, name))
            query: Query | None = {"after_generation": generation, "wait": f"{_WAIT_S}s"} if generation else None
            instance = client.get(path_of(INSTANCES, request.instance), query, wait_s=_WAIT_S).decode(Instance)
        except Failure as failure:
            disconnected_since = disconnected_since if disconnected_since is not None else time.monotonic()
            if not _may_come_back(failure) or time.monotonic() - disconnected_since > invocation.reconnect_timeout_s:
                raise
            line.update(f"{humanize(request.operation)} of {name}: connection lost; reconnecting")
            client.reset()
            time.sleep(_PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])
            attempt += 1
        else:
            generation = instance.generation
            disconnected_since, attempt = None, 0


class _StallHint:
    """Detects a request without progress, and suggests what to do."""

    def __init__(self) -> None:
        self._last: object = None
        self._since = time.monotonic()

    def hint(self, request: Request, name: str) -> str:
        """Return a hint after `_STILL_S` without a change; else an empty text."""
        seen = (request.status, request.phase, request.progress, request.bytes_done, request.detail)
        if seen != self._last:
            self._last, self._since = seen, time.monotonic()
        if time.monotonic() - self._since < _STILL_S or request.status is Status.HELD:
            return ""
        if request.status is Status.QUEUED:
            return (
                f". No progress: `interlock vm show {name}` shows what it waits for, `interlock stuck` what can be done"
            )
        return (
            f". No progress: `interlock why {name}` shows what can take over and when; "
            f"`interlock vm stop {name} --hard` ends the process of the VM"
        )


def _may_come_back(failure: Failure) -> bool:
    return failure.code is ExitCode.NOT_REACHABLE or failure.document.get("status") in {502, 503, 504}


def describe(request: Request, name: str) -> str:
    """Describe a request in one line."""
    what = f"{humanize(request.operation)} of {name}: "
    match request.status:
        case Status.HELD:
            until = f" until {clock(request.held_until_at)}" if request.held_until_at is not None else ""
            return what + f"held{until}; the policy does not admit it yet"
        case Status.QUEUED:
            return what + "queued"
        case Status.UNKNOWN:
            return what + "no response from the hypervisor; inspecting it"
        case Status.IN_FLIGHT:
            text = what + humanize(request.phase or "in flight")
            if request.progress is not None:
                text += f" {round(request.progress * _PERCENT)} %"
            return text + (f" ({request.detail})" if request.detail else "")
        case status:
            return what + status.value


def progress_text(request: Request) -> str | None:
    """Return a phase's progress, `42 %, 1.2 GiB of 2.8 GiB, 31 MiB/s`; None if unknown."""
    parts = [] if request.progress is None else [f"{round(request.progress * _PERCENT)} %"]
    if request.bytes_done is not None:
        parts.append(size(request.bytes_done) + (f" of {size(request.bytes_total)}" if request.bytes_total else ""))
    if request.bytes_per_s and request.status not in ENDS:
        parts.append(f"{size(request.bytes_per_s)}/s")
    return ", ".join(parts) or None


def _progress_of(request: Request, name: str) -> Progress | None:
    """Return the progress for a terminal's bar; None if `describe` is enough."""
    if request.status is not Status.IN_FLIGHT:
        return None
    doing = request.detail or humanize(request.phase or "in flight")
    return Progress(
        f"{humanize(request.operation)} of {name}: {doing}",
        request.progress,
        request.bytes_done,
        request.bytes_total,
        request.bytes_per_s,
    )


def report(invocation: Invocation, ended: Request, name: str) -> None:
    """Print the result of a request."""
    what = f"{humanize(ended.operation)} of {name}"
    if ended.operation is Operation.RENAME:
        what += f" to {ended.parameters['name']}"
    took = f" in {duration(ended.duration_s)}" if ended.duration_s else ""
    if ended.status is Status.SUCCEEDED:
        invocation.echo(click.style("Done", fg="green", bold=True) + f": {what}{took}")
        return
    head = click.style(ended.status.value.capitalize(), fg="red", bold=True)
    text = f"{head}: {what}{took}" + (f" ({ended.reason})" if ended.reason else "")
    if ended.message:
        text += f"\n  {ended.message}"
    invocation.echo(text, error=True)
