"""Waiting for a request to end, also across a restart of the server."""

from __future__ import annotations

import time
from typing import Final

import click

from interlock.api.schemas.responses import Instance, Request
from interlock.cli.client.http_client import Query, Reply
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.context import Invocation
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import clock, duration, humanize, seconds_of, size
from interlock.cli.output.progress import LiveLine, Progress
from interlock.core.operations import Operation
from interlock.core.records import ENDS, Status

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
