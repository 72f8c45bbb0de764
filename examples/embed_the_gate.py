"""A service with its own table and its own workers, which asks Interlock's gate before it acts."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from typing import TypeVar

import msgspec

from interlock import core
from interlock.core import Operation, Outcome
from interlock.policies import compile_named
from interlock.stores import ClockState, StoreClock

POLICY = compile_named("standard", performs={Operation.START, Operation.STOP, Operation.REBOOT, Operation.PAUSE})
T = TypeVar("T")


class Service:
    """Machines in a table of its own. The column `gate` is what Interlock needs; `status` is its own."""

    def __init__(self, database: sqlite3.Connection, now_ms: Callable[[], int] | None = None) -> None:
        database.execute("CREATE TABLE IF NOT EXISTS machines (name TEXT PRIMARY KEY, status TEXT, gate BLOB)")
        database.execute("CREATE TABLE IF NOT EXISTS clock (id INTEGER PRIMARY KEY, state BLOB)")
        kept = database.execute("SELECT state FROM clock").fetchone()
        self.clock = StoreClock.resumed(kept and msgspec.json.decode(kept[0], type=ClockState))
        self.database, self.now_ms = database, now_ms or self.clock.now_ms

    def add(self, name: str) -> None:
        new = core.Instance(id=name, name=name, project="", host="", vm_state=core.VmState.STOPPED)
        with self.database:
            row = (name, new.vm_state, msgspec.json.encode(new))
            self.database.execute("INSERT INTO machines VALUES (?, ?, ?)", row)

    def _change(self, name: str, decide: Callable[[core.Instance], core.Change[T]]) -> core.Change[T]:
        with self.database:
            self.database.execute("BEGIN IMMEDIATE")
            [gate] = self.database.execute("SELECT gate FROM machines WHERE name = ?", [name]).fetchone()
            change = decide(msgspec.json.decode(gate, type=core.Instance))
            row = (change.instance.vm_state, msgspec.json.encode(change.instance), name)
            self.database.execute("UPDATE machines SET status = ?, gate = ? WHERE name = ?", row)
            self.database.execute("REPLACE INTO clock VALUES (1, ?)", [msgspec.json.encode(self.clock.state)])
        return change

    def ask(self, name: str, operation: Operation, user: str) -> str:
        """May this be done now? What is admitted stands in the machine's queue when this returns."""
        asked = core.Submission(request_id=str(uuid.uuid4()), operation=operation, requested_by=user)
        change = self._change(name, lambda machine: core.admit(machine, asked, POLICY, self.now_ms()))
        match change.answer:
            case core.Admitted(supersedes=ids) if ids:
                return f"admitted: takes over from {len(ids)}"
            case core.Admitted(request=request):
                before = change.instance.outstanding.index(request)
                return f"admitted: queued behind {before}" if before else "admitted"
            case core.Redundant(because=because):
                return f"redundant: {because}"
            case core.Denied(because=because, allowed_at_ms=at_ms):
                return f"denied{'' if at_ms is None else f' for {(at_ms - self.now_ms()) / 1000:.0f} s'}: {because}"
            case core.Held(denied=denied):  # only what is submitted with hold_ms
                return f"held: {denied.because}"

    def take(self, name: str) -> core.Request | None:
        """For a worker: the request whose turn it is, or None. Deadlines that have passed come first."""
        while self._change(name, lambda machine: core.expire(machine, POLICY, self.now_ms())).answer:
            pass
        return self._change(name, lambda machine: core.take(machine, None, self.now_ms())).answer

    def report(self, done: core.Request, outcome: Outcome, message: str | None = None) -> bool:
        """For a worker: how its request ended. False: another has taken over, and nothing was changed."""

        def decide(machine: core.Instance) -> core.Change[core.Request | core.StaleFence]:
            return core.finish(machine, done.id, done.fence, outcome, POLICY, self.now_ms(), message=message)

        return isinstance(self._change(done.instance_id, decide).answer, core.Request)
