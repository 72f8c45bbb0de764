"""`interlock watch`, `vm watch` and `vm events`, and the log of `vm console`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import click

from interlock.api.schemas.responses import Event, EventList, Instance, Request
from interlock.cli.client.event_stream import follow
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.commands.submission import wait_for_end
from interlock.cli.commands.vm import vm_commands
from interlock.cli.completion import vm_argument
from interlock.cli.context import Invocation, needs_invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import clock, for_terminal, humanize, printable

_PAGE: Final = 500
CONSOLE_BYTES_MAX: Final = 256 * 1024
"""How much of the end of a console's log is read."""
_CONSOLE_PAUSE_S: Final = 0.5
_OVERLAP_BYTES: Final = 1024
_NO_CONSOLE: Final = "has no console yet"
_ID_SHOWN: Final = 8
_QUIET: Final = frozenset({"view", "fence", "current_fence", "host"})
"""Fields of events that are not printed."""
_COLOURS: Final = {
    "denied": "red",
    "failed": "red",
    "crashed": "red",
    "vanished": "red",
    "lease_ended": "red",
    "superseded": "yellow",
    "cancelled": "yellow",
    "redundant": "yellow",
    "succeeded": "green",
}


@vm_commands.command()
@vm_argument
@click.option("--follow", "-f", "following", is_flag=True, help="Follow new events.")
@with_json
def events(invocation: Invocation, *, vm: str, following: bool) -> None:
    """Show the events of a VM: requests, dispositions, phases, guest events."""
    history, documents = read_history(invocation, vm)
    if invocation.json and not following:
        invocation.emit({"items": documents})
        return
    for event, document in zip(history, documents, strict=True):
        _print_event(invocation, event, document, None)
    if not following:
        return
    instance = invocation.client.get(path_of(INSTANCES, vm)).decode(Instance)
    after = history[-1].sequence if history else 0
    for event, text in follow(invocation.client, after, _status_printer(invocation), instance.id):
        _print_event(invocation, event, text, None)


@vm_commands.command("watch")
@vm_argument
@needs_invocation
def watch_vm(invocation: Invocation, *, vm: str) -> None:
    """Show the progress of a VM's outstanding requests until they end."""
    following: Request | None = None
    reference = vm
    while True:
        one = invocation.client.get(path_of(INSTANCES, reference)).decode(Instance)
        reference = one.id  # its name may change meanwhile
        if not one.outstanding:
            break
        following = one.outstanding[0]
        wait_for_end(invocation, following, one.name)
    if following is None:
        invocation.echo(f"No outstanding requests for {one.name}.", error=True)


def _status_printer(invocation: Invocation) -> Callable[[str], None]:
    return lambda status: invocation.echo(f"-- {status}", error=True)


def read_history(invocation: Invocation, vm: str) -> tuple[list[Event], list[Any]]:
    """Return all events of a VM, in order, and the same as JSON documents. Raises `Failure`."""
    history: list[Event] = []
    documents: list[Any] = []
    after = 0
    while True:
        reply = invocation.client.get(path_of(INSTANCES, vm, "events"), {"after": after, "limit": _PAGE})
        page = reply.decode(EventList)
        if not page.items:
            return history, documents
        history += page.items
        documents += reply.document()["items"]
        after = page.next_after


def _print_event(invocation: Invocation, event: Event, document: Any, vm: str | None) -> None:
    if invocation.json:
        if isinstance(document, str):
            click.echo(document)
        else:
            invocation.emit(document)
    else:
        invocation.echo(event_line(event, invocation.client.now, vm))


def event_line(event: Event, now: float | None, vm: str | None = None) -> str:
    """Format an event in one line: time, VM, kind, request and data."""
    last = event.kind.rpartition(".")[2]
    kind = click.style(f"{event.kind:<20}", fg=_COLOURS.get(last))
    whose = f"{vm:<16}  " if vm is not None else ""
    request = (event.request or "")[-_ID_SHOWN:]
    return f"{clock(event.at, now)}  {whose}{kind}  {request:<{_ID_SHOWN}}  {event_facts(event, now)}".rstrip()


def event_facts(event: Event, now: float | None = None) -> str:
    """Format an event's data: the operation, then non-empty fields as `name=value`."""
    data = {name: value for name, value in event.data.items() if name not in _QUIET and value not in (None, [], {}, "")}
    words = []
    if "operation" in data:
        words.append(humanize(str(data.pop("operation"))))
    if event.kind == "instance.state":
        words.append(f"{data.pop('before', '?')} -> {data.pop('vm_state', '?')}")
    if isinstance(policy := data.get("policy"), dict):
        data["policy"] = policy.get("name")  # its digest is for programs: --json
    if isinstance(until := data.pop("until_ms", None), int):
        words.append(f"until={clock(datetime.fromtimestamp(until / 1000, UTC).isoformat(), now)}")
    words += [f"{name}={_value(value)}" for name, value in data.items()]
    return printable("  ".join(words))


def _value(value: Any) -> str:
    match value:
        case list():
            return ",".join(_value(one) for one in value)
        case dict():
            return ",".join(f"{name}:{_value(one)}" for name, one in value.items())
        case bool():
            return str(value).lower()
        case _:
            return str(value)


@click.command()
@with_json
def watch(invocation: Invocation) -> None:
    """Show events as they happen, until Ctrl-C.

    After a lost connection, it resumes without missing an event.
    """
    names: dict[str, str] = {}
    if not invocation.json:
        invocation.echo("-- watching; Ctrl-C ends it", error=True)
    for event, text in follow(invocation.client, None, _status_printer(invocation)):
        if event.kind in {"instance.created", "instance.renamed"}:
            names[event.instance] = str(event.data.get("name", event.instance))
        elif event.instance not in names and not invocation.json:
            names[event.instance] = _name_of(invocation, event.instance)
        _print_event(invocation, event, text, names.get(event.instance, event.instance))


def _name_of(invocation: Invocation, instance_id: str) -> str:
    return invocation.client.get(path_of(INSTANCES, instance_id)).decode(Instance).name


def print_console(invocation: Invocation, vm: str, *, following: bool, history: int | None = None) -> None:
    """Print the log of a guest's serial console, and follow it if `following`. Raises `Failure`.

    `history` is the number of lines printed first; None: all.
    """
    # Slow to import.
    from interlock.service.console_service import last_lines

    text = console_text(invocation, vm)
    new = text if history is None else last_lines(text, history)
    while True:
        click.echo(for_terminal(new) if sys.stdout.isatty() else new, nl=False)
        if not following:
            return
        time.sleep(_CONSOLE_PAUSE_S)
        seen, text = text, console_text(invocation, vm)
        new = since(seen, text)


def console_text(invocation: Invocation, vm: str) -> bytes:
    """Return the end of the console's log; empty if there is no console yet. Raises `Failure`."""
    try:
        return invocation.client.get(path_of(INSTANCES, vm, "console"), {"tail_bytes": CONSOLE_BYTES_MAX}).body
    except Failure as failure:
        if failure.code is ExitCode.NOT_FOUND and _NO_CONSOLE in failure.message:
            return b""
        raise


def since(seen: bytes, text: bytes) -> bytes:
    """Return the part of `text`, the end of a log, that follows `seen`, an earlier end of it."""
    if text.startswith(seen):
        return text[len(seen) :]
    last = seen[-_OVERLAP_BYTES:]
    found = text.rfind(last)
    return text if found < 0 else text[found + len(last) :]
