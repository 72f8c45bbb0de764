"""What Prometheus is told. Counted from the events as they are committed, so that it costs the gate nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from interlock.core.policy_switches import PolicySwitch
from interlock.core.records import ENDS, Event
from interlock.service.capacity import Amounts

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 180, 600, 1800, 7200)
_DISPOSITIONS: Final = {f"request.{name}": name for name in ("admitted", "redundant", "denied")}
_ENDS: Final = {f"request.{status.value}": status.value for status in ENDS}


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "interlock"}
        self._submissions = Counter(
            "submissions", "What was asked for, and the gate's answer.", ["operation", "disposition"], **made
        )
        self._ended = Counter("requests_ended", "Requests that ended, and how.", ["operation", "status"], **made)
        self._waited = Histogram(
            "request_wait_seconds", "From admission until it was taken.", ["operation"], buckets=_SECONDS, **made
        )
        self._served = Histogram(
            "request_service_seconds", "From being taken to its end.", ["operation"], buckets=_SECONDS, **made
        )
        self._instances = Gauge("instances", "Instances that are not deleted.", ["vm_state"], **made)
        self._outstanding = Gauge("requests_outstanding", "Requests that have not ended.", **made)
        self._fenced = Counter("fenced_reports", "Reports of workers that had lost the right to act.", **made)
        self._guest = Counter("guest_events", "What guests did of their own accord.", ["kind"], **made)
        self._stuck = Gauge("instances_stuck", "Instances that something could take over now.", **made)
        self._refused = Gauge(
            "policy_configured_refused", "1 while the configured policy is refused, and another is in force.", **made
        )
        self._policy = Gauge("policy_info", "The policy in force: always 1.", ["name", "digest"], **made)
        self._host = Gauge(
            "host_capacity", "Of this host: MiB of memory and disk, and virtual processors.", ["what", "of"], **made
        )
        self._begun_ms: dict[str, int] = {}

    def begin(self, states: dict[str, int], outstanding: int) -> None:
        """Set what there is when the server starts."""
        for state, count in states.items():
            self._instances.labels(state).set(count)
        self._outstanding.set(outstanding)

    def note_refused_policy(self, *, refused: bool) -> None:
        """Set whether the policy that the configuration names is refused, so that another is in force."""
        self._refused.set(1 if refused else 0)

    def note_policy(self, switch: PolicySwitch) -> None:
        """Set which policy is in force."""
        self._policy.clear()
        self._policy.labels(switch.name, switch.digest).set(1)

    def note_stuck(self, count: int) -> None:
        """Set how many instances are stuck: that comes about by waiting, so no event tells it."""
        self._stuck.set(count)

    def note_host(self, amounts: Mapping[str, Amounts]) -> None:
        """Set how the host stands: `total`, `promised` and `free`; what has no limit has no figure."""
        for of, amount in amounts.items():
            for what, value in msgspec.structs.asdict(amount).items():
                if value is not None:
                    self._host.labels(what, of).set(value)

    def hear(self, events: Sequence[Event]) -> None:
        """Count events. A store's listener."""
        for event in events:
            kind = event.kind
            if kind in _DISPOSITIONS:
                self._submissions.labels(event.data["operation"], _DISPOSITIONS[kind]).inc()
                if kind == "request.admitted":
                    self._begin(event)
            elif kind in _ENDS:
                self._end(event, _ENDS[kind])
            elif kind == "request.taken":
                self._take(event)
            elif kind == "instance.state":
                self._move(event.data["before"], event.data["vm_state"])
            elif kind == "instance.created":
                self._instances.labels(event.data["vm_state"]).inc()
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
            self._waited.labels(event.data["operation"]).observe((event.at_ms - admitted_ms) / 1000)
            self._begun_ms[event.request_id or ""] = event.at_ms

    def _end(self, event: Event, status: str) -> None:
        operation = event.data["operation"]
        self._ended.labels(operation, status).inc()
        self._outstanding.dec()
        taken_ms = self._begun_ms.pop(event.request_id or "", None)
        if taken_ms is not None:
            self._served.labels(operation).observe((event.at_ms - taken_ms) / 1000)

    def _move(self, before: str, after: str) -> None:
        self._instances.labels(before).dec()
        if after != "deleted":
            self._instances.labels(after).inc()

    def exposition(self) -> bytes:
        """Everything, in the text format."""
        return generate_latest(self.registry)
