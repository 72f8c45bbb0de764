"""Looking on: `vm events`, `watch`, and the log of `vm console`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import click

from interlock.api.schemas import Event, EventList, Instance, Request
from interlock.cli.event_stream import follow
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.naming import INSTANCES, path_of, suggesting, vm_argument
from interlock.cli.vm import vm_commands
from interlock.cli.waiting import wait_for_end
from interlock.cli.wording import clock, printable, spoken

_PAGE: Final = 500
CONSOLE_BYTES_MAX: Final = 256 * 1024
"""How much of the end of a console is asked for."""
_CONSOLE_PAUSE_S: Final = 0.5
_OVERLAP_BYTES: Final = 1024
_NO_CONSOLE: Final = "has no console yet"
_ID_SHOWN: Final = 8
_QUIET: Final = frozenset({"view", "fence", "current_fence", "host"})
"""What is recorded for programs, and tells a reader nothing."""
_COLOURS: Final = {
    "denied": "red",
    "failed": "red",
    "crashed": "red",
    "vanished": "red",
    "superseded": "yellow",
    "cancelled": "yellow",
    "redundant": "yellow",
    "succeeded": "green",
}


@vm_commands.command()
@vm_argument
@click.option("--follow", "-f", "following", is_flag=True, help="Go on with new events as they happen.")
@json_option
@needs_invocation
def events(invocation: Invocation, *, vm: str, following: bool) -> None:
    """Show what has happened to a VM: requests, answers, phases, guest events."""
    history, documents = read_history(invocation, vm)
    if invocation.json and not following:
        invocation.emit({"items": documents})
        return
    for event, document in zip(history, documents, strict=True):
        _tell(invocation, event, document, None)
    if not following:
        return
    with suggesting(invocation.client, INSTANCES, vm):
        instance = invocation.client.get(path_of(INSTANCES, vm)).decode(Instance)
    after = history[-1].sequence if history else 0
    for event, text in follow(invocation.client, after, _told(invocation), instance.id):
        _tell(invocation, event, text, None)


@vm_commands.command("watch")
@vm_argument
@needs_invocation
def watch_vm(invocation: Invocation, *, vm: str) -> None:
    """Show how what is outstanding for a VM goes on, until it has ended."""
    following: Request | None = None
    while True:
        with suggesting(invocation.client, INSTANCES, vm):
            one = invocation.client.get(path_of(INSTANCES, vm)).decode(Instance)
        if not one.outstanding:
            break
        following = one.outstanding[0]
        wait_for_end(invocation, following, one.name)
    if following is None:
        invocation.say(f"Nothing is outstanding for {one.name}.", error=True)


def _told(invocation: Invocation) -> Callable[[str], None]:
    return lambda said: invocation.say(f"-- {said}", error=True)


def read_history(invocation: Invocation, vm: str) -> tuple[list[Event], list[Any]]:
    """All events of a VM, in order, and the same as the server wrote them. Raises `Failure`."""
    history: list[Event] = []
    documents: list[Any] = []
    after = 0
    while True:
        with suggesting(invocation.client, INSTANCES, vm):
            reply = invocation.client.get(path_of(INSTANCES, vm, "events"), {"after": after, "limit": _PAGE})
        page = reply.decode(EventList)
        if not page.items:
            return history, documents
        history += page.items
        documents += reply.decode(dict[str, Any])["items"]
        after = page.next_after


def _tell(invocation: Invocation, event: Event, document: Any, vm: str | None) -> None:
    if invocation.json:
        if isinstance(document, str):
            click.echo(document)
        else:
            invocation.emit(document)
    else:
        invocation.say(event_line(event, invocation.client.now, vm))


def event_line(event: Event, now: float | None, vm: str | None = None) -> str:
    """One event in one line: when, what, of which request, and what is known of it."""
    last = event.kind.rpartition(".")[2]
    kind = click.style(f"{event.kind:<20}", fg=_COLOURS.get(last))
    whose = f"{vm:<16}  " if vm is not None else ""
    request = (event.request or "")[-_ID_SHOWN:]
    return f"{clock(event.at, now)}  {whose}{kind}  {request:<{_ID_SHOWN}}  {event_facts(event)}".rstrip()


def event_facts(event: Event) -> str:
    """What an event knows, as words: the operation first, then `name=value`, without what is empty."""
    data = {name: value for name, value in event.data.items() if name not in _QUIET and value not in (None, [], {}, "")}
    words = []
    if "operation" in data:
        words.append(spoken(str(data.pop("operation"))))
    if event.kind == "instance.state":
        words.append(f"{data.pop('before', '?')} -> {data.pop('vm_state', '?')}")
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
@json_option
@needs_invocation
def watch(invocation: Invocation) -> None:
    """Show events as they happen, until Ctrl-C.

    A lost connection is taken up where it broke.
    """
    names: dict[str, str] = {}
    if not invocation.json:
        invocation.say("-- watching; Ctrl-C ends it", error=True)
    for event, text in follow(invocation.client, None, _told(invocation)):
        if event.kind == "instance.created":
            names[event.instance] = str(event.data.get("name", event.instance))
        elif event.instance not in names and not invocation.json:
            names[event.instance] = _name_of(invocation, event.instance)
        _tell(invocation, event, text, names.get(event.instance, event.instance))


def _name_of(invocation: Invocation, instance_id: str) -> str:
    return invocation.client.get(path_of(INSTANCES, instance_id)).decode(Instance).name


def print_console(invocation: Invocation, vm: str, *, following: bool) -> None:
    """Print what the guest has written on its serial console, and go on with it if `following`. Raises `Failure`."""
    seen = b""
    while True:
        text = console_text(invocation, vm)
        click.echo(since(seen, text), nl=False)
        seen = text
        if not following:
            return
        time.sleep(_CONSOLE_PAUSE_S)


def console_text(invocation: Invocation, vm: str) -> bytes:
    """The end of what the guest has written; empty if it has no console yet. Raises `Failure`."""
    try:
        with suggesting(invocation.client, INSTANCES, vm):
            return invocation.client.get(path_of(INSTANCES, vm, "console"), {"tail_bytes": CONSOLE_BYTES_MAX}).body
    except Failure as failure:
        if failure.code is ExitCode.NOT_FOUND and _NO_CONSOLE in failure.message:
            return b""
        raise


def since(seen: bytes, text: bytes) -> bytes:
    """What of the end of a console is new to somebody who has seen an earlier end of it."""
    if text.startswith(seen):
        return text[len(seen) :]
    last = seen[-_OVERLAP_BYTES:]
    found = text.rfind(last)
    return text if found < 0 else text[found + len(last) :]
