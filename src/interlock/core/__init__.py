"""The pure core: records, the operation catalogue, the gate, the request queue and the life cycle of requests.

No clock, I/O, randomness or logging: time, ids and the policy are arguments, so that a test can walk the whole state
space. Only the standard library and msgspec may be imported.

The names in `__all__` are public: they change only with a new minor version, and the changelog says how. Each function
takes an `Instance` and returns a `Change`: the instance after it, the new versions of its requests, the events to
record, and the answer. Write all of that in one transaction, or none. docs/guides/embed-the-gate.md shows how.
"""

from interlock.core.admission import admit, judge
from interlock.core.errors import BrokenInvariant, InterlockError, PolicyError
from interlock.core.evaluation import would_admit
from interlock.core.lifecycle import adopt, cancel, expire, finish, next_deadline_ms, observe, progress, rejudge, take
from interlock.core.operations import CATALOGUE, Entry, Lane, Operation
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import (
    Admitted,
    Cancellation,
    Change,
    Denied,
    Disposition,
    Event,
    GuestEvent,
    Held,
    Instance,
    InstanceUpdate,
    Outcome,
    Redundant,
    Request,
    StaleFence,
    Status,
    Submission,
    TransferProgress,
)
from interlock.core.roles import Role
from interlock.core.states import NO_TASK, GuestTrouble, PowerState, Target, VmState
from interlock.core.views import View, build_view

__all__ = [
    "CATALOGUE",
    "NO_TASK",
    "Admitted",
    "Before",
    "BrokenInvariant",
    "Cancellation",
    "Change",
    "CompiledPolicy",
    "Denied",
    "Disposition",
    "Entry",
    "Event",
    "GuestEvent",
    "GuestTrouble",
    "Held",
    "Instance",
    "InstanceUpdate",
    "InterlockError",
    "Lane",
    "MeasuredFrom",
    "Operation",
    "Outcome",
    "Policy",
    "PolicyError",
    "PowerState",
    "Redundant",
    "Request",
    "Role",
    "Rule",
    "StaleFence",
    "Status",
    "Submission",
    "Target",
    "TransferProgress",
    "Verdict",
    "View",
    "VmState",
    "admit",
    "adopt",
    "build_view",
    "cancel",
    "expire",
    "finish",
    "judge",
    "next_deadline_ms",
    "observe",
    "progress",
    "rejudge",
    "take",
    "would_admit",
]
