"""The declaration of a route, the services that endpoints call, and the parameters that routes share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from interlock.api.metrics import Metrics
from interlock.config import Config
from interlock.ports.hosts import NetworkAbility, Protection
from interlock.service.audit import AuditLog
from interlock.service.auth import Authenticator, Caller
from interlock.service.capacity import Capacity
from interlock.service.clock_watch import ClockWatch
from interlock.service.console_service import ConsoleService
from interlock.service.disk_space import DiskSpace
from interlock.service.dumps import Dumps
from interlock.service.event_feed import EventFeed
from interlock.service.host_enrolment import HostEnrolment
from interlock.service.host_moves import HostMoves
from interlock.service.hosts import HostService
from interlock.service.image_fetches import ImageFetches
from interlock.service.instances import Instances
from interlock.service.inventory import Inventory
from interlock.service.load_limits import LoadLimits
from interlock.service.networks import Networks
from interlock.service.policies import Policies
from interlock.service.projects import Projects
from interlock.service.readiness import Readiness
from interlock.service.tokens import Tokens


class ApiParts(msgspec.Struct, frozen=True, kw_only=True):
    """The services that endpoints call."""

    instances: Instances
    inventory: Inventory
    image_fetches: ImageFetches
    capacity: Capacity
    accelerator: Callable[[], str | None]
    """The accelerator of this host's QEMU, `tcg` or `kvm`; None for the simulated hypervisor."""
    protections: Callable[[], tuple[Protection, ...]]
    """What confines the guests of this host; empty for the simulated hypervisor."""
    host_networks: Callable[[], tuple[NetworkAbility, ...]]
    """The kinds of network of this host."""
    consoles: ConsoleService
    dumps: Dumps
    policies: Policies
    audit: AuditLog
    callers: Authenticator
    tokens: Tokens
    projects: Projects
    networks: Networks
    hosts: HostService
    enrolment: HostEnrolment
    moves: HostMoves
    config: Config
    accepting: Callable[[], bool]
    """Whether the server accepts requests and agents."""
    disk_space: DiskSpace
    readiness: Readiness
    clock: ClockWatch
    version: str
    metrics: Metrics
    feed: EventFeed
    load: LoadLimits


Result = Response | msgspec.Struct | None
"""What an endpoint returns: a response, or the JSON body or nothing with the route's only success status."""
Endpoint = Callable[[ApiParts, Caller, Request], Awaitable[Result]]
EndpointT = TypeVar("EndpointT", bound=Callable[..., Awaitable[Result]])


class Parameter(msgspec.Struct, frozen=True):
    """A documented query parameter or header."""

    name: str
    description: str
    schema: Mapping[str, Any] = msgspec.field(default_factory=lambda: {"type": "string"})
    where: str = "query"


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path: its endpoint and its documentation."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    responses: Mapping[int, Any]
    """Body of each success status: a wire type, a media type, or None for no body."""
    body: Any = None
    """Type of the JSON body, or None."""
    text: str | None = None
    """A second media type of the body, sent as text, or None."""
    form: Mapping[str, Any] | None = None
    """JSON Schema of the multipart form, or None."""
    parameters: tuple[Parameter, ...] = ()
    problems: tuple[int, ...] = ()
    """Error statuses in addition to those that any path can return, and to 404 for one with a parameter."""
    can_be_denied: bool = False
    """Whether the gate can deny it."""
    audited: str = ""
    """The action that the audit log records, such as `token.create`; empty for what it does not."""
    error_422: Any = None
    """Wire type of a 422 other than `Problem`, or None."""
    tag: str

    @property
    def query_names(self) -> tuple[str, ...]:
        """Names of the query parameters; others are rejected."""
        return tuple(parameter.name for parameter in self.parameters if parameter.where == "query")


class Routes(list[Route]):
    """The routes of one resource, in the order of the OpenAPI document; each is declared at its endpoint."""

    def __init__(self, tag: str) -> None:
        super().__init__()
        self._tag = tag

    def add(
        self, line: str, summary: str, responses: Mapping[int, Any], **facts: Any
    ) -> Callable[[EndpointT], EndpointT]:
        """Declare a route. `line` is its method and path; `facts` are other fields of `Route`."""
        method, _, path = line.partition(" ")

        def declare(endpoint: EndpointT) -> EndpointT:
            self.append(
                Route(
                    method=method,
                    path=path,
                    endpoint=endpoint,
                    summary=summary,
                    responses=responses,
                    tag=self._tag,
                    **facts,
                )
            )
            return endpoint

        return declare


_ENCODE: Final = msgspec.json.Encoder().encode


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(_ENCODE(value), status, headers, "application/json")


def etag(generation: int) -> dict[str, str]:
    return {"ETag": f'"{generation}"'}


LIMIT: Final = Parameter(
    "limit", "Maximum number of items.", {"type": "integer", "minimum": 1, "maximum": 500, "default": 100}
)
CURSOR: Final = Parameter("cursor", "`next_cursor` of the previous page.")
WAIT: Final = Parameter("wait", "How long to hold the request open, such as `30s`; at most 120s.")
KEY: Final = Parameter(
    "Idempotency-Key", "A retry with the same key returns the response of the first request.", where="header"
)
PREFER: Final = Parameter("Prefer", "`wait=20` waits up to 20 seconds for the admitted request to end.", where="header")
IF_MATCH: Final = Parameter("If-Match", "The expected ETag of the instance; 412 if it has changed.", where="header")
