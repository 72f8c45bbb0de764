"""What an endpoint is, and what every endpoint is given. The endpoints are in the files named for their nouns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from interlock.api.metrics import Metrics
from interlock.config import Config
from interlock.service.callers import Caller, Callers
from interlock.service.capacity import Capacity
from interlock.service.dumps import Dumps
from interlock.service.hosts import HostVerbs
from interlock.service.instances import Instances
from interlock.service.inventory import Inventory
from interlock.service.policies import Policies
from interlock.service.seeing import Seeing


class ApiParts(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP door speaks to."""

    instances: Instances
    inventory: Inventory
    capacity: Capacity
    accelerator: Callable[[], str | None]
    """What runs this host's guests' processors; None where nothing does."""
    seeing: Seeing
    dumps: Dumps
    policies: Policies
    callers: Callers
    hosts: HostVerbs
    config: Config
    ready: Callable[[], bool]
    version: str
    metrics: Metrics


Endpoint = Callable[[ApiParts, Caller, Request], Awaitable[Response]]


class Parameter(msgspec.Struct, frozen=True):
    """A query parameter or header, as the documentation has it."""

    name: str
    description: str
    schema: Mapping[str, Any] = msgspec.field(default_factory=lambda: {"type": "string"})
    where: str = "query"


class Door(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path: what serves it, and what is documented of it."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    answers: Mapping[int, Any]
    """What a success answers, by status: a wire type, a media type's name, or None for no body."""
    body: Any = None
    """What it takes as JSON, or None."""
    text: str | None = None
    """Another media type of the body: it is taken as text too, or None."""
    form: Mapping[str, Any] | None = None
    """The JSON Schema of a multipart form that it takes, or None."""
    parameters: tuple[Parameter, ...] = ()
    problems: tuple[int, ...] = ()
    """Problems apart from those that any path can answer."""
    refuses: bool = False
    """Whether the gate can refuse it."""
    wrong: Any = None
    """What 422 answers beside a `Problem`: a wire type, or None."""
    tag: str


_ENCODE: Final = msgspec.json.Encoder().encode


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(_ENCODE(value), status, headers, "application/json")


def etag(generation: int) -> dict[str, str]:
    return {"ETag": f'"{generation}"'}


LIMIT: Final = Parameter(
    "limit", "How many at most.", {"type": "integer", "minimum": 1, "maximum": 500, "default": 100}
)
CURSOR: Final = Parameter("cursor", "`next_cursor` of the page before.")
WAIT: Final = Parameter("wait", "How long to hold the request open, such as `30s`; at most 120s.")
KEY: Final = Parameter(
    "Idempotency-Key", "Asking again with the same key answers what the first answered.", where="header"
)
PREFER: Final = Parameter("Prefer", "`wait=20` waits so many seconds for the end of what was admitted.", where="header")
IF_MATCH: Final = Parameter(
    "If-Match", "The ETag of the instance that was decided on; another answers 412.", where="header"
)
