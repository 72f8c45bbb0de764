"""How long the gate takes: one look-up in the policy, in policies of other lengths too, and one whole admission."""

from __future__ import annotations

import statistics
import timeit
from pathlib import Path

from interlock.bench import policy_lengths
from interlock.bench.fleet import scaled
from interlock.core.admission import admit
from interlock.core.lifecycle import take
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Instance, Submission
from interlock.core.states import VmState
from interlock.core.views import View, build_view
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
    looked_up = _microseconds(lambda: policy.decide(view), number)
    admitted = _microseconds(lambda: admit(idle, reboot, policy, 0), number)
    refused = _microseconds(lambda: admit(busy, stop, policy, 60_000), number)
    lengths = {
        "decide_short_policy_us": policy_lengths.spread(policy_lengths.SHORT),
        "decide_long_policy_us": policy_lengths.spread(policy_lengths.LONG),
        "decide_piled_policy_us": policy_lengths.piled(policy_lengths.LONG),
    }
    return {
        "decide_us": looked_up,
        "admit_us": admitted,
        "refuse_us": refused,
        "decisions_per_s": round(1e6 / looked_up),
        **{name: _across(other, number) for name, other in lengths.items()},
    }


def _across(policy: CompiledPolicy, number: int) -> float:
    """The mean of one decision of each operation in each of two states, so that no cell is a lucky one."""
    views = [
        View(operation=operation, vm_state=vm_state)
        for operation in Operation
        for vm_state in (VmState.ACTIVE, VmState.STOPPED)
    ]

    def decide_all() -> None:
        for view in views:
            policy.decide(view)

    decide_all()
    return round(_microseconds(decide_all, max(1, number // (20 * len(views)))) / len(views), 3)


def _microseconds(call: object, number: int) -> float:
    times = timeit.repeat(call, number=number, repeat=5)  # type: ignore[arg-type]
    return round(statistics.median(times) / number * 1e6, 3)
