"""The laws: their names, and what each promises, in one sentence."""

from __future__ import annotations

from typing import Final, NamedTuple


class Law(NamedTuple):
    """One law."""

    name: str
    promise: str


LAWS: Final = {
    1: Law("one at a time", "At most one state change of a VM is served at a time."),
    2: Law("a promise", "An admitted request is permitted when its turn comes, if everything before it succeeds."),
    3: Law("one end", "Each admitted request ends exactly once."),
    4: Law("the fence holds", "A worker that was superseded has no effect any more."),
    5: Law(
        "never stuck",
        "From every state something is admitted now or at a time that is named, and some role can delete the VM.",
    ),
    7: Law("success is settled", "After a reported success the next request is judged on the new state."),
    8: Law("every answer explains itself", "A refusal names its rule and its reason."),
    12: Law("served in turn", "Requests are served in the order admitted, after preempting ones."),
}
"""The laws that a search of the model checker checks in every state and step, by number."""
SERVER_LAWS: Final = {
    6: Law("clocks do no harm", "A clock that jumps delays a takeover and never hastens one."),
    9: Law("acknowledged means durable", "What was acknowledged survives `kill -9` and power loss."),
    10: Law("unknown is not failed", "A request whose outcome is unknown waits until the hypervisor was inspected."),
    11: Law("one copy", "At no time do two processes run the same VM."),
}
"""The laws about clocks, hypervisors and stores, which no policy can break: the tests of the server check them."""
POLICY_LAWS: Final = frozenset({2, 5, 8})
"""The laws that a policy can violate; the others hold or not whatever the policy says."""
HOW_CHECKED: Final = (
    f"Laws {', '.join(map(str, LAWS))} are checked in every state and step. A state has no events and no fences: that "
    "an end has its event (law 3) and a late report is refused (law 4) is checked by the tests of the core; "
    f"laws {', '.join(map(str, SERVER_LAWS))} by the tests of the server."
)
"""Which laws a search checks, and what checks the others."""
