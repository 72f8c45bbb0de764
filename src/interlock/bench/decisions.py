"""How long the gate takes: one look-up in the policy, and one whole admission."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from pathlib import Path

from interlock.bench.fleet import scaled
from interlock.core.admission import admit
from interlock.core.lifecycle import take
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Instance, Submission
from interlock.core.states import VmState
from interlock.core.views import build_view
from interlock.policies.language.loader import load

_NUMBER = 20_000


def measure(_folder: Path, scale: float = 1.0) -> dict[str, float]:
    number = scaled(_NUMBER, scale)
    policy = CompiledPolicy(load("standard"))
    idle = Instance(id="i", name="n", project="p", host="h", vm_state=VmState.ACTIVE)
    reboot = Submission(request_id="r1", operation=Operation.REBOOT, requested_by="bench")
    busy = take(admit(idle, reboot, policy, 0).instance, None, 0).instance
    stop = Submission(request_id="r2", operation=Operation.STOP, requested_by="bench")
    view = build_view(busy, stop, 60_000)
    looked_up = microseconds(lambda: policy.decide(view), number)
    admitted = microseconds(lambda: admit(idle, reboot, policy, 0), number)
    refused = microseconds(lambda: admit(busy, stop, policy, 60_000), number)
    return {
        "decide_us": looked_up,
        "admit_us": admitted,
        "refuse_us": refused,
        "decisions_per_s": round(1e6 / looked_up),
    }


def microseconds(call: Callable[[], object], number: int) -> float:
    """Return the median time of one call, in repeats of `number` calls."""
    times = timeit.repeat(call, number=number, repeat=5)
    return round(statistics.median(times) / number * 1e6, 3)
