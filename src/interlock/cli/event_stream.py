"""Events as they happen, over server-sent events, without losing one when the connection breaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import msgspec

from interlock.api.schemas import Event
from interlock.cli.client import Client
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure

EVENTS: Final = "/v1/events"
SILENCE_S: Final = 60.0
"""After so long without a word the connection counts as lost; servers say something more often than that."""
PATIENCE_S: Final = 120.0
"""How long a server may be gone before following it is given up."""
_PAUSE_S: Final = 1.0


class Message(NamedTuple):
    """One server-sent event."""

    id: str | None
    data: str


def messages(lines: Iterable[str]) -> Iterator[Message]:
    """The messages in the lines of an event stream, as the HTML standard has them; comments are passed over."""
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
    client: Client, after: int | None, lost: Callable[[str], None], instance_id: str | None = None
) -> Iterator[tuple[Event, str]]:
    """Events with a greater sequence than `after` (None: those from now on), each with its JSON, for ever.

    `lost` is told when the connection was lost and when it is there again. After that the events go on where they
    stopped, so none is missed and none told twice.

    Raises:
        Failure: not authorised, or the server stayed away.
    """
    away_since: float | None = None
    while True:
        try:
            headers = {"Accept": "text/event-stream"}
            if after is not None:
                headers["Last-Event-ID"] = str(after)
            stream = client.stream(EVENTS, {"instance": instance_id}, headers, SILENCE_S)
            if away_since is not None:
                lost("connected again")
                away_since = None
            for message in messages(stream.lines()):
                event = msgspec.json.decode(message.data, type=Event)
                after = event.sequence
                yield event, message.data
        except Failure as failure:
            came_back_late = away_since is not None and time.monotonic() - away_since > PATIENCE_S
            if failure.code is not ExitCode.NOT_REACHABLE or away_since is None or came_back_late:
                raise
        if away_since is None:
            away_since = time.monotonic()
            lost("the connection was lost; waiting for the server to come back")
        client.forget()
        time.sleep(_PAUSE_S)
