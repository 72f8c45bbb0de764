"""On which host something new is put, and to which one an instance goes: what was named, or one that has room.

Called inside decisions: sums are looked at and nothing is promised. Whether it is allowed to go is the gate's to say.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core import admission
from interlock.core.errors import Invalid
from interlock.core.operations import TRAVELS, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Held, Instance, Submission
from interlock.service.capacity import Capacity
from interlock.service.hosts import ANY, HostVerbs


class Placing:
    """Finds hosts for instances."""

    def __init__(self, hosts: HostVerbs, capacity: Capacity) -> None:
        self._hosts = hosts
        self._capacity = capacity

    def named(self, wanted: str | None) -> tuple[str, ...]:
        """As `HostVerbs.named`."""
        return self._hosts.named(wanted)

    def targets(self, operation: Operation, parameters: dict[str, Any]) -> tuple[str, ...]:
        """Where the operation may bring an instance; none for one that brings it nowhere. Raises as `named`."""
        return self._hosts.named(parameters.get("host")) if operation in TRAVELS else ()

    def put(self, instance: Instance, hosts: tuple[str, ...]) -> Instance:
        """A new instance, on one of the hosts. Raises `NoRoom` where several are named, and it fits on none."""
        host = hosts[0] if len(hosts) == 1 else self._capacity.choose(instance, hosts)
        return msgspec.structs.replace(instance, host=host)

    def bound(
        self,
        instance: Instance,
        submission: Submission,
        targets: tuple[str, ...],
        policy: CompiledPolicy,
        now_ms: int,
    ) -> Submission:
        """The submission with the host's name to which it brings the instance, if it brings it to one.

        Where any will do it is the one for which the same is outstanding already; else one with room is looked for if
        the gate would admit it.

        Raises:
            Invalid: it is there already, or there is no other host.
            NoRoom: it fits on none of several.
        """
        if not targets:
            return submission
        if submission.parameters.get("host") != ANY:
            (target,) = targets
            if target == instance.host:
                raise Invalid(f"{instance.name} is on the host {target} already.", remedy="Name another host.")
            return _to(submission, target)
        known = (*instance.held, *instance.outstanding)
        earlier = [one for one in known if one.operation is submission.operation]
        if earlier:
            return _to(submission, str(earlier[-1].parameters.get("host")))
        others = tuple(name for name in targets if name != instance.host)
        if not others:
            raise Invalid(
                f"There is no host that can be asked but {instance.host}.",
                remedy="See that `interlock agent` runs on another; `interlock host list` tells.",
            )
        if isinstance(admission.judge(instance, submission, policy, now_ms), Admitted | Held):
            return _to(submission, self._capacity.choose(instance, others))
        return _to(submission, others[0])


def _to(submission: Submission, host: str) -> Submission:
    return msgspec.structs.replace(submission, parameters={**submission.parameters, "host": host})
