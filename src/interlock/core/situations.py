"""The foreseen record of an instance after earlier requests: what preconditions are evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from interlock.core.networks import Network
from interlock.core.operations import Lane, Operation
from interlock.core.parameters import Refers
from interlock.core.records import Facts, Instance, Request, Spec
from interlock.core.references import MIGRATIONS, REFERENCES
from interlock.core.state_stack import Memory, resolve_target
from interlock.core.states import VmState

_GIB: Final = 1 << 30
_O = Operation
_SIZES: Final = ("vcpus", "memory_mib", "root_gib")


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """An instance after the earlier requests, and the parameters of the request to evaluate."""

    instance: Instance
    spec: Spec
    """With its size then, but its present disks and interfaces: see the next two."""
    disks: frozenset[str]
    """Ids of the volumes attached then."""
    interfaces: dict[str, str | None]
    """Ids of the interfaces attached then, without the first, with their MAC addresses; None if unknown."""
    first_network: Network | None
    """The network of the first interface then; None: a user network of its own."""
    forwards: frozenset[int]
    """The host ports forwarded then."""
    host: str
    vm_state: VmState
    memory: Memory
    moving: bool
    """Whether an interface is moved to another network before."""
    before: frozenset[Operation]
    """The state changes queued before it."""
    parameters: dict[str, Any]
    facts: Facts

    @property
    def settled(self) -> bool:
        """Whether the present record applies: no state change is queued before."""
        return not self.before


class Precondition(msgspec.Struct, frozen=True, kw_only=True):
    """One requirement of an operation on the record."""

    reason: str
    """Stable reason code for clients if it is not met."""
    broken: Callable[[Situation], bool]
    because: str
    """For people, with the placeholders of `situations.words_of`."""
    remedy: str


def root_bytes(spec: Spec) -> int:
    """Return the size of the root disk in bytes, which the next one must have at least."""
    return spec.root_gib * _GIB or (spec.image.size_bytes if spec.image.kind == "disk" else 0)


def situation(
    instance: Instance, spec: Spec, before: Sequence[Request], parameters: dict[str, Any], facts: Facts
) -> Situation:
    """Return the situation after the requests in `before`."""
    disks, interfaces = _plugged(spec, before)
    forwards = {one.host_port for one in spec.forwards}
    first = None if spec.primary is None else spec.primary.network
    host, vm_state, memory = instance.host, instance.vm_state, instance.state_stack
    states: set[Operation] = set()
    for request in before:
        given = request.parameters
        if request.operation is _O.RESIZE:
            spec = msgspec.structs.replace(spec, **{name: given[name] for name in _SIZES if given.get(name)})
        elif request.operation is _O.REVERT_RESIZE and instance.prior_spec is not None:
            spec = msgspec.structs.replace(spec, **{name: getattr(instance.prior_spec, name) for name in _SIZES})
        if request.operation is _O.ADD_FORWARD:
            forwards.add(given.get("host_port", 0))
        elif request.operation is _O.REMOVE_FORWARD:
            forwards.discard(given.get("host_port", 0))
        if request.operation in MIGRATIONS:
            host = given.get("host", host)
        if request.lane is Lane.STATE:
            states.add(request.operation)
            vm_state, memory = resolve_target(request.operation, vm_state, memory)
    return Situation(
        instance=instance,
        spec=spec,
        disks=disks,
        interfaces=interfaces,
        first_network=first,
        forwards=frozenset(forwards),
        host=host,
        vm_state=vm_state,
        memory=memory,
        moving=any(one.operation is _O.MOVE_INTERFACE for one in before),
        before=frozenset(states),
        parameters=parameters,
        facts=facts,
    )


def _plugged(spec: Spec, before: Sequence[Request]) -> tuple[frozenset[str], dict[str, str | None]]:
    """Return the ids of the volumes, and the interfaces with their MAC addresses, attached after `before`."""
    disks = {disk.id for disk in spec.disks}
    interfaces: dict[str, str | None] = {one.id: one.mac for one in spec.interfaces}
    for request in before:
        given = request.parameters
        if request.operation is _O.ATTACH_INTERFACE:
            mac = given.get("mac")
            interfaces[request.id] = mac.lower() if mac else None
        for name, refers in REFERENCES[request.operation]:
            match refers:
                case Refers.VOLUME_IN:
                    disks.add(given.get(name, ""))
                case Refers.VOLUME_OUT:
                    disks.discard(given.get(name, ""))
                case Refers.INTERFACE_OUT:
                    interfaces.pop(given.get(name, ""), None)
                case Refers.IMAGE | Refers.NEW_IMAGE | Refers.HOST | Refers.NETWORK:
                    pass
    return frozenset(disks), interfaces


_KINDS: Final = {"kernel": "a kernel", "iso": "an ISO"}


class _Words(dict[str, object]):
    """Placeholder values; `(any)` for a parameter that was not given."""

    def __missing__(self, key: str) -> str:
        return "(any)"


def words_of(of: Situation) -> dict[str, object]:
    """Return the values of the placeholders in precondition messages."""
    words = _Words(name=of.instance.name, host=of.host, root_gib=of.spec.root_gib, root_bytes=root_bytes(of.spec))
    words |= {"memory_mib": of.spec.memory_mib, "own_min_memory_mib": of.spec.image.min_memory_mib}
    words["wanted_mib"] = of.parameters.get("memory_mib")
    words["boots"] = _KINDS.get(of.spec.image.kind, of.spec.image.kind)
    if of.facts.image is not None:
        words |= {"image": of.facts.image.name, "min_memory_mib": of.facts.image.min_memory_mib}
    words |= {"target": of.parameters.get("host"), "target_lacks_network": of.facts.target_lacks_network}
    words |= {"host_lacks_network": of.facts.host_lacks_network}
    for name in ("volume", "old", "new", "interface", "mac", "network", "host_port"):
        if name in of.parameters:
            value = str(of.parameters[name])
            words[name] = of.facts.names.get(value, value)[:80]
    return words
