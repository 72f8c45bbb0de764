"""Client of the server-sent event stream, which reconnects without losing an event."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import msgspec

from interlock.api.schemas.responses import Event
from interlock.cli.client.http_client import Client
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import escape_all

EVENTS: Final = "/v1/events"
SILENCE_S: Final = 60.0
"""After this time without data the connection counts as lost; servers send heartbeats more often."""
RECONNECT_TIMEOUT_S: Final = 120.0
"""How long to try to reconnect."""
_PAUSE_S: Final = 1.0


class Message(NamedTuple):
    """One server-sent event."""

    id: str | None
    data: str


def messages(lines: Iterable[str]) -> Iterator[Message]:
    """Parse the lines of an event stream (HTML standard); comments are ignored."""
    last_id: str | None = None
    data: list[str] = []
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "" if not line:
                if data:
                    yield Message(last_id, "\n".join(data))
                data = []
            case "data":
                data.append(value)
            case "id":
                last_id = value
            case _:
                pass


def follow(
    client: Client, after: int | None, on_status: Callable[[str], None], instance_id: str | None = None
) -> Iterator[tuple[Event, str]]:
    """Yield events with a greater sequence than `after` (None: new events), each with its JSON, without end.

    `on_status` is called when the connection is lost and when it is restored; no event is lost or repeated.

    Raises:
        Failure: not authorised, or reconnecting timed out.
    """
    disconnected_since: float | None = None
    while True:
        try:
            headers = {"Accept": "text/event-stream"}
            if after is not None:
                headers["Last-Event-ID"] = str(after)
            stream = client.stream(EVENTS, {"instance": instance_id}, headers, SILENCE_S)
            if disconnected_since is not None:
                on_status("reconnected")
                disconnected_since = None
            for message in messages(stream.lines()):
                event = msgspec.convert(escape_all(msgspec.json.decode(message.data)), Event)
                after = event.sequence
                yield event, message.data
        except Failure as failure:
            timed_out = disconnected_since is not None and time.monotonic() - disconnected_since > RECONNECT_TIMEOUT_S
            if failure.code is not ExitCode.NOT_REACHABLE or disconnected_since is None or timed_out:
                raise
        if disconnected_since is None:
            disconnected_since = time.monotonic()
            on_status("connection lost; reconnecting")
        client.reset()
        time.sleep(_PAUSE_S)
