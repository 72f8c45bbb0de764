"""How many decisions a second the gate for fleets gives: every operation, for each of 100,000 instances.

One in twenty instances is busy, alone or with one request more that waits; the rest are left alone, and ages are
anything up to a day. Measured is all that `interlock policy fleet` does with the records: finding the situations, and
counting the answers and reasons.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks import policy_lengths
from interlock.bench.fleet import scaled
from interlock.core.admission import admit
from interlock.core.lifecycle import take
from interlock.core.operations import CATALOGUE, Lane
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Instance, Submission
from interlock.core.states import VmState
from interlock.policies.fleet.gate import FleetAnswers, judge_fleet
from interlock.policies.language.loader import compile_named

_INSTANCES: Final = 100_000
_SEED: Final = 3
_DAY_MS: Final = 86_400_000
_NOW_MS: Final = 10 * _DAY_MS
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
    answers, decisions_per_s = _rate(policy, fleet)
    short, long = policy_lengths.spread(policy_lengths.SHORT), policy_lengths.spread(policy_lengths.LONG)
    return {
        "instances": len(fleet),
        "situations": answers.situations,
        "decisions_per_s": decisions_per_s,
        "short_policy_decisions_per_s": _rate(short, fleet)[1],
        "long_policy_decisions_per_s": _rate(long, fleet)[1],
    }


def mixture(policy: CompiledPolicy, count: int) -> list[Instance]:
    """A fleet of `count` instances, most of them left alone; always the same one."""
    chance = np.random.default_rng(_SEED)
    calm = [_idle(vm_state) for vm_state in _LEFT_ALONE]
    busy = [one for vm_state in (VmState.BUILDING, *_LEFT_ALONE) for one in _busy(_idle(vm_state), policy)]
    kinds = [*calm, *busy]
    shares = np.array([*_LEFT_ALONE.values(), *[_BUSY / len(busy)] * len(busy)])
    return [
        msgspec.structs.replace(
            kinds[kind],
            locked_by="owner" if locked else None,
            host="gone" if gone else "h",
            updated_at_ms=_NOW_MS - silent_ms,
        )
        for kind, locked, gone, silent_ms in zip(
            chance.choice(len(kinds), size=count, p=shares / shares.sum()).tolist(),
            (chance.random(count) < _LOCKED).tolist(),
            (chance.random(count) < _UNREACHABLE).tolist(),
            chance.integers(0, _DAY_MS, count).tolist(),
            strict=True,
        )
    ]


def _rate(policy: CompiledPolicy, fleet: list[Instance]) -> tuple[FleetAnswers, int]:
    """Return the answers, and the decisions a second of a policy that has judged nothing before."""
    started = time.perf_counter()
    answers = judge_fleet(fleet, policy, _NOW_MS, unreachable_hosts={"gone"})
    answers.counts()
    for operation in answers.operations:
        answers.reasons(operation)
    lasted_s = time.perf_counter() - started
    return answers, round(len(answers.operations) * len(fleet) / lasted_s)


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
    number = len(instance.outstanding)
    changes = (
        admit(
            instance,
            Submission(request_id=f"{operation.value}-{number}", operation=operation, requested_by="bench"),
            policy,
            0,
        )
        for operation, entry in CATALOGUE.items()
        if entry.lane is not Lane.RECORD
    )
    return [change.instance for change in changes if len(change.instance.outstanding) > len(instance.outstanding)]
