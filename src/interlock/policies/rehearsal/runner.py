"""Rehearsal: run a script of events against a policy, one JSON event per line in, one JSON answer per line out.

The core is called as a server calls it, without server, store or real clock: time passes when the script says so.
docs/reference/policies.md describes events and answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import msgspec

from interlock.core import holds, lifecycle
from interlock.core.admission import admit
from interlock.core.durations import format_seconds, seconds
from interlock.core.errors import Forbidden, Invalid
from interlock.core.operations import CATALOGUE, Lane
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    ENDS,
    SERVED,
    Admitted,
    Approval,
    Change,
    Denied,
    Disposition,
    GuestEvent,
    Held,
    Outcome,
    Redundant,
    Request,
    StaleFence,
    Status,
    Submission,
)
from interlock.core.references import MIGRATIONS
from interlock.core.roles import Role
from interlock.core.states import NO_TASK
from interlock.policies.language.vocabulary import nearest
from interlock.policies.rehearsal.events import (
    InstanceLine,
    Line,
    check_tags,
    length_of_time_ms,
    made_instance,
    named_operation,
    named_outcome,
    named_role,
    read_line,
    wall_clock_ms,
)
from interlock.policies.time_windows import resolved

BEGINNING_MS: Final = 1_000_000_000_000
"""The start time of every rehearsal; far enough from zero for any age."""

_LANES: Final[dict[str, Lane | None]] = {"any": None, "state": Lane.STATE, "component": Lane.COMPONENT}
_GUEST_EVENTS: Final = {event.value: event for event in GuestEvent}
_encode: Final = msgspec.json.Encoder().encode

_REQUEST_ID: Final = re.compile(r"r([1-9][0-9]{0,15})", re.ASCII)

Answer = dict[str, Any]


def rehearse(lines: Iterable[bytes | str], policy: CompiledPolicy) -> Iterator[bytes]:
    """Yield the answers to a script, in order, each one JSON object without a line end. Blank lines are skipped.

    An invalid line is answered with `error` and its number and changes nothing; the script continues.
    """
    stage = Rehearsal(policy)
    for number, line in enumerate(lines, start=1):
        if not line or line.isspace():
            continue
        try:
            answer = stage.play(*read_line(line))
        except Invalid as error:
            answer = {"error": f"{error.message} {error.remedy}" if error.remedy else error.message, "line": number}
        yield _encode(answer)


class Rehearsal:
    """One instance under one policy, with a clock of its own."""

    def __init__(self, policy: CompiledPolicy) -> None:
        self._given = policy
        self._verbs: dict[str, Callable[[Line], Answer]] = {
            "instance": self._begin,
            "submit": self._submit,
            "take": self._take,
            "finish": self._finish,
            "observe": self._observe,
            "cancel": self._cancel,
            "approve": self._approve,
            "progress": self._progress,
            "advance": self._advance,
            "show": self._show,
            "adopt": self._adopt,
            "relabel": self._relabel,
            "host_reachable": self._host_changes,
        }
        self._start(InstanceLine())

    @property
    def _policy(self) -> CompiledPolicy:
        """The policy at the present time of the wall clock, if that is given."""
        return self._given if self._wall_ms is None else resolved(self._given, self.now_ms, self._wall_ms)

    def play(self, verb: str, event: Line) -> Answer:
        """Apply one event and return the answer.

        Raises:
            Invalid: the event is not valid in this state; nothing has changed.
        """
        answer = self._verbs[verb](event)
        if self.instance.held:
            self._judge_held(answer)
        return answer

    def _judge_held(self, answer: Answer) -> None:
        """Re-evaluate held requests, as a driver does after every change; report those admitted or no longer held."""
        change = lifecycle.expire(self.instance, self._policy, self.now_ms, host_reachable=self.host_reachable)
        if change.instance is self.instance:
            return
        self._follow(change)
        for request in change.requests:
            key = "cancelled" if request.status is Status.CANCELLED else "admitted"
            answer.setdefault(key, {})[request.id] = request.reason if key == "cancelled" else request.rule

    def _start(self, line: InstanceLine) -> None:
        role = named_role(line.role)
        self.instance = made_instance(line, BEGINNING_MS)
        self.now_ms = BEGINNING_MS
        """The present time."""
        self._role = role
        self.host_reachable = line.host_reachable
        self._admitted = len(self.instance.outstanding)
        self._wall_ms = None if line.at is None else wall_clock_ms(line.at) - BEGINNING_MS
        """What is added to the present time for the wall clock."""
        self._lost: dict[str, int] = {}
        """The fences of superseded workers, by request: their reports are stale."""

    def _begin(self, event: Line) -> Answer:
        assert event.instance is not None
        self._start(event.instance)
        return self._shown()

    def _submit(self, event: Line) -> Answer:
        assert event.submit is not None
        parameters = event.parameters or {}
        if event.hard is not None:
            parameters = {**parameters, "hard": event.hard}
        submission = Submission(
            request_id=f"r{self._admitted + 1}",
            operation=named_operation(event.submit),
            parameters=parameters,
            requested_by="rehearsal" if event.requested_by is None else event.requested_by,
            project="" if event.project is None else event.project,
            groups=event.groups or (),
            windows=event.windows or (),
            image=str(parameters.get("image", "")),
            approver=event.approver or (),
            approvable=True,
            project_outstanding=event.project_outstanding or 0,
            host_outstanding=event.host_outstanding or 0,
            role=self._role_of(event),
            host_reachable=self.host_reachable,
            hold_ms=None if event.hold is None else length_of_time_ms(event.hold),
        )
        change = admit(self.instance, submission, self._policy, self.now_ms)
        self._follow(change)
        if isinstance(change.answer, Admitted | Held):
            self._admitted += 1
        return self._disposed(change.answer)

    def _disposed(self, answer: Disposition) -> Answer:
        if isinstance(answer, Held):
            return {**self._disposed(answer.denied), "disposition": "held", "request": answer.request.id}
        allowed_at_ms = None if isinstance(answer, Admitted) else answer.allowed_at_ms
        shown: Answer = {
            "disposition": "admitted",
            "reason": None,
            "rule": answer.rule,
            "retry_after": None if allowed_at_ms is None else seconds(max(0, allowed_at_ms - self.now_ms)),
            "supersedes": (),
            "cancels": (),
            "request": None,
        }
        if not isinstance(answer, Admitted) and answer.allowed_if_silent:
            shown["if_silent"] = True
        if not isinstance(answer, Admitted) and answer.allowed_latest_at_ms is not None:
            shown["retry_after_latest"] = seconds(max(0, answer.allowed_latest_at_ms - self.now_ms))
        match answer:
            case Admitted():
                shown["supersedes"], shown["cancels"] = answer.supersedes, answer.cancels
                shown["request"] = answer.request.id
            case Redundant():
                shown["disposition"], shown["reason"] = "redundant", answer.reason
                shown["request"] = answer.request and answer.request.id
            case Denied():
                shown["disposition"], shown["reason"] = "denied", answer.reason
        return shown

    def _take(self, event: Line) -> Answer:
        assert event.take is not None
        if event.take not in _LANES:
            raise Invalid(f"Unknown lane {event.take!r}. {nearest(event.take, _LANES)}")
        lane, reachable = _LANES[event.take], self.host_reachable
        change = lifecycle.take(self.instance, lane, self.now_ms, host_reachable=reachable)
        self._follow(change)
        taken = change.answer
        return {"taken": taken and taken.operation.value, "request": taken and taken.id}

    def _finish(self, event: Line) -> Answer:
        assert event.finish is not None
        outcome = named_outcome(event.outcome)
        request_id, fence = self._worker(event.finish)
        moved = outcome is Outcome.SUCCEEDED and self._moves(request_id, fence)
        change = lifecycle.finish(
            self.instance,
            request_id,
            fence,
            outcome,
            self._policy,
            self.now_ms,
            arrived=event.arrived is True,
            host_reachable=self.host_reachable or moved,
        )
        self.host_reachable |= moved
        return self._reported(change, request_id)

    def _moves(self, request_id: str, fence: int) -> bool:
        """Return whether the success of a request brings the instance to another host."""
        served = (request for request in self.instance.outstanding if request.status in SERVED)
        ids = [request.id for request in served if request.operation in MIGRATIONS]
        return request_id in ids and fence == self.instance.fence

    def _progress(self, event: Line) -> Answer:
        assert event.progress is not None
        request_id, fence = self._worker(event.progress)
        phase = None if event.phase is None else event.phase.replace("-", "_")
        serving = next((request for request in self.instance.outstanding if request.id == request_id), None)
        if phase is not None and serving is not None:
            entry = CATALOGUE[serving.operation]
            if phase not in entry.phases + entry.hard_phases:
                known = ", ".join(entry.phases + entry.hard_phases)
                raise Invalid(f"{serving.operation.value} has no phase {phase!r}; expected one of {known}.")
        change = lifecycle.progress(self.instance, request_id, fence, self.now_ms, phase=phase)
        return self._reported(change, request_id)

    def _reported(self, change: Change[Request | StaleFence], request_id: str) -> Answer:
        """Return the answer to a worker's report, which may be stale."""
        answer = self._settled(self._follow(change), request_id)
        if isinstance(change.answer, StaleFence):
            answer["fenced"] = {"fence": change.answer.fence, "current_fence": change.answer.current_fence}
        return answer

    def _observe(self, event: Line) -> Answer:
        assert event.observe is not None
        if event.observe not in _GUEST_EVENTS:
            raise Invalid(f"Unknown guest event {event.observe!r}. {nearest(event.observe, _GUEST_EVENTS)}")
        kind = _GUEST_EVENTS[event.observe]
        reachable = self.host_reachable
        change = lifecycle.observe(self.instance, kind, self._policy, self.now_ms, host_reachable=reachable)
        return self._settled(self._follow(change))

    def _cancel(self, event: Line) -> Answer:
        assert event.cancel is not None
        if not self._was_admitted(event.cancel):
            raise Invalid(f"Request {event.cancel!r} not found.")
        reachable = self.host_reachable
        change = lifecycle.cancel(
            self.instance, event.cancel, self._policy, "rehearsal", self.now_ms, host_reachable=reachable
        )
        answer: Answer = {"cancel": change.answer.value}
        answer.update(self._settled(self._follow(change)))
        return answer

    def _approve(self, event: Line) -> Answer:
        assert event.approve is not None
        if not self._was_admitted(event.approve):
            raise Invalid(f"Request {event.approve!r} not found.")
        belongs = (f"role:{self._role_of(event).value}", *(f"group:{group}" for group in event.groups or ()))
        by = "rehearsal" if event.requested_by is None else event.requested_by
        approval = Approval(by=by, belongs=belongs, at_ms=self.now_ms)
        change = holds.approve(self.instance, event.approve, approval, self._policy, host_reachable=self.host_reachable)
        answer: Answer = {"approve": change.answer.value, **self._settled(self._follow(change))}
        admitted = {one.id: one.rule for one in change.requests if one.status is Status.QUEUED}
        return {**answer, "admitted": admitted} if admitted else answer

    def _was_admitted(self, request_id: str) -> bool:
        found = _REQUEST_ID.fullmatch(request_id)
        return found is not None and int(found.group(1)) <= self._admitted

    def _advance(self, event: Line) -> Answer:
        assert event.advance is not None
        until_ms = self.now_ms + length_of_time_ms(event.advance)
        ended: dict[str, Request] = {}
        admitted: dict[str, str] = {}
        while (due_ms := lifecycle.next_deadline_ms(self.instance)) is not None and due_ms <= until_ms:
            # Everything happens at its own time, also where time passes in one step.
            self.now_ms = max(self.now_ms, due_ms)
            change = lifecycle.expire(self.instance, self._policy, self.now_ms, host_reachable=self.host_reachable)
            ended.update(self._follow(change))
            admitted.update((one.id, one.rule) for one in change.requests if one.status is Status.QUEUED)
        self.now_ms = until_ms
        answer = self._settled(ended)
        if admitted:
            answer["admitted"] = admitted
        return answer

    def _adopt(self, event: Line) -> Answer:
        """Adopt the requests in service, as after a restart: `adopted` lists them."""
        if event.adopt is not True:
            raise Invalid('Invalid event: expected {"adopt": true}.')
        change = lifecycle.adopt(self.instance, self.now_ms)
        answer = self._settled(self._follow(change))
        answer["adopted"] = [request.id for request in change.answer]
        return answer

    def _relabel(self, event: Line) -> Answer:
        assert event.relabel is not None
        check_tags(event.relabel)
        reachable = self.host_reachable
        try:
            change = lifecycle.relabel(
                self.instance,
                self._policy,
                "rehearsal",
                self.now_ms,
                role=self._role_of(event),
                host_reachable=reachable,
                tags=event.relabel,
            )
        except Forbidden as error:
            return {"disposition": "denied", "reason": "forbidden", "because": f"{error.message} {error.remedy}"}
        return self._settled(self._follow(change))

    def _role_of(self, event: Line) -> Role:
        return self._role if event.role is None else named_role(event.role)

    def _host_changes(self, event: Line) -> Answer:
        """Lose the host or get it back, and judge the queue again."""
        self.host_reachable = event.host_reachable is True
        change = lifecycle.rejudge(self.instance, self._policy, self.now_ms, host_reachable=self.host_reachable)
        return self._settled(self._follow(change))

    def _show(self, event: Line) -> Answer:
        if event.show is not True:
            raise Invalid('Invalid event: expected {"show": true}.')
        return self._shown()

    def _worker(self, name: str) -> tuple[str, int]:
        """Find the request in service, or fenced before, by id or operation; return its id and fence."""
        for request in self.instance.outstanding:
            if request.status in SERVED and name in (request.id, request.operation.value):
                return request.id, request.fence
        if name in self._lost:
            return name, self._lost[name]
        operation = name.replace("-", "_")
        for request in self.instance.outstanding:
            if request.status in SERVED and request.operation.value == operation:
                return request.id, request.fence
        raise Invalid(
            f"{name!r} is not in flight.", remedy='Name the operation or the request; {"show": true} lists them.'
        )

    def _follow(self, change: Change[Any]) -> dict[str, Request]:
        """Apply a change, and return the requests that it ended."""
        self.instance = change.instance
        ended = {}
        for request in change.requests:
            if request.status in ENDS:
                ended[request.id] = request
                if request.fence < self.instance.fence and request.taken_at_ms is not None:
                    self._lost[request.id] = request.fence
        return ended

    def _settled(self, ended: dict[str, Request], finished: str | None = None) -> Answer:
        """Return the state of the instance and the requests that ended: `cancelled` lists the queued ones."""
        task_state = self.instance.task_state
        answer: Answer = {
            "vm_state": self.instance.vm_state.value,
            "task_state": None if task_state == NO_TASK else task_state,
            "ended": {},
            "cancelled": {},
        }
        for request in ended.values():
            if request.status is Status.CANCELLED and request.id != finished:
                answer["cancelled"][request.id] = request.reason
            else:
                answer["ended"][request.id] = request.status.value
        return answer

    def _shown(self) -> Answer:
        instance = self.instance
        serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
        since_ms = instance.updated_at_ms if serving is None else serving.last_progress_at_ms or instance.updated_at_ms
        task_state = instance.task_state
        shown: Answer = {
            "vm_state": instance.vm_state.value,
            "task_state": None if task_state == NO_TASK else task_state,
            "in_flight": serving and serving.operation.value,
            "age": format_seconds(self.now_ms - since_ms),
            "outstanding": [
                {"request": request.id, "operation": request.operation.value, "status": request.status.value}
                for request in instance.outstanding
            ],
            "prior_vm_state": instance.prior_vm_state and instance.prior_vm_state.value,
            "locked": instance.locked_by is not None,
            "tags": instance.tags,
            "blocked": [operation.value for operation in instance.blocked_operations],
            "role": self._role,
            "host_reachable": self.host_reachable,
            "fence": instance.fence,
            "generation": instance.generation,
        }
        if instance.further_vm_states:
            shown["further_vm_states"] = [state.value for state in instance.further_vm_states]
        if instance.held:
            shown["held"] = [{"request": one.id, "operation": one.operation.value} for one in instance.held]
        return shown
