"""Earlier policies that outstanding requests were admitted under: restored at the start, dropped when unused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.policy_switches import Outstanding
from interlock.core.records import Instance
from interlock.policies.active_policy import Earlier, PolicyInForce
from interlock.policies.language import bundle as bundles
from interlock.ports import Store

_LOG = structlog.get_logger(__name__)
_PAGE: Final = 20
_SWITCHING_MS: Final = 10_000
"""Maximum time to commit a switch; until then the policy before it still admitted requests."""


async def found(store: Store, performs: Iterable[Operation]) -> tuple[Earlier, ...]:
    """Return the earlier policies that may have admitted requests that are outstanding now, oldest first."""
    oldest_ms = oldest_admission_ms(await store.unsettled())
    earlier: list[Earlier] = []
    number: int | None = None
    until_ms = 0
    while oldest_ms is not None:
        switches = await store.policies.switches(_PAGE, number)
        for switch in switches:
            if number is not None and (policy := await _policy(store, switch.number, performs)) is not None:
                earlier.append(Earlier(policy, until_ms))
            number = switch.number
            until_ms = switch.at_ms + _SWITCHING_MS
            if switch.outstanding is Outstanding.REJUDGE or until_ms < oldest_ms:
                return tuple(reversed(earlier))
        if len(switches) < _PAGE:
            break
    return tuple(reversed(earlier))


async def _policy(store: Store, number: int, performs: Iterable[Operation]) -> CompiledPolicy | None:
    bundle = await store.policies.bundle(number)
    if bundle is None:
        return None
    try:
        return CompiledPolicy(bundles.read(bundle), performs)
    except PolicyError as error:
        _LOG.warning("earlier policy not readable, active policy used instead", switch=number, why=error.message)
        return None


def with_latest(in_force: PolicyInForce, now_ms: int) -> tuple[Earlier, ...]:
    """Return the earlier policies after the active one is replaced by one that keeps admitted requests."""
    return (*in_force.earlier, Earlier(in_force.compiled, now_ms))


def still_binding(in_force: PolicyInForce, unsettled: Sequence[Instance]) -> tuple[Earlier, ...]:
    """Return the earlier policies that still apply if `unsettled` has all outstanding requests."""
    oldest_ms = oldest_admission_ms(unsettled)
    return tuple(one for one in in_force.earlier if oldest_ms is not None and one.until_ms >= oldest_ms)


def oldest_admission_ms(instances: Iterable[Instance]) -> int | None:
    """Return the admission time of the oldest outstanding request of these instances; None if there is none."""
    return min((request.admitted_at_ms for one in instances for request in one.outstanding), default=None)
