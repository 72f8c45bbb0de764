"""Networks: create, list, delete, and lease addresses of them to instances."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from interlock.core import networks
from interlock.core.errors import InUse, Invalid, NameTaken, not_found
from interlock.core.networks import Network, NetworkKind, Subnet
from interlock.core.operations import Operation
from interlock.core.parameters import check_name, group_names
from interlock.core.records import Instance, Interface, Spec, Submission
from interlock.core.resource_claims import LEASING
from interlock.core.roles import Role
from interlock.core.specs import PRIMARY, with_groups
from interlock.ports import Store, Tally
from interlock.service.auth import Caller
from interlock.service.cloud_init import with_network_config
from interlock.service.quotas import Quotas
from interlock.service.request_models import NewInterface, NewNetwork
from interlock.service.security_groups import SecurityGroups


class Networks:
    """Operations on networks: a project's own, and those that an admin shares with all.

    All are in memory, so that a decision about an instance sees at once that one is being deleted.
    """

    def __init__(self, store: Store, quotas: Quotas, new_id: Callable[[], str]) -> None:
        self._store = store
        self._quotas = quotas
        self._new_id = new_id
        self._networks: dict[str, Network] = {}
        self._creating = asyncio.Lock()
        self.security_groups = SecurityGroups(store, quotas, new_id)

    async def open(self) -> None:
        """Load the networks and the security groups. The store must be open."""
        await self.security_groups.open()
        for network in await self._store.networks.all():
            self._remember(network)

    def _remember(self, network: Network) -> None:
        self._networks[network.id] = network
        if network.project is not None:
            self._quotas.networks[network.project] += 1

    def _forget(self, network: Network) -> None:
        del self._networks[network.id]
        if network.project is not None:
            self._quotas.networks[network.project] -= 1

    # ----------------------------------------------------------------------------------------------- administration

    def list(self, caller: Caller) -> tuple[Network, ...]:
        """Return the networks of the caller's project and the shared ones; for an admin, all."""
        every = self._networks.values()
        return tuple(one for one in every if caller.role is Role.ADMIN or one.project in {None, caller.project})

    def find(self, caller: Caller, reference: str) -> Network:
        """Return a network by id or name; one of the caller's project before a shared one. Raises `NotFound`."""
        found = [
            one
            for one in self.list(caller)
            if one.id == reference or (one.name == reference and one.project in {None, caller.project})
        ]
        if not found:
            raise not_found("Network", reference)
        return min(found, key=lambda one: one.project is None)

    def users(self, network: Network) -> int:
        """Return how many instances have an interface in the network, or will have."""
        return self._store.tally(Tally.NETWORKS, network.id)

    async def create(self, caller: Caller, new: NewNetwork) -> Network:
        """Create a network.

        Raises:
            Forbidden: a shared network, or one of the kind `bridge`, and the caller is not an admin.
            Invalid: names the field and what was expected; also if a subnet overlaps that of another network.
            NameTaken, QuotaExceeded, StoreFull.
        """
        caller.require(Role.MEMBER, "create networks")
        if new.shared:
            caller.require(Role.ADMIN, "create shared networks")
        if new.kind is NetworkKind.BRIDGE:
            caller.require(Role.ADMIN, "create networks of the kind bridge")
        check_name(new.name, "name")
        async with self._creating:
            network = self._made(caller, new)
            if any((one.project, one.name) == (network.project, network.name) for one in self._networks.values()):
                raise NameTaken(f"A network named {network.name} already exists.", remedy="Choose another name.")
            if network.project is not None:
                self._quotas.check_network(network.project, network.name)
            self._remember(network)
            try:
                await self._store.networks.put(network)
            except BaseException:
                self._forget(network)
                raise
        return network

    def _made(self, caller: Caller, new: NewNetwork) -> Network:
        managed = new.kind is NetworkKind.MANAGED
        subnets = tuple(networks.subnet_of(one.prefix, one.gateway) for one in new.subnets)
        if managed and not subnets:
            subnets = (networks.free_subnet(self._networks.values()),)
        network = Network(
            id=self._new_id(),
            name=new.name,
            kind=new.kind,
            project=None if new.shared else caller.project,
            bridge=new.bridge,
            vlan=new.vlan,
            mtu=new.mtu,
            outbound=new.outbound,
            subnets=subnets,
            domain=new.domain or (networks.domain_of(new.name) if managed else ""),
            closed_inside=new.closed_inside,
            open_outside=new.open_outside,
            created_at_ms=self._store.now_ms(),
            created_by=caller.name,
        )
        networks.check_network(network)
        for subnet in subnets:
            self._check_overlap(caller, subnet)
        return network

    def _check_overlap(self, caller: Caller, subnet: Subnet) -> None:
        """Raise `Invalid` if a host cannot have the subnet because another network has a part of it."""
        other = networks.overlapping(subnet, self._networks.values())
        if other is not None:
            named = f"the network {other.name}" if other in self.list(caller) else "another network"
            raise Invalid(
                f"subnet: {subnet.prefix} overlaps {named}.",
                remedy="Choose another range, or omit it to have a free one chosen.",
            )

    async def delete(self, caller: Caller, reference: str) -> None:
        """Delete a network that no instance uses. Raises `NotFound`, `Forbidden`, `InUse`."""
        caller.require(Role.MEMBER, "delete networks")
        network = self.find(caller, reference)
        if network.project is None:
            caller.require(Role.ADMIN, "delete shared networks")
        users = self.users(network)
        if users:
            raise InUse(
                f"The network {network.name} is in use by {users} VM{'' if users == 1 else 's'}.",
                remedy="Delete them, or detach or move their interfaces first.",
            )
        self._forget(network)
        try:
            await self._store.networks.delete(network.id)
        except BaseException:
            self._remember(network)
            raise

    # ------------------------------------------------------------------------------------------- leases of instances

    def wanted(self, caller: Caller, new: Sequence[NewInterface]) -> tuple[Interface, ...]:
        """Return the interfaces of a new instance, with those addresses that the caller chose.

        Raises `NotFound`, `Invalid`.
        """
        return tuple(
            Interface(
                id=self._new_id() if number else PRIMARY,
                mac=(one.mac or "").lower(),
                network=self.find(caller, one.network),
                addresses=one.addresses,
                inbound_kbit=one.inbound_kbit,
                outbound_kbit=one.outbound_kbit,
                ingress=networks.ingress_of(one.allow),
                security_groups=tuple(dict.fromkeys(one.security_groups)),
            )
            for number, one in enumerate(new)
        )

    def leased(self, spec: Spec, instance_id: str, name: str, project: str) -> Spec:
        """Return the spec of a new instance with its addresses, and cloud-init's network configuration for them.

        Call it in the decision that commits it.

        Raises:
            NotFound: a network was deleted, or there is no such security group.
            Invalid: an address is not in its network.
            InUse: an address is leased to another interface.
            InsufficientCapacity: a network has no free address.
        """
        chosen: set[tuple[str, str]] = set()
        leased = []
        rules = self.security_groups.rules(project)
        for one in spec.all_interfaces:
            if one.network is not None:
                seed = instance_id if one.id == PRIMARY else one.id
                named = networks.hostname_in(one.network, name, project)
                one = self._lease(  # noqa: PLW2901
                    msgspec.structs.replace(one, hostname=named), one.network.id, seed, instance_id, chosen
                )
            leased.append(with_groups(one, rules, own=one.ingress))
        first = leased[0] if spec.primary is not None else None
        return msgspec.structs.replace(
            spec,
            primary=first,
            interfaces=tuple(leased[first is not None :]),
            seed=with_network_config(spec.seed, name, leased),
        )

    def bound(self, instance: Instance, submission: Submission) -> Submission:
        """Return a submission with the addresses that it leases, if it connects an interface to a network.

        Raises as `leased`.
        """
        given = submission.parameters
        if submission.operation is Operation.SET_INTERFACE:
            self.security_groups.check(instance.project, group_names(given.get("security_groups") or ""))
        network_id = given.get("network") if submission.operation in LEASING else None
        if not network_id:
            if given.get("address"):
                raise Invalid("address: needs a network.", remedy="Name the network of the address.")
            return submission
        wanted = tuple(filter(None, given.get("address", "").split(",")))
        interface = Interface(id=submission.request_id, mac=given.get("mac", "").lower(), addresses=wanted)
        seed = submission.request_id
        if submission.operation is Operation.MOVE_INTERFACE:
            assert instance.spec is not None
            macs = {one.id: one.mac for one in instance.spec.all_interfaces}
            interface = msgspec.structs.replace(interface, mac=macs.get(given["interface"], ""))
            seed = instance.id
        leased = self._lease(interface, network_id, seed, instance.id, set())
        bound = {**given, "address": ",".join(leased.addresses)} if leased.addresses else given
        if submission.operation is Operation.ATTACH_INTERFACE:
            bound = {**bound, "mac": leased.mac}
        return msgspec.structs.replace(submission, parameters=bound)

    def _lease(
        self, interface: Interface, network_id: str, seed: str, instance_id: str, chosen: set[tuple[str, str]]
    ) -> Interface:
        """Return an interface with a network and with addresses of it; its MAC address is derived from `seed`.

        `chosen` is what the same decision leases besides. Raises as `leased`.
        """
        network = self._networks.get(network_id)
        if network is None:
            raise not_found("Network", network_id)
        taken = _Taken(self._store, network_id, chosen)
        others = self._store.lease_holder(network_id, interface.mac) not in {None, instance_id}
        if others or (network_id, interface.mac) in chosen:
            raise InUse(
                f"The MAC address {interface.mac} is in use in the network {network.name}.",
                remedy="Choose another, or omit it to have one generated.",
            )
        mac = interface.mac or networks.mac_of(seed, taken)
        addresses = networks.lease(network, taken, interface.addresses)
        chosen.update((network_id, address) for address in (mac, *addresses))
        return msgspec.structs.replace(interface, mac=mac, network=network, addresses=addresses)


class _Taken:
    """The addresses of a network that are leased, with those that the same decision leases."""

    def __init__(self, store: Store, network_id: str, chosen: set[tuple[str, str]]) -> None:
        self._store = store
        self._network_id = network_id
        self._chosen = chosen

    def __contains__(self, address: object) -> bool:
        return (self._network_id, address) in self._chosen or (
            self._store.lease_holder(self._network_id, str(address)) is not None
        )
