"""What the processes of user networks may reach: rules of nftables by their user ids, in a table of their own.

passt connects as an ordinary program of the host does. By itself it keeps a guest from the host's loopback address,
and from no other address.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import ip_address
from typing import Final

from interlock.networks import nftables
from interlock.networks.connections import MANAGED_BRIDGES, Names
from interlock.networks.nftables import (
    ACCEPT,
    Chain,
    Expression,
    Hook,
    NamedSet,
    Rule,
    Table,
    field,
    match,
    meta,
    one_of,
    prefix,
)

_FAMILY: Final = "inet"
_DNS: Final = 53
_REFUSE: Final[Expression] = {"reject": {"type": "icmpx", "expr": "port-unreachable"}}
"""The guest gets an answer at once, as from a closed port."""
_OWN_ADDRESSES: Final = ("local", "broadcast", "anycast", "multicast")
_METADATA: Final = ("100.100.100.200", "168.63.129.16")
"""Services of clouds outside of the link-local range that give a host its secrets: Alibaba Cloud's, Azure's."""
_METADATA_6: Final = "fd00:ec2::254"
"""The same of AWS."""


class UserFilter:
    """Refuses what passt itself cannot: the host's addresses, metadata services, and all outbound where that is closed.

    Args:
        tag: as of `HostNetworks`.
        first: the first user id of VMs on this host; passt processes run as one of them, and nothing else that has a
            network.
        count: how many there are.
    """

    def __init__(self, tag: str, first: int, count: int) -> None:
        self._name = f"{Names(tag).table}_user"
        self._users = [first, first + count - 1]
        self._applied: Table | None = None
        self._is_known = False

    async def settle(self, users: Mapping[int, bool], resolvers: Collection[str], *, anew: bool = False) -> None:
        """Make the rules of the processes that run or are about to be started; none are left without any.

        Nothing is run if the rules are as applied last, as they are when one more user may connect outbound.

        Args:
            users: by user id, whether connections to the outside are allowed.
            resolvers: the addresses of the host's DNS servers, which may be the host's own.
            anew: apply them also if they are as applied last: somebody may have changed them.

        Raises:
            OperationRejected: the host's nftables cannot be used.
        """
        wanted = _table(self._users, users, resolvers) if users else None
        if self._is_known and not anew and wanted == self._applied:
            return
        if wanted is None and not await nftables.exists(_FAMILY, self._name):
            self._applied, self._is_known = None, True
            return
        before = None if anew or not self._is_known else self._applied
        self._is_known = False
        await nftables.apply(nftables.changes(_FAMILY, self._name, before, wanted))
        self._applied, self._is_known = wanted, True

    async def is_changed(self) -> bool:
        """Whether somebody has changed the rules that were applied last."""
        return self._applied is not None and await nftables.is_changed(_FAMILY, self._name, self._applied)


def _table(range_of_users: list[int], users: Mapping[int, bool], resolvers: Collection[str]) -> Table:
    closed = {str(user): None for user, outbound in users.items() if not outbound}
    by_version: dict[int, dict[str, None]] = {4: {}, 6: {}}
    for address in resolvers:
        by_version[ip_address(address).version][address] = None
    return Table(
        sets={
            "closed": NamedSet(type="uid", elements=closed),
            "resolvers": NamedSet(type="ipv4_addr", elements=by_version[4]),
            "resolvers6": NamedSet(type="ipv6_addr", elements=by_version[6]),
        },
        chains={
            "users": Chain(rules=tuple(_of_users())),
            "sent": Chain(
                hook=Hook(hook="output", prio=0),
                rules=((match(meta("skuid"), {"range": range_of_users}), {"jump": {"target": "users"}}),),
            ),
        },
    )


def _of_users() -> list[Rule]:
    to_dns = (
        match(meta("l4proto"), one_of(("tcp", "udp"))),
        match({"payload": {"protocol": "th", "field": "dport"}}, _DNS),
    )
    own = match({"fib": {"result": "type", "flags": ["daddr"]}}, one_of(_OWN_ADDRESSES))
    link_local = one_of((prefix("169.254.0.0", 16), *_METADATA))
    link_local_6 = one_of((prefix("fe80::", 10), _METADATA_6))
    return [
        # Answers of forwarded ports, to whoever connected to them.
        (match({"ct": {"key": "direction"}}, "reply"), ACCEPT),
        (match(meta("skuid"), "@closed"), _REFUSE),
        (match(field("ip", "daddr"), "@resolvers"), *to_dns, ACCEPT),
        (match(field("ip6", "daddr"), "@resolvers6"), *to_dns, ACCEPT),
        (own, _REFUSE),
        # Ports of the host that lead elsewhere have another address by now, and managed networks are the host's own.
        (match({"ct": {"key": "status"}}, "dnat", "in"), _REFUSE),
        (match(meta("oifname"), MANAGED_BRIDGES), _REFUSE),
        (match(field("ip", "daddr"), link_local), _REFUSE),
        (match(field("ip6", "daddr"), link_local_6), _REFUSE),
    ]
