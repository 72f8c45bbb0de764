"""Following a request to its end, also across a restart of the server."""

from __future__ import annotations

import time
from typing import Final

import click

from interlock.api.schemas import Instance, Request
from interlock.cli.client import Query, Reply
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation
from interlock.cli.live_line import LiveLine, Standing, progress_stream
from interlock.cli.naming import INSTANCES, path_of
from interlock.cli.wording import clock, duration, printable, seconds_of, size, spoken
from interlock.core.records import ENDS, Status

REQUESTS: Final = "/v1/requests"
_WAIT_S: Final = 20
_PAUSES_S: Final = (0.2, 0.5, 1.0, 2.0)
_PERCENT: Final = 100


def wait_for_end(invocation: Invocation, request: Request, name: str) -> None:
    """Show how the request goes on until it has ended, and print how it ended. Ctrl-C ends the showing only.

    Raises:
        Failure: it ended other than well, or the server stayed away.
    """
    now = invocation.client.now
    since_s = 0 if now is None else max(0, now - seconds_of(request.admitted_at))
    stream = progress_stream(json=invocation.json)
    try:
        with LiveLine(stream, silent=invocation.json, plain=invocation.plain, since_s=since_s) as line:
            reply = _follow(invocation, request, name, line)
    except KeyboardInterrupt:
        if not invocation.json:
            _say_it_goes_on(invocation, request, name)
        raise
    ended = reply.decode(Request)
    if not invocation.answer(reply):
        report(invocation, ended, name)
    if ended.status is not Status.SUCCEEDED:
        raise Failure(ExitCode.ENDED_OTHERWISE, "", text="")


def _say_it_goes_on(invocation: Invocation, request: Request, name: str) -> None:
    invocation.say(f"\n{spoken(request.operation).capitalize()} of {name} goes on.", error=True)
    invocation.say(f"  Watch it:  interlock request show {request.id} --wait", error=True)
    invocation.say(f"  Cancel it: interlock request cancel {request.id}", error=True)


def _follow(invocation: Invocation, request: Request, name: str, line: LiveLine) -> Reply:
    client = invocation.client
    line.tell(describe(request, name), _standing(request, name))
    generation = 0
    away_since: float | None = None
    attempt = 0
    while True:
        try:
            reply = client.get(path_of(REQUESTS, request.id))
            latest = reply.decode(Request)
            if latest.status in ENDS:
                return reply
            line.tell(describe(latest, name), _standing(latest, name))
            query: Query | None = {"after_generation": generation, "wait": f"{_WAIT_S}s"} if generation else None
            instance = client.get(path_of(INSTANCES, request.instance), query, wait_s=_WAIT_S).decode(Instance)
        except Failure as failure:
            away_since = away_since if away_since is not None else time.monotonic()
            if not _may_come_back(failure) or time.monotonic() - away_since > invocation.patience_s:
                raise
            line.tell(f"{spoken(request.operation)} of {name}: the server is away; waiting for it to come back")
            client.forget()
            time.sleep(_PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])
            attempt += 1
        else:
            generation = instance.generation
            away_since, attempt = None, 0


def _may_come_back(failure: Failure) -> bool:
    return failure.code is ExitCode.NOT_REACHABLE or failure.document.get("status") in {502, 503, 504}


def describe(request: Request, name: str) -> str:
    """Where a request stands, in one line."""
    what = f"{spoken(request.operation)} of {name}: "
    match request.status:
        case Status.HELD:
            until = f" until {clock(request.held_until_at)}" if request.held_until_at is not None else ""
            return what + f"held{until}; the policy does not admit it yet"
        case Status.QUEUED:
            return what + "queued"
        case Status.UNKNOWN:
            return what + "no answer from the hypervisor; looking what became of it"
        case Status.IN_FLIGHT:
            text = what + spoken(request.phase or "in flight")
            if request.progress is not None:
                text += f" {round(request.progress * _PERCENT)} %"
            return text + (f" ({printable(request.detail)})" if request.detail else "")
        case status:
            return what + status.value


def progress_text(request: Request) -> str | None:
    """How far a phase is: `42 %, 1.2 GiB of 2.8 GiB, 31 MiB/s`; None where it does not tell."""
    parts = [] if request.progress is None else [f"{round(request.progress * _PERCENT)} %"]
    if request.bytes_done is not None:
        parts.append(size(request.bytes_done) + (f" of {size(request.bytes_total)}" if request.bytes_total else ""))
    if request.bytes_per_s and request.status not in ENDS:
        parts.append(f"{size(request.bytes_per_s)}/s")
    return ", ".join(parts) or None


def _standing(request: Request, name: str) -> Standing | None:
    """The same for a terminal, which has a bar for how far it is, and little room: what is said of a phase replaces it.

    None where a line says all of it.
    """
    if request.status is not Status.IN_FLIGHT:
        return None
    doing = printable(request.detail) if request.detail else spoken(request.phase or "in flight")
    return Standing(
        f"{spoken(request.operation)} of {name}: {doing}",
        request.progress,
        request.bytes_done,
        request.bytes_total,
        request.bytes_per_s,
    )


def report(invocation: Invocation, ended: Request, name: str) -> None:
    """Print how a request ended."""
    what = f"{spoken(ended.operation)} of {name}"
    took = f" in {duration(ended.duration_s)}" if ended.duration_s else ""
    if ended.status is Status.SUCCEEDED:
        invocation.say(click.style("Done", fg="green", bold=True) + f": {what}{took}")
        return
    head = click.style(ended.status.value.capitalize(), fg="red", bold=True)
    text = f"{head}: {what}{took}" + (f" ({ended.reason})" if ended.reason else "")
    if ended.message:
        text += f"\n  {printable(ended.message)}"
    invocation.say(text, error=True)
