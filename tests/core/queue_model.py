"""A second, independent telling of the queue, written from the design's sections 1 to 3 and not from the code.

It knows the sample policy of these tests by heart instead of reading its rules, keeps what is served, what preempts and
what waits in three separate places, and speaks of operations by their plain names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile

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
    "resize": {"active", "stopped"},
    "confirm_resize": {"resized"},
    "revert_resize": {"resized"},
    "shelve": {"active", "stopped", "paused", "suspended"},
    "shelve_offload": {"shelved"},
    "unshelve": {"shelved", "shelved_offloaded"},
    "restore": {"soft_deleted"},
    "attach_volume": {"active", "paused", "stopped"},
    "swap_volume": {"active", "paused", "stopped"},
}
KEEPS_WHERE_IT_WAS = {
    "rescue": "rescued",
    "resize": "resized",
    "shelve": "shelved",
    "soft_delete": "soft_deleted",
}
GOES_BACK = {"unrescue", "confirm_resize", "revert_resize", "unshelve", "restore"}
ALIVE = {"building", "active", "paused", "suspended", "stopped", "rescued", "resized", "shelved", "shelved_offloaded"}
PERMITTED["soft_delete"] = ALIVE | {"error"}
PERMITTED["delete"] = ALIVE | {"error", "soft_deleted"}
LEADS_TO = {
    "create": "active",
    "start": "active",
    "stop": "stopped",
    "reboot": "active",
    "pause": "paused",
    "unpause": "active",
    "suspend": "suspended",
    "resume": "active",
    "delete": "deleted",
}
FAILS_TO_ERROR = {"create", "start", "rescue", "unrescue", "resize", "confirm_resize", "revert_resize", "shelve"}
CAN_BE_INTERRUPTED = {"create", "start", "stop", "reboot", "suspend", "shelve", "unshelve"}
BESIDE = {"attach_volume": {"start"}, "swap_volume": {"start", "stop", "reboot"}}
PERFORMABLE = {
    "stop": {"building", "active", "paused", "rescued", "stopped", "error"},
    "reboot": {"active", "stopped", "paused", "suspended", "error", "rescued"},
    "delete": PERMITTED["delete"],
}
POWERED = {"active", "paused", "rescued"}
NOTES = {"lock", "unlock", "reset_state"}


Place = tuple[str, ...]
"""Where an instance is, and behind it where it goes back to: a stopped one that is rescued is `rescued, stopped`.

One that was resized, and whose guest has ended since, is `resized, active, stopped`.
"""


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

    place: Place = ("active",)
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

    @property
    def state(self) -> str:
        return self.place[0]

    def lands(self, operation: str, place: Place) -> Place:
        if operation == "confirm_resize" and place[2:] == ("stopped",):
            return ("stopped",)
        if operation == "revert_resize":
            return place[1:2] or ("active",)
        if operation in GOES_BACK:
            return place[1:] or ("active",)
        if operation in KEEPS_WHERE_IT_WAS:
            return (KEEPS_WHERE_IT_WAS[operation], *place)
        if operation == "shelve_offload":
            return ("shelved_offloaded", *place[1:])
        return (LEADS_TO[operation],)

    def foreseen(self) -> str:
        place = self.place
        for asked in self.outstanding:
            if not asked.plugs:
                place = self.lands(asked.operation, place)
        return place[0]

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
            return "redundant" if operation == "lock" and self.locked else "note"
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
            self.place = ("error",)
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
        place = self.place
        # What will hold if what is in flight ends without effect.
        otherwise = self.state
        if self.changing is not None:
            place = self.lands(self.changing.operation, place)
        for row in (self.front, self.line):
            for asked in list(row):
                welcome = place[0] in PERMITTED[asked.operation]
                if asked.overtakes:
                    welcome = welcome or not PERFORMABLE[asked.operation].isdisjoint({otherwise, place[0]})
                if not welcome:
                    row.remove(asked)
                    self.ends[asked.name] = "cancelled"
                elif not asked.plugs:
                    place = self.lands(asked.operation, place)
                    otherwise = place[0]

    # ---- serving

    def ahead_of(self, name: str) -> list[Asked]:
        """Those whose turn comes before that of a request that waits; none if it overtakes."""
        if any(asked.name == name for asked in self.front):
            return []
        return [*self.front, *takewhile(lambda asked: asked.name != name, self.line)]

    def take(self, lane: str, now: int) -> str | None:
        waiting = self.front + self.line
        first = waiting[0] if waiting else None
        # Served in turn: nothing goes before the first that waits, except what goes beside the change in flight, which
        # the first waits for anyway.
        change = first if first is not None and not first.plugs else None
        plug = next((asked for asked in waiting if asked.plugs), None)
        change_now = change is not None and self.changing is None and self.goes_with(self.plugging, change)
        its_turn = plug is first or (self.changing is not None and not self.front)
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
                self.place = self.lands(asked.operation, self.place)
            elif outcome == "failed" and asked.operation in FAILS_TO_ERROR:
                self.place = ("error",)
        interrupted = "superseded" if asked.for_another else "cancelled"
        self.ends[name] = {
            "succeeded": "succeeded",
            "failed": "failed",
            "untouched": "failed",
            "interrupted": interrupted,
        }[outcome]
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
            self.place = ("stopped" if event == "stopped" else "error",)
        elif self.state == "resized" and "stopped" not in self.place:
            self.place = (*self.place, "stopped")
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
