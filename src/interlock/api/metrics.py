"""Prometheus metrics. Counters are updated from committed events, outside the gate's path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from interlock.core.policy_switches import PolicySwitch
from interlock.core.records import ENDS, Event
from interlock.ports import HostState
from interlock.service.capacity import Amounts
from interlock.service.disk_space import SpaceLeft
from interlock.service.hosts import HostView

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 180, 600, 1800, 7200)
_DISPOSITIONS: Final = {f"request.{name}": name for name in ("admitted", "redundant", "denied")}
_ENDS: Final = {f"request.{status.value}": status.value for status in ENDS}

_HOST_GAUGES: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    ("state", "1 for the current state of a host other than the server's own.", ("state",)),
    ("connected", "1 while the host's agent is connected.", ()),
    ("last_seen_seconds", "Time since the last contact with the host's agent.", ()),
    ("lease_left_seconds", "Time until the host is fenced unless its agent renews the lease.", ()),
    ("instances", "Instances recorded on the host.", ()),
    ("instances_to_evacuate", "Instances recorded on the host, if it is fenced.", ()),
    ("capacity", "Capacity of the host: MiB of memory and disk, and vCPUs.", ("what", "of")),
)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "interlock"}
        submissions = Counter(
            "submissions", "Submitted operations by disposition.", ["operation", "disposition"], **common
        )
        ended = Counter("requests_ended", "Ended requests by status.", ["operation", "status"], **common)
        waited = Histogram(
            "request_wait_seconds", "Time from admission to start.", ["operation"], buckets=_SECONDS, **common
        )
        served = Histogram(
            "request_service_seconds", "Time from start to end.", ["operation"], buckets=_SECONDS, **common
        )
        # To find the one with those labels takes longer than to count.
        self._submissions: Callable[..., Counter] = cache(submissions.labels)
        self._ended: Callable[..., Counter] = cache(ended.labels)
        self._waited: Callable[..., Histogram] = cache(waited.labels)
        self._served: Callable[..., Histogram] = cache(served.labels)
        instances = Gauge("instances", "Instances that are not deleted.", ["vm_state"], **common)
        self._in_state: Callable[..., Gauge] = cache(instances.labels)
        self._outstanding = Gauge("requests_outstanding", "Requests that have not ended.", **common)
        self._fenced = Counter("fenced_reports", "Reports of fenced workers, rejected.", **common)
        self._guest = Counter("guest_events", "Events of guests, such as a shutdown or a crash.", ["kind"], **common)
        self._stuck = Gauge(
            "instances_stuck", "Instances with an operation that a takeover could replace now.", **common
        )
        self._troubled = Gauge("guests_in_trouble", "Running guests in trouble.", ["trouble"], **common)
        self._refused = Gauge(
            "policy_configured_refused", "1 while the configured policy is rejected and another is in force.", **common
        )
        self._policy = Gauge("policy_info", "The policy in force: always 1.", ["name", "digest"], **common)
        self._host = Gauge(
            "host_capacity", "Capacity of this host: MiB of memory and disk, and vCPUs.", ["what", "of"], **common
        )
        self._free_bytes = Gauge("data_folder_free_bytes", "Free space of the data folder's file system.", **common)
        self._low = Gauge("data_folder_low", "1 while the free space is less than disk_low_mib.", **common)
        self._full = Gauge(
            "store_full", "1 while the disk is full, so that only requests that free space are accepted.", **common
        )
        self._hosts = {
            name: Gauge(f"other_host_{name}", help_text, ["host", *labels], **common)
            for name, help_text, labels in _HOST_GAUGES
        }
        self._clock_offset = Gauge(
            "clock_offset_seconds", "Offset of the wall clock to the clock that measures ages.", **common
        )
        self._clock_jumps = Gauge("clock_jumps", "Jumps of the wall clock since the start.", ["way"], **common)
        self._clock_cautious = Gauge(
            "clock_cautious", "1 while irreversible scheduled actions are suspended after a forward jump.", **common
        )
        refused = Counter("http_refused", "HTTP requests and connections refused by a limit.", ["problem"], **common)
        self.count_refusal: Callable[[str], None] = lambda problem: refused.labels(problem).inc()
        """Count a refusal by the name of its problem. May be called from any thread."""
        self._begun_ms: dict[str, int] = {}

    def begin(self, states: dict[str, int], outstanding: int) -> None:
        """Set the initial counts when the server starts."""
        for state, count in states.items():
            self._in_state(state).set(count)
        self._outstanding.set(outstanding)

    def set_refused_policy(self, *, refused: bool) -> None:
        """Set whether the configured policy is rejected."""
        self._refused.set(1 if refused else 0)

    def set_policy(self, switch: PolicySwitch) -> None:
        """Set the policy in force."""
        self._policy.clear()
        self._policy.labels(switch.name, switch.digest).set(1)

    def set_stuck(self, count: int) -> None:
        """Set the number of stuck instances: time alone makes one stuck, so there is no event to count."""
        self._stuck.set(count)

    def set_troubled(self, counts: Mapping[str, int]) -> None:
        """Set the number of guests by trouble."""
        for trouble, count in counts.items():
            self._troubled.labels(trouble).set(count)

    def set_space(self, left: SpaceLeft) -> None:
        """Set the free space of the data folder."""
        self._free_bytes.set(left.free_bytes)
        self._low.set(1 if left.low else 0)
        self._full.set(1 if left.full else 0)

    def set_clock(self, offset_s: float, jumps: Mapping[str, int], *, cautious: bool) -> None:
        """Set the state of the wall clock relative to the store's clock."""
        self._clock_offset.set(offset_s)
        for way, count in jumps.items():
            self._clock_jumps.labels(way).set(count)
        self._clock_cautious.set(1 if cautious else 0)

    def set_host(self, amounts: Mapping[str, Amounts]) -> None:
        """Set the capacity of this host: `total`, `promised` and `free`; unlimited resources have no sample."""
        for of, amount in amounts.items():
            for what, value in msgspec.structs.asdict(amount).items():
                if value is not None:
                    self._host.labels(what, of).set(value)

    def set_hosts(self, hosts: Sequence[HostView], now_ms: int) -> None:
        """Set the gauges of the other hosts, and remove those of deleted hosts."""
        for gauge in self._hosts.values():
            gauge.clear()
        for seen in hosts:
            name, fenced = seen.host.name, seen.host.state is HostState.FENCED
            for state in HostState:
                self._hosts["state"].labels(name, state.value).set(seen.condition.state is state)
            self._hosts["connected"].labels(name).set(seen.linked)
            self._hosts["last_seen_seconds"].labels(name).set(max(0, now_ms - seen.last_seen_at_ms) / 1000)
            if seen.lease_left_ms is not None:
                self._hosts["lease_left_seconds"].labels(name).set(seen.lease_left_ms / 1000)
            self._hosts["instances"].labels(name).set(seen.instances)
            self._hosts["instances_to_evacuate"].labels(name).set(seen.instances if fenced else 0)
            room = seen.room
            for of, amount in (("total", room.total), ("promised", room.claimed), ("free", room.free)):
                for what, value in msgspec.structs.asdict(amount).items():
                    if value is not None:
                        self._hosts["capacity"].labels(name, what, of).set(value)

    def on_events(self, events: Sequence[Event]) -> None:
        """Count committed events. Listener of the store."""
        for event in events:
            kind = event.kind
            if kind in _DISPOSITIONS:
                self._submissions(event.data["operation"], _DISPOSITIONS[kind]).inc()
                if kind == "request.admitted":
                    self._begin(event)
            elif kind in _ENDS:
                self._end(event, _ENDS[kind])
            elif kind == "request.taken":
                self._take(event)
            elif kind == "instance.state":
                self._move(event.data["before"], event.data["vm_state"])
            elif kind == "instance.created":
                self._in_state(event.data["vm_state"]).inc()
            elif kind == "request.fenced":
                self._fenced.inc()
            elif kind.startswith("guest."):
                self._guest.labels(kind.removeprefix("guest.")).inc()

    def _begin(self, event: Event) -> None:
        self._outstanding.inc()
        if event.request_id is not None:
            self._begun_ms[event.request_id] = event.at_ms

    def _take(self, event: Event) -> None:
        admitted_ms = self._begun_ms.get(event.request_id or "")
        if admitted_ms is not None:
            self._waited(event.data["operation"]).observe((event.at_ms - admitted_ms) / 1000)
            self._begun_ms[event.request_id or ""] = event.at_ms

    def _end(self, event: Event, status: str) -> None:
        operation = event.data["operation"]
        self._ended(operation, status).inc()
        self._outstanding.dec()
        taken_ms = self._begun_ms.pop(event.request_id or "", None)
        if taken_ms is not None:
            self._served(operation).observe((event.at_ms - taken_ms) / 1000)

    def _move(self, before: str, after: str) -> None:
        self._in_state(before).dec()
        if after != "deleted":
            self._in_state(after).inc()

    def exposition(self) -> bytes:
        """Return all metrics in the text format."""
        return generate_latest(self.registry)
