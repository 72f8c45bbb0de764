"""A second, independent telling of the queue, written from the design's sections 1 to 3 and not from the code.

It knows the sample policy of these tests by heart instead of reading its rules, keeps what is served, what preempts and
what waits in three separate places, and speaks of operations by their plain names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

STUCK_MS = 180_000
GRACE_MS = 10_000
ROOM = 8

PERMITTED = {
    "create": {"building"},
    "start": {"stopped", "error"},
    "stop": {"active", "paused", "error"},
    "reboot": {"active", "paused", "stopped", "error"},
    "pause": {"active"},
    "unpause": {"paused"},
    "suspend": {"active", "paused"},
    "resume": {"suspended"},
    "rescue": {"active", "stopped"},
    "unrescue": {"rescued"},
    "attach_volume": {"active", "paused", "stopped"},
    "swap_volume": {"active", "paused", "stopped"},
    "delete": {"building", "active", "paused", "suspended", "stopped", "rescued", "error"},
}
LEADS_TO = {
    "create": "active",
    "start": "active",
    "stop": "stopped",
    "reboot": "active",
    "pause": "paused",
    "unpause": "active",
    "suspend": "suspended",
    "resume": "active",
    "rescue": "rescued",
    "delete": "deleted",
}
FAILS_TO_ERROR = {"create", "start", "rescue", "unrescue"}
CAN_BE_INTERRUPTED = {"create", "start", "stop", "reboot", "suspend"}
BESIDE = {"attach_volume": {"start"}, "swap_volume": {"start", "stop", "reboot"}}
PERFORMABLE = {
    "stop": {"building", "active", "paused", "rescued", "stopped", "error"},
    "reboot": {"active", "stopped", "paused", "suspended", "error", "rescued"},
    "delete": PERMITTED["delete"],
}
POWERED = {"active", "paused", "rescued"}
NOTES = {"lock", "unlock", "reset_state"}


@dataclass
class Asked:
    """One admitted request."""

    name: str
    operation: str
    overtakes: bool = False
    fence: int = -1
    since: int = 0
    deadline: int | None = None
    asked_to_stop: bool = False
    for_another: bool = False

    @property
    def plugs(self) -> bool:
        return self.operation in BESIDE


@dataclass
class Model:
    """One instance and its queue."""

    state: str = "active"
    prior: str | None = None
    locked: bool = False
    fence: int = 1
    alive_at: int = 0
    changing: Asked | None = None
    plugging: Asked | None = None
    front: list[Asked] = field(default_factory=list)
    line: list[Asked] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)

    # ---- looking

    @property
    def served(self) -> list[Asked]:
        return [asked for asked in (self.changing, self.plugging) if asked is not None]

    @property
    def outstanding(self) -> list[Asked]:
        return [*self.served, *self.front, *self.line]

    def lands(self, operation: str, state: str, prior: str | None) -> tuple[str, str | None]:
        if operation == "unrescue":
            return prior or "active", None
        return LEADS_TO[operation], (state if operation == "rescue" else prior)

    def foreseen(self) -> str:
        state, prior = self.state, self.prior
        for asked in self.outstanding:
            if not asked.plugs:
                state, prior = self.lands(asked.operation, state, prior)
        return state

    def silent(self, now: int) -> int:
        since = self.served[0].since if self.served else self.alive_at
        return max(0, now - since)

    # ---- asking

    def ask(self, operation: str, name: str, now: int) -> str:
        """`admitted`, `redundant` or `denied`."""
        verdict = self.verdict(operation, now)
        if verdict in {"redundant", "denied"}:
            return verdict
        if operation in NOTES:
            self.note(operation, name, now)
            return "admitted"
        asked = Asked(name, operation, overtakes=verdict != "in turn")
        if verdict == "take over":
            self.throw_out()
        elif verdict == "preempt":
            for busy in self.served:
                limit = now + GRACE_MS
                busy.deadline = limit if busy.deadline is None else min(limit, busy.deadline)
                busy.asked_to_stop = busy.for_another = True
        if asked.overtakes:
            self.front.insert(0, asked)
            self.reconsider()
        else:
            self.line.append(asked)
        return "admitted"

    def verdict(self, operation: str, now: int) -> str:
        kinds = {asked.operation for asked in self.outstanding}
        task = self.changing.operation if self.changing else None
        if self.state == "deleted":
            return "denied"
        if operation == "delete":
            if "delete" not in kinds:
                return "preempt"
            return "take over" if self.silent(now) >= STUCK_MS else "redundant"
        if operation in {"stop", "start", "reboot"} and "delete" in kinds:
            return "denied"
        if operation in NOTES:
            return "note"
        if operation == "reboot" and task == "reboot":
            return "take over" if self.silent(now) >= STUCK_MS else "denied"
        if operation in {"stop", "start"} and operation in kinds:
            return "redundant"
        if operation == "reboot" and "stop" in kinds:
            return "denied"
        if operation == "stop" and task == "start":
            return "preempt"
        return self.plain_verdict(operation)

    def plain_verdict(self, operation: str) -> str:
        changes = [asked for asked in self.outstanding if not asked.plugs]
        if not changes and operation == "create" and self.outstanding:
            return "denied"
        if not changes and self.state not in PERMITTED[operation]:
            return "denied"
        if len(self.outstanding) >= ROOM:
            return "denied"
        return "in turn" if self.foreseen() in PERMITTED[operation] else "denied"

    def note(self, operation: str, name: str, now: int) -> None:
        if operation == "reset_state":
            self.throw_out()
            self.state = "error"
            self.alive_at = now
            self.reconsider()
        else:
            self.locked = operation == "lock"
        self.ends[name] = "succeeded"

    def throw_out(self) -> None:
        """Nobody who was serving may act any more."""
        self.fence += 1
        for asked in self.served:
            self.ends[asked.name] = "superseded"
        self.changing = self.plugging = None

    def reconsider(self) -> None:
        """Cancel what waits and makes no sense any more."""
        state, prior = self.state, self.prior
        # What will hold if what is in flight ends without effect.
        otherwise = state
        if self.changing is not None:
            state, prior = self.lands(self.changing.operation, state, prior)
        for place in (self.front, self.line):
            for asked in [waiting for waiting in place if not waiting.plugs]:
                welcome = state in PERMITTED[asked.operation]
                if asked.overtakes:
                    welcome = welcome or not PERFORMABLE[asked.operation].isdisjoint({otherwise, state})
                if welcome:
                    state, prior = self.lands(asked.operation, state, prior)
                    otherwise = state
                else:
                    place.remove(asked)
                    self.ends[asked.name] = "cancelled"
        for asked in [waiting for waiting in self.line if waiting.plugs and state not in PERMITTED[waiting.operation]]:
            self.line.remove(asked)
            self.ends[asked.name] = "cancelled"

    # ---- serving

    def take(self, lane: str, now: int) -> str | None:
        change = next((asked for asked in self.front + self.line if not asked.plugs), None)
        plug = next((asked for asked in self.line if asked.plugs), None)
        change_now = change is not None and self.changing is None and self.goes_with(self.plugging, change)
        # State changes go first: behind one that waits, a component change is served only beside one in flight.
        its_turn = not self.front and (change is None or self.changing is not None)
        plug_now = plug is not None and self.plugging is None and its_turn and self.goes_with(plug, self.changing)
        if lane == "any":
            lane = "state" if change is not None or self.changing is not None else "component"
        if lane == "state" and change is not None and change_now:
            self.changing = self.begin(change, now)
            return change.name
        if lane == "component" and plug is not None and plug_now:
            self.plugging = self.begin(plug, now)
            return plug.name
        return None

    def goes_with(self, plug: Asked | None, change: Asked | None) -> bool:
        return plug is None or change is None or change.operation in BESIDE[plug.operation]

    def begin(self, asked: Asked, now: int) -> Asked:
        (self.front if asked in self.front else self.line).remove(asked)
        asked.fence, asked.since, self.alive_at = self.fence, now, now
        return asked

    def holder(self, name: str, fence: int) -> Asked | None:
        return next((a for a in self.served if (a.name, a.fence) == (name, fence) and fence == self.fence), None)

    def report(self, name: str, fence: int, outcome: str, now: int) -> str:
        """How the request stands then, or `stale`."""
        asked = self.holder(name, fence)
        if asked is None:
            return "stale"
        if outcome == "unknown":
            return "unknown"
        self.alive_at = now
        if asked.plugs:
            self.plugging = None
        else:
            self.changing = None
            if outcome == "succeeded":
                self.state, self.prior = self.lands(asked.operation, self.state, self.prior)
            elif outcome == "failed" and asked.operation in FAILS_TO_ERROR:
                self.state = "error"
        interrupted = "superseded" if asked.for_another else "cancelled"
        self.ends[name] = {"succeeded": "succeeded", "failed": "failed", "interrupted": interrupted}[outcome]
        self.reconsider()
        return self.ends[name]

    def breathe(self, name: str, fence: int, now: int) -> bool:
        asked = self.holder(name, fence)
        if asked is not None:
            asked.since = self.alive_at = now
        return asked is not None

    def adopt(self, now: int) -> list[str]:
        if not self.served:
            return []
        self.fence += 1
        self.alive_at = now
        for asked in self.served:
            asked.fence, asked.since = self.fence, now
        return sorted(asked.name for asked in self.served)

    def guest(self, event: str, now: int) -> None:
        self.alive_at = now
        if event == "reset":
            return
        if self.state in POWERED:
            self.state, self.prior = ("stopped" if event == "stopped" else "error"), None
        self.reconsider()

    def withdraw(self, name: str) -> str:
        for place in (self.front, self.line):
            for asked in place:
                if asked.name == name:
                    place.remove(asked)
                    self.ends[name] = "cancelled"
                    self.reconsider()
                    return "cancelled"
        asked_now = next((asked for asked in self.served if asked.name == name), None)
        if asked_now is None or asked_now.operation not in CAN_BE_INTERRUPTED:
            return "too_late"
        asked_now.asked_to_stop = True
        return "stopping"

    def time_out(self, now: int) -> list[str]:
        overdue = [asked for asked in self.served if asked.deadline is not None and asked.deadline <= now]
        if not overdue:
            return []
        thrown = sorted(asked.name for asked in self.served)
        self.throw_out()
        self.reconsider()
        return thrown
