"""What earlier policies admitted and is to be kept: found again at the start, let go when nothing waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.policy_switches import Outstanding
from interlock.core.records import Instance
from interlock.policies import sources
from interlock.policies.in_force import Earlier, PolicyInForce
from interlock.ports import Store

_LOG = structlog.get_logger(__name__)
_PAGE: Final = 20
_SWITCHING_MS: Final = 10_000
"""How long a switch may have taken to be kept: until it was, the policy before it went on admitting."""


async def found(store: Store, performs: Iterable[Operation]) -> tuple[Earlier, ...]:
    """The policies before the one in force that may have admitted what is outstanding now, oldest first."""
    oldest_ms = oldest_admission_ms(await store.unsettled())
    earlier: list[Earlier] = []
    number: int | None = None
    until_ms = 0
    while oldest_ms is not None:
        switches = await store.policy_switches(_PAGE, number)
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
    bundle = await store.policy_bundle(number)
    if bundle is None:
        return None
    try:
        return CompiledPolicy(sources.read(bundle), performs)
    except PolicyError as error:
        _LOG.warning("what an earlier policy admitted is judged by the one in force", switch=number, why=error.message)
        return None


def with_latest(in_force: PolicyInForce, now_ms: int) -> tuple[Earlier, ...]:
    """What binds once the policy in force is replaced by another that keeps its promises."""
    return (*in_force.earlier, Earlier(in_force.compiled, now_ms))


def still_binding(in_force: PolicyInForce, unsettled: Sequence[Instance]) -> tuple[Earlier, ...]:
    """What still binds, when this is all that is outstanding."""
    oldest_ms = oldest_admission_ms(unsettled)
    return tuple(one for one in in_force.earlier if oldest_ms is not None and one.until_ms >= oldest_ms)


def oldest_admission_ms(instances: Iterable[Instance]) -> int | None:
    """When the oldest request was admitted that is outstanding for any of these; None if nothing is."""
    return min((request.admitted_at_ms for one in instances for request in one.outstanding), default=None)
