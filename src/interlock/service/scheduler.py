"""Scheduler: chooses the host of a new instance, and the target of a migration, evacuation or unshelve.

Runs inside decisions: it reads capacity and claims nothing. The gate decides whether the operation is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.core import admission
from interlock.core.errors import InsufficientCapacity, InUse, Invalid, NotFound
from interlock.core.operations import FIELDS, Operation
from interlock.core.parameters import Refers
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Facts, Held, Instance, SharedFolder, Submission
from interlock.core.references import MIGRATIONS, REFERENCES
from interlock.core.states import VmState
from interlock.service.capacity import Capacity
from interlock.service.hosts import ANY, HostService

NAMING_A_HOST: Final = frozenset(
    operation
    for operation, fields in FIELDS.items()
    if any(field.required and field.refers is Refers.HOST for field in fields)
)
"""The operations that require a host."""


class Scheduler:
    """Chooses hosts for instances."""

    def __init__(self, hosts: HostService, capacity: Capacity) -> None:
        self._hosts = hosts
        self._capacity = capacity

    def named(self, wanted: str | None) -> tuple[str, ...]:
        """As `HostService.named`."""
        return self._hosts.named(wanted)

    def targets(self, operation: Operation, parameters: dict[str, Any]) -> tuple[str, ...]:
        """Return the candidate targets of an operation; empty if it does not move the instance. Raises as `named`."""
        return self._hosts.named(parameters.get("host")) if operation in MIGRATIONS else ()

    def put(self, instance: Instance, hosts: tuple[str, ...], shared: SharedFolder | None) -> Instance:
        """Assign a host to a new instance; prefers hosts with the shared folder if it has a root disk.

        Raises:
            InsufficientCapacity: there are several candidates, and it fits on none.
            Invalid: none has its networks.
        """
        hosts = self._with_networks(instance, hosts)
        with_shared = instance
        if shared is not None and instance.spec is not None and instance.spec.has_root:
            with_shared = msgspec.structs.replace(instance, spec=msgspec.structs.replace(instance.spec, shared=shared))
        sharing = tuple(host for host in hosts if self._reaches(host, with_shared))
        others = tuple(host for host in hosts if host not in sharing)
        if len(hosts) == 1:
            return msgspec.structs.replace(with_shared if sharing else instance, host=hosts[0])
        try:
            return msgspec.structs.replace(with_shared, host=self._capacity.choose(with_shared, sharing, new=True))
        except InsufficientCapacity:
            if not others:
                raise
            return msgspec.structs.replace(instance, host=self._capacity.choose(instance, others, new=True))

    def _with_networks(self, instance: Instance, hosts: tuple[str, ...]) -> tuple[str, ...]:
        """Return those hosts that have the networks of an instance. Raises `Invalid` if none has."""
        lacking = {host: self._hosts.lacks_network(host, instance.spec) for host in hosts}
        found = tuple(host for host, why in lacking.items() if not why)
        if not found and hosts:
            raise Invalid(
                " ".join(lacking.values()),
                remedy="Choose another host or network; `interlock host show` says which kinds a host has.",
            )
        return found

    def returning(self, instance: Instance) -> Instance:
        """Assign a host to an offloaded instance that is unshelved: its own, or another if that one is unavailable.

        A host is unavailable if it is disconnected, drained, or has another instance of one of its groups.

        Raises:
            Invalid: no host is available.
            InsufficientCapacity: it fits on none of several.
            InUse: its host has another instance of its group, and there is no other host.
        """
        probe = msgspec.structs.replace(instance, vm_state=VmState.STOPPED)
        try:
            self._hosts.require_open(instance.host)
            self._with_networks(instance, (instance.host,))
            self._capacity.check_apart(probe, instance)
        except (Invalid, NotFound, InUse):
            names = self._hosts.named(ANY)
            others = tuple(name for name in names if name != instance.host and self._reaches(name, instance))
            if not others:
                raise
            return msgspec.structs.replace(instance, host=self._capacity.choose(probe, others, new=True))
        return instance

    def _reaches(self, host: str, instance: Instance) -> bool:
        """Whether that host can access the instance's disks and has its networks, as far as known."""
        disks = self._reaches_root(host, instance) and self._reaches_volumes(host, instance)
        return disks and not self._hosts.lacks_network(host, instance.spec)

    def _reaches_root(self, host: str, instance: Instance) -> bool:
        shared = None if instance.spec is None else instance.spec.shared
        return shared is None or self._hosts.shares(host, Path(shared.path))

    def _reaches_volumes(self, host: str, instance: Instance) -> bool:
        """Whether the volumes that remain after the outstanding requests are accessible there."""
        leaving = {
            one.parameters.get(name)
            for one in instance.outstanding
            for name, refers in REFERENCES[one.operation]
            if refers is Refers.VOLUME_OUT
        }
        disks = () if instance.spec is None else instance.spec.disks
        return all(disk.id in leaving or self._hosts.reaches(host, disk.path) for disk in disks)

    def _encrypting(self, instance: Instance, hosts: tuple[str, ...]) -> tuple[str, ...]:
        """Return those hosts to which the instance can be live-migrated as far as encryption is required."""
        return tuple(name for name in hosts if self._hosts.can_encrypt(instance.host, name))

    def facts(self, instance: Instance, submission: Submission, targets: tuple[str, ...]) -> Facts:
        """Return the submission's facts, with those about the candidate targets added."""
        facts, operation = submission.facts, submission.operation
        if operation in MIGRATIONS and submission.parameters.get("host") == ANY:
            others = tuple(name for name in targets if name != instance.host and self._reaches(name, instance))
            able = others if operation is not Operation.LIVE_MIGRATE else self._encrypting(instance, others)
            facts = msgspec.structs.replace(facts, targets=able or others)
        elif operation in MIGRATIONS:
            facts = msgspec.structs.replace(
                facts,
                target_lacks_root=not all(self._reaches_root(name, instance) for name in targets),
                target_lacks_volumes=not all(self._reaches_volumes(name, instance) for name in targets),
                target_lacks_network=" ".join(self._hosts.lacks_network(name, instance.spec) for name in targets),
            )
        if facts.network is not None:
            why = self._hosts.lacks_kinds(instance.host, (facts.network.kind,))
            facts = msgspec.structs.replace(facts, host_lacks_network=why)
        lacking = {one for one, path in facts.volume_paths.items() if not self._hosts.reaches(instance.host, path)}
        if lacking:
            facts = msgspec.structs.replace(facts, host_lacks=frozenset(lacking))
        if operation is Operation.LIVE_MIGRATE:
            found = targets if facts.targets is None else facts.targets
            facts = msgspec.structs.replace(
                facts,
                sends_guests=self._hosts.sends_guests(instance.host),
                cannot_encrypt=bool(found) and not self._encrypting(instance, found),
            )
        return facts

    def bound(
        self,
        instance: Instance,
        submission: Submission,
        targets: tuple[str, ...],
        policy: CompiledPolicy,
        now_ms: int,
    ) -> Submission:
        """Return the submission with its target host filled in, if it moves the instance.

        For `any`: the target of an outstanding request of the same operation, or else a host with capacity if the gate
        would admit it.

        Raises:
            InsufficientCapacity: it fits on none of several.
        """
        if not targets:
            return submission
        if submission.parameters.get("host") != ANY:
            return _to(submission, targets[0])
        known = (*instance.held, *instance.outstanding)
        earlier = [one for one in known if one.operation is submission.operation]
        if earlier:
            return _to(submission, str(earlier[-1].parameters.get("host")))
        others = submission.facts.targets
        if not others:
            return submission
        if isinstance(admission.judge(instance, submission, policy, now_ms), Admitted | Held):
            return _to(submission, self._capacity.choose(instance, others))
        return _to(submission, others[0])


def _to(submission: Submission, host: str) -> Submission:
    return msgspec.structs.replace(submission, parameters={**submission.parameters, "host": host})
