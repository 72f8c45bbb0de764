"""How many decisions a second the gate for fleets gives: every operation, for each of a million instances.

One in twenty instances is busy, alone or with one request more that waits; the rest are left alone, and ages are
anything up to a day. Measured is the whole answer: the disposition, the rule that decided, and when it would be
admitted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from interlock.core.admission import admit
from interlock.core.lifecycle import take
from interlock.core.operations import CATALOGUE, Lane
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Instance, Submission
from interlock.core.states import VmState
from interlock.policies.fleet_gate import FleetGate
from interlock.policies.fleet_situations import situations
from interlock.policies.fleets import Fleet
from interlock.policies.reading import compile_named
from interlock.testing.bench import policy_lengths
from interlock.testing.bench.fleet import scaled

_INSTANCES: Final = 1_000_000
_UNALIKE: Final = 100_000
_RECORDS: Final = 50_000
_SEED: Final = 3
_DAY_MS: Final = 86_400_000
_LEFT_ALONE: Final = {
    VmState.ACTIVE: 0.70,
    VmState.STOPPED: 0.18,
    VmState.SHELVED_OFFLOADED: 0.03,
    VmState.PAUSED: 0.015,
    VmState.ERROR: 0.015,
    VmState.RESCUED: 0.005,
    VmState.SUSPENDED: 0.005,
}
_BUSY: Final = 0.05
_LOCKED: Final = 0.02
_UNREACHABLE: Final = 0.01


def measure(_folder: Path, scale: float = 1.0) -> dict[str, float]:
    policy = compile_named("standard")
    fleet = mixture(policy, scaled(_INSTANCES, scale))
    unalike = mixture(policy, scaled(_UNALIKE, scale))
    unalike = msgspec.structs.replace(unalike, blocked=np.arange(len(unalike), dtype=np.uint64))
    short, long = policy_lengths.spread(policy_lengths.SHORT), policy_lengths.spread(policy_lengths.LONG)
    return {
        "instances": len(fleet),
        "situations": len(situations(fleet, FleetGate(policy).marks).rows),
        "decisions_per_s": _rate(policy, fleet),
        "unalike_decisions_per_s": _rate(policy, unalike),
        "short_policy_decisions_per_s": _rate(short, fleet),
        "long_policy_decisions_per_s": _rate(long, fleet),
        "instances_read_per_s": _reading_rate(policy, scaled(_RECORDS, scale)),
    }


def mixture(policy: CompiledPolicy, count: int) -> Fleet:
    """A fleet of `count` instances, most of them left alone; always the same one."""
    random = np.random.default_rng(_SEED)
    kinds, shares = _kinds(policy)
    rows = Fleet.of(kinds, 0).rows(random.choice(len(kinds), size=count, p=shares))
    silent_ms = random.integers(0, _DAY_MS, count)
    return msgspec.structs.replace(
        rows,
        locked=random.random(count) < _LOCKED,
        host_reachable=random.random(count) >= _UNREACHABLE,
        silent_ms=silent_ms,
        running_ms=silent_ms + random.integers(0, _DAY_MS, count),
    )


def _kinds(policy: CompiledPolicy) -> tuple[list[Instance], NDArray[np.float64]]:
    """What instances there are in the fleet, and the share of each."""
    calm = [_idle(vm_state) for vm_state in _LEFT_ALONE]
    busy = [one for vm_state in (VmState.BUILDING, *_LEFT_ALONE) for one in _busy(_idle(vm_state), policy)]
    shares = np.array([*_LEFT_ALONE.values(), *[_BUSY / len(busy)] * len(busy)])
    return [*calm, *busy], shares / shares.sum()


def _reading_rate(policy: CompiledPolicy, count: int) -> int:
    """How many records a second become rows."""
    kinds, shares = _kinds(policy)
    chosen = np.random.default_rng(_SEED).choice(len(kinds), size=count, p=shares)
    instances = [kinds[number] for number in chosen]
    started = time.perf_counter()
    Fleet.of(instances, 0)
    return round(count / (time.perf_counter() - started))


def _rate(policy: CompiledPolicy, fleet: Fleet) -> int:
    """Decisions a second, by a policy that was made ready and has not judged any fleet."""
    gate = FleetGate(policy)
    started = time.perf_counter()
    answers = gate.judge(fleet, "member")
    for operation in answers.operations:
        answers.dispositions(operation)
        answers.deciding(operation)
        answers.allowed_in_ms(operation)
    lasted_s = time.perf_counter() - started
    return round(len(answers.operations) * len(fleet) / lasted_s)


def _idle(vm_state: VmState) -> Instance:
    return Instance(id="i", name="n", project="p", host="h", vm_state=vm_state, launched_at_ms=0)


def _busy(idle: Instance, policy: CompiledPolicy) -> list[Instance]:
    """The instance with each operation that it admits in flight, alone and with one of two more that then wait."""
    found = []
    for served in _admitted(idle, policy):
        taken = take(served, None, 0).instance
        found += [taken, *_admitted(taken, policy)[:2]]
    return found


def _admitted(instance: Instance, policy: CompiledPolicy) -> list[Instance]:
    changes = (
        admit(instance, Submission(request_id=operation.value, operation=operation, requested_by="bench"), policy, 0)
        for operation, entry in CATALOGUE.items()
        if entry.lane is not Lane.RECORD
    )
    return [change.instance for change in changes if len(change.instance.outstanding) > len(instance.outstanding)]
