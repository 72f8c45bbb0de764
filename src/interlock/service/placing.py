"""On which host something new is put, and to which one an instance goes: what was named, or one that has room.

Called inside decisions: sums are looked at and nothing is promised. Whether it is allowed to go is the gate's to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from interlock.core import admission
from interlock.core.errors import Invalid, NoRoom
from interlock.core.operations import TRAVELS, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Held, Instance, SharedFolder, Submission
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

    def put(self, instance: Instance, hosts: tuple[str, ...], shared: SharedFolder | None) -> Instance:
        """A new instance, on one of the hosts; rather on one that has the shared folder, if it has a root disk.

        Raises `NoRoom` where several are named, and it fits on none.
        """
        with_shared = instance
        if shared is not None and instance.spec is not None and instance.spec.has_root:
            with_shared = msgspec.structs.replace(instance, spec=msgspec.structs.replace(instance.spec, shared=shared))
        sharing = tuple(host for host in hosts if self._reaches(host, with_shared))
        others = tuple(host for host in hosts if host not in sharing)
        if len(hosts) == 1:
            return msgspec.structs.replace(with_shared if sharing else instance, host=hosts[0])
        try:
            return msgspec.structs.replace(with_shared, host=self._capacity.choose(with_shared, sharing))
        except NoRoom:
            if not others:
                raise
            return msgspec.structs.replace(instance, host=self._capacity.choose(instance, others))

    def _reaches(self, host: str, instance: Instance) -> bool:
        """Whether the instance's root disk can be used on that host, as far as is known."""
        shared = None if instance.spec is None else instance.spec.shared
        return shared is None or self._hosts.shares(host, Path(shared.path))

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
        others = tuple(name for name in targets if name != instance.host and self._reaches(name, instance))
        if not others:
            which = "has its root disk" if any(name != instance.host for name in targets) else "can be asked"
            raise Invalid(
                f"There is no host that {which} but {instance.host}.",
                remedy="See that `interlock agent` runs on another; `interlock host list` tells.",
            )
        if isinstance(admission.judge(instance, submission, policy, now_ms), Admitted | Held):
            return _to(submission, self._capacity.choose(instance, others))
        return _to(submission, others[0])


def _to(submission: Submission, host: str) -> Submission:
    return msgspec.structs.replace(submission, parameters={**submission.parameters, "host": host})
