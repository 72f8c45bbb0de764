"""The rules of the packet filter for what is connected on a host.

The table of the family `bridge` checks what each tap sends, and decides what reaches it over its bridge. The table of
the family `inet` translates addresses, and decides what passes between a managed network, the host and the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv6Address, ip_address, ip_network

from interlock.core.networks import IngressRule, Network, NetworkKind
from interlock.core.specs import Forward
from interlock.networks.connections import (
    MANAGED_BRIDGES,
    Connection,
    Names,
    bridge_mac,
    gateways,
    link_local,
    managed_networks,
    ranges,
)
from interlock.networks.nftables import (
    ACCEPT,
    DROP,
    Chain,
    Expression,
    Hook,
    NamedSet,
    Rule,
    Table,
    by_map,
    field,
    match,
    meta,
    one_of,
    prefix,
)

_NO_HOST: tuple[Expression | str, ...] = (prefix("169.254.0.0", 16), "168.63.129.16", "100.100.100.200")
"""Where clouds answer the host with secrets of its own, apart from link-local addresses: Azure and Alibaba Cloud."""
_NO_HOST_6 = ("fd00:ec2::254", "fd20:ce::254")
"""The same for IPv6: AWS and Google Cloud."""
_LOOPBACK = prefix("127.0.0.0", 8)
_TCP_S = 3600
"""How long a guest's connection is remembered after its last packet, in s."""
_OTHER_S = 180
_BURST_KBYTES = 64
"""The least burst of what a guest sends: one packet of its virtual interface may be so large."""
_FILTER = -200
"""The priority of `filter` in the family bridge."""
_ICMP = one_of(["icmp", "ipv6-icmp"])
_NEIGHBOR = ("nd-router-solicit", "nd-neighbor-solicit", "nd-neighbor-advert")
_MULTICAST_6 = ("mld-listener-query", "mld-listener-report", "mld-listener-done", "mld2-listener-report")
_ERRORS = ("destination-unreachable", "time-exceeded", "parameter-problem")
_CHAINS_MAX = 4096
_FROM_GUESTS = "senders"
_TO_GUESTS = "receivers"
_FROM_HOST = "receivers_from_host"

_FROM_BRIDGE = "from_bridge"
_TO_BRIDGE = "to_bridge"
_TO_HOST = "to_host"
_TO_GUEST = {4: "to_guest", 6: "to_guest_6"}
_ANSWERS: tuple[Rule, ...] = (
    (match({"ct": {"key": "direction"}}, "reply"), ACCEPT),
    (match({"ct": {"key": "state"}}, "related", "in"), ACCEPT),
)
"""What belongs to a connection from the other side. Who opened it is judged with each packet, so that a rule that is
removed ends what it allowed."""
_RETURN: Expression = {"return": None}


# --------------------------------------------------------------------------------------------------------- bridge


def bridge_table(names: Names, connections: Sequence[Connection]) -> Table | None:
    """Return the table of the family `bridge`; None if nothing is connected."""
    if not connections:
        return None
    chains: dict[str, Chain] = {}
    sets: dict[str, NamedSet] = {}
    senders: dict[str, str | None] = {}
    receivers: dict[str, str | None] = {}
    from_host: dict[str, str | None] = {}
    members: dict[str, dict[str, str | None]] = {}
    for one in connections:
        tap = names.tap(one.instance_id, one.interface.id)
        chains[f"from_{tap}"] = _sender(tap, one)
        senders[tap] = f"from_{tap}"
        if not one.is_filtered:
            continue
        chains[f"to_{tap}"] = _receiver(tap, one)
        receivers[tap] = f"to_{tap}"
        if one.network.kind is NetworkKind.BRIDGE:
            from_host[tap] = f"to_{tap}"
            members.setdefault(_members(one.network), {})[tap] = None
        for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
            key = (kind, kind, "inet_proto", "inet_service", "inet_service")
            sets[_flows(tap, version)] = NamedSet(type=key, grows=True)
    sets |= {name: NamedSet(type="ifname", elements=taps) for name, taps in members.items()}
    for name, elements in ((_FROM_GUESTS, senders), (_TO_GUESTS, receivers), (_FROM_HOST, from_host)):
        sets[name] = NamedSet(type="ifname", elements=elements, is_map=True)
    chains["from_guests"] = Chain(
        hook=Hook(hook="prerouting", prio=_FILTER),
        rules=(by_map(meta("iifname"), _FROM_GUESTS), (match(meta("iifname"), f"{names.taps}*"), DROP)),
    )
    chains["to_guests"] = Chain(hook=Hook(hook="forward", prio=_FILTER), rules=(by_map(meta("oifname"), _TO_GUESTS),))
    chains["host_to_guests"] = Chain(
        hook=Hook(hook="output", prio=_FILTER), rules=(by_map(meta("oifname"), _FROM_HOST),)
    )
    return Table(chains=chains, sets=sets)


# With hundreds of guests, most chains are as before: they are made once, and compared by identity.
@functools.lru_cache(maxsize=_CHAINS_MAX)
def _sender(tap: str, one: Connection) -> Chain:
    return Chain(rules=(*_sent(tap, one),))


@functools.lru_cache(maxsize=_CHAINS_MAX)
def _receiver(tap: str, one: Connection) -> Chain:
    return Chain(rules=(*_received(tap, one),))


@functools.lru_cache(maxsize=_CHAINS_MAX)
def _guest(rules: tuple[IngressRule, ...]) -> Chain:
    return Chain(rules=(*_ingress(rules), (DROP,)))


def _members(network: Network) -> str:
    return f"members_{network.id.replace('-', '')}"


def _flows(tap: str, version: int) -> str:
    return f"flows{version}_{tap}"


def _ether(kind: str | int) -> Expression:
    return match(field("ether", "type"), kind)


def _sent(tap: str, one: Connection) -> Iterator[Rule]:
    """Yield the rules for what a guest sends: from its own addresses, and nothing that servers and routers send."""
    mac = one.interface.mac.lower()
    yield (match(field("ether", "saddr"), mac, "!="), DROP)
    yield (match(field("ether", "type"), one_of(["8021q", "8021ad"])), DROP)
    if one.interface.outbound_kbit is not None:
        yield _limit(one.interface.outbound_kbit)
    yield (_ether("arp"), match(field("arp", "saddr ether"), mac, "!="), DROP)
    checked = one.network.kind is NetworkKind.MANAGED
    four, six = one.addresses(4), one.addresses(6)
    if four or checked:
        yield (_ether("arp"), match(field("arp", "saddr ip"), one_of(["0.0.0.0", *four]), "!="), DROP)  # noqa: S104
    yield (_ether("arp"), ACCEPT)
    yield (_ether(0x8035), ACCEPT)  # RARP: how QEMU announces a guest that has migrated
    yield from _sent_4(four, checked=checked or bool(four))
    yield from _sent_6((*six, link_local(mac)), checked=checked or bool(six))
    if one.is_filtered:
        yield from _remembered(tap)
    yield (match(field("ether", "type"), one_of(["ip", "ip6"])), ACCEPT)
    yield (DROP,)


def _limit(kbit: int) -> Rule:
    kbytes = max(1, kbit // 8)
    burst = max(_BURST_KBYTES, kbytes // 10)
    rate = {"rate": kbytes, "rate_unit": "kbytes", "per": "second", "burst": burst, "burst_unit": "kbytes"}
    return ({"limit": {**rate, "inv": True}}, DROP)


def _sent_4(addresses: Sequence[str], *, checked: bool) -> Iterator[Rule]:
    yield (match(field("ip", "protocol"), "udp"), match(field("udp", "sport"), 67), DROP)
    yield (
        match(field("ip", "saddr"), "0.0.0.0"),  # noqa: S104 - who asks for an address has none
        match(field("udp", "sport"), 68),
        match(field("udp", "dport"), 67),
        ACCEPT,
    )
    yield (match(field("ip", "daddr"), one_of(_NO_HOST)), DROP)
    if checked:
        allowed = one_of(addresses) if addresses else "0.0.0.0"  # noqa: S104 - none
        yield (match(field("ip", "saddr"), allowed, "!="), DROP)
        yield (match(field("ip", "saddr"), "0.0.0.0"), DROP)  # noqa: S104


def _sent_6(addresses: Sequence[str], *, checked: bool) -> Iterator[Rule]:
    yield (match(field("icmpv6", "type"), one_of(["nd-router-advert", "nd-redirect"])), DROP)
    yield (_ether("ip6"), match(meta("l4proto"), "udp"), match(field("udp", "sport"), 547), DROP)
    yield (match(field("ip6", "daddr"), one_of(_NO_HOST_6)), DROP)
    if not checked:
        return
    without = one_of(["nd-neighbor-solicit", "mld2-listener-report"])
    yield (match(field("ip6", "saddr"), "::"), match(field("icmpv6", "type"), without), ACCEPT)
    yield (match(field("ip6", "saddr"), one_of(addresses), "!="), DROP)
    advertises = match(field("icmpv6", "type"), "nd-neighbor-advert")
    for address in addresses:
        number = int(IPv6Address(address)).to_bytes(16)
        words = [int.from_bytes(number[start : start + 4]) for start in range(0, 16, 4)]
        target = [
            match({"payload": {"base": "th", "offset": 64 + 32 * place, "len": 32}}, word)
            for place, word in enumerate(words)
        ]
        yield (advertises, *target, ACCEPT)
    yield (advertises, DROP)


def _remembered(tap: str) -> Iterator[Rule]:
    """Yield the rules that remember what a guest sends, so that answers reach it.

    Connection tracking of bridges would do this, but some kernels have none.
    """
    for protocols, seconds in ((["tcp"], _TCP_S), (["udp", "udplite", "sctp", "dccp"], _OTHER_S)):
        for version, protocol in ((4, "ip"), (6, "ip6")):
            key = _flow(protocol, "saddr", "daddr", "sport", "dport")
            update = {
                "op": "update",
                "elem": {"elem": {"val": key, "timeout": seconds}},
                "set": f"@{_flows(tap, version)}",
            }
            yield (_ether(protocol), match(meta("l4proto"), one_of(protocols)), {"set": update})


def _flow(protocol: str, own: str, other: str, own_port: str, other_port: str) -> Expression:
    ports = [field("th", own_port), field("th", other_port)]
    return {"concat": [field(protocol, own), field(protocol, other), meta("l4proto"), *ports]}


def _received(tap: str, one: Connection) -> Iterator[Rule]:
    """Yield the rules for what reaches a guest over its bridge."""
    network = one.network
    yield (_ether("arp"), ACCEPT)
    if network.kind is NetworkKind.BRIDGE:
        from_inside = match(meta("iifname"), f"@{_members(network)}")
        if not network.closed_inside:
            yield (from_inside, ACCEPT)
            for version, protocol in ((4, "ip"), (6, "ip6")):
                for found in ranges(network, version):
                    yield (match(field(protocol, "saddr"), prefix(str(found[0]), found.prefixlen)), ACCEPT)
        elif network.open_outside:
            yield (match(meta("iifname"), f"@{_members(network)}", "!="), ACCEPT)
    yield (match(field("icmp", "type"), one_of(["echo-reply", *_ERRORS])), ACCEPT)
    types = [*_NEIGHBOR, "nd-router-advert", "mld-listener-query", "echo-reply", "packet-too-big", *_ERRORS]
    yield (match(field("icmpv6", "type"), one_of(types)), ACCEPT)
    yield (match(field("udp", "sport"), 67), match(field("udp", "dport"), 68), ACCEPT)
    yield (match(field("udp", "sport"), 547), match(field("udp", "dport"), 546), ACCEPT)
    # Of a packet in fragments, only the first has ports; without it, the rest is discarded by the guest.
    yield (match({"&": [field("ip", "frag-off"), 0x1FFF]}, 0, "!="), ACCEPT)
    yield (match({"exthdr": {"name": "frag", "field": "frag-off"}}, 0, "!="), ACCEPT)
    for version, protocol in ((4, "ip"), (6, "ip6")):
        yield (match(_flow(protocol, "daddr", "saddr", "dport", "sport"), f"@{_flows(tap, version)}"), ACCEPT)
    yield from _ingress(one.interface.ingress)
    yield (DROP,)


def _ingress(rules: Iterable[IngressRule]) -> Iterator[Rule]:
    """Yield the rules of an interface's security groups."""
    for rule in rules:
        parts: list[Expression] = []
        if rule.source:
            source = ip_network(rule.source)
            protocol = "ip" if source.version == 4 else "ip6"  # noqa: PLR2004
            parts.append(match(meta("protocol"), protocol))
            if source.prefixlen:
                parts.append(match(field(protocol, "saddr"), prefix(str(source[0]), source.prefixlen)))
        if rule.protocol == "icmp":
            parts.append(match(meta("l4proto"), _ICMP))
        elif rule.protocol != "any":
            parts.append(match(meta("l4proto"), rule.protocol))
            if rule.first_port is not None:
                last = rule.first_port if rule.last_port is None else rule.last_port
                parts.append(match(field(rule.protocol, "dport"), {"range": [rule.first_port, last]}))
        yield (*parts, ACCEPT)


# ----------------------------------------------------------------------------------------------------------- inet


def inet_table(names: Names, connections: Sequence[Connection]) -> Table | None:
    """Return the table of the family `inet`; None if nothing is connected."""
    if not connections:
        return None
    bridges = {names.bridge(network): network for network in managed_networks(connections).values()}
    outsiders = [one.interface.mac.lower() for one in connections if one.network.kind is NetworkKind.BRIDGE]
    sets = {
        "bridges": NamedSet(type="ifname", elements=dict.fromkeys(bridges)),
        "outsiders": NamedSet(type="ether_addr", elements=dict.fromkeys(outsiders)),
    }
    chains: dict[str, Chain] = {"outsider_to_host": Chain(rules=(*_outsider_to_host(),))}
    for map_name, what in ((_TO_HOST, "host"), (_FROM_BRIDGE, "out"), (_TO_BRIDGE, "in")):
        elements = {name: f"{what}_{name}" for name in bridges}
        sets[map_name] = NamedSet(type="ifname", elements=elements, is_map=True)
    for name, network in bridges.items():
        chains[f"host_{name}"] = Chain(rules=(*_to_host(network),))
        chains[f"out_{name}"] = Chain(rules=(*_outbound(name, network),))
        chains[f"in_{name}"] = Chain(rules=(*_inbound(name, network),))
    taps = {names.tap(one.instance_id, one.interface.id): one for one in connections}
    routed = {tap: one for tap, one in taps.items() if one.network.kind is NetworkKind.MANAGED}
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        found = {address: f"guest_{tap}" for tap, one in routed.items() for address in one.addresses(version)}
        sets[_TO_GUEST[version]] = NamedSet(type=kind, elements=found, is_map=True)
    chains |= {f"guest_{tap}": _guest(one.interface.ingress) for tap, one in routed.items()}
    forwards = [
        (one, forward)
        for one in routed.values()
        for forward in one.forwards
        if one.addresses(ip_address(forward.host_address).version)
    ]
    return Table(chains=chains | _hooks(bridges, forwards), sets=sets)


def _hooks(bridges: Mapping[str, Network], forwards: Sequence[tuple[Connection, Forward]]) -> dict[str, Chain]:
    """Return the chains that the kernel calls."""
    from_bridges = match(meta("iifname"), "@bridges")
    from_outsiders = match(field("ether", "saddr"), "@outsiders")
    here = [_translated(one, forward) for one, forward in forwards]
    beyond = [
        _translated(one, forward) for one, forward in forwards if not ip_address(forward.host_address).is_loopback
    ]
    return {
        # Answers to the host's loopback are addressed to the gateway here: their translation comes later.
        "from_wire": Chain(
            hook=Hook(hook="prerouting", prio=-300),
            rules=((from_bridges, match(field("ip", "daddr"), _LOOPBACK), DROP),),
        ),
        "forwards": Chain(
            hook=Hook(type="nat", hook="prerouting", prio=-100),
            rules=((from_bridges, _RETURN), (from_outsiders, _RETURN), *beyond),
        ),
        "forwards_of_host": Chain(hook=Hook(type="nat", hook="output", prio=-100), rules=(*here,)),
        "masquerade": Chain(
            hook=Hook(type="nat", hook="postrouting", prio=100),
            rules=(*(rule for name, network in bridges.items() for rule in _masqueraded(name, network)),),
        ),
        "forward": Chain(
            hook=Hook(hook="forward", prio=0),
            rules=(
                *_ANSWERS,
                by_map(meta("iifname"), _FROM_BRIDGE),
                by_map(meta("oifname"), _TO_BRIDGE),
            ),
        ),
        "input": Chain(
            hook=Hook(hook="input", prio=0),
            rules=(by_map(meta("iifname"), _TO_HOST), (from_outsiders, {"jump": {"target": "outsider_to_host"}})),
        ),
    }


def is_local(forward: Forward) -> bool:
    """Whether a forward is reached at the host's loopback."""
    host = ip_address(forward.host_address)
    return host.is_loopback or host.is_unspecified


def _translated(one: Connection, forward: Forward) -> Rule:
    host = ip_address(forward.host_address)
    family, protocol = ("ipv4", "ip") if host.version == 4 else ("ipv6", "ip6")  # noqa: PLR2004
    local = match({"fib": {"result": "type", "flags": ["daddr"]}}, "local")
    there = [local] if host.is_unspecified else [match(field(protocol, "daddr"), str(host))]
    if host.is_unspecified and host.version == 6:  # noqa: PLR2004
        there.append(match(field("ip6", "daddr"), "::1", "!="))  # no address of a bridge answers it
    to = {"family": protocol, "addr": one.addresses(host.version)[0], "port": forward.guest_port}
    port = match(field(forward.protocol, "dport"), forward.host_port)
    return (match(meta("nfproto"), family), *there, port, {"dnat": to})


def _masqueraded(bridge: str, network: Network) -> Iterator[Rule]:
    to_bridge, beyond = match(meta("oifname"), bridge), match(meta("oifname"), bridge, "!=")
    yield (to_bridge, match(field("ip", "saddr"), _LOOPBACK), {"masquerade": None})
    if not network.outbound:
        return
    for version, protocol in ((4, "ip"), (6, "ip6")):
        for found in ranges(network, version):
            # Addresses of an own global prefix are routed to the host.
            if version == 4 or found.is_private:  # noqa: PLR2004
                source = match(field(protocol, "saddr"), prefix(str(found[0]), found.prefixlen))
                yield (source, beyond, {"masquerade": None})


def _outbound(bridge: str, network: Network) -> Iterator[Rule]:
    """Yield the rules for what a managed network sends to be routed."""
    same = match(meta("oifname"), bridge)
    yield (same, _RETURN if network.closed_inside else ACCEPT)
    yield (match(meta("oifname"), MANAGED_BRIDGES), DROP)
    # Ports of the host that lead elsewhere, ours and those of others, are not for guests.
    yield (match({"ct": {"key": "direction"}}, "original"), match({"ct": {"key": "status"}}, "dnat", "in"), DROP)
    if not network.outbound:
        yield (DROP,)


def _inbound(bridge: str, network: Network) -> Iterator[Rule]:
    """Yield the rules for what is routed to a managed network."""
    yield (match({"ct": {"key": "status"}}, "dnat", "in"), ACCEPT)
    if network.open_outside:
        yield (match(meta("iifname"), bridge, "!="), ACCEPT)
    yield by_map(field("ip", "daddr"), _TO_GUEST[4])
    yield by_map(field("ip6", "daddr"), _TO_GUEST[6])
    yield (DROP,)


def _to_host(network: Network) -> Iterator[Rule]:
    """Yield the rules for what a managed network sends to its host: the services of the gateway, at its address."""
    gateway, gateway_6 = gateways(network, 4), (*gateways(network, 6), link_local(bridge_mac(network)))
    yield from _ANSWERS
    yield (match(field("udp", "sport"), 68), match(field("udp", "dport"), 67), ACCEPT)
    for protocol, addresses in (("ip", gateway), ("ip6", gateway_6)):
        if addresses:
            to_gateway = match(field(protocol, "daddr"), one_of(addresses))
            for transport in ("udp", "tcp"):
                yield (to_gateway, match(field(transport, "dport"), 53), ACCEPT)
            yield (to_gateway, match(field("icmp" if protocol == "ip" else "icmpv6", "type"), "echo-request"), ACCEPT)
    yield (match(field("udp", "dport"), 547), ACCEPT)
    yield (match(field("icmpv6", "type"), one_of([*_NEIGHBOR, *_MULTICAST_6])), ACCEPT)
    yield (DROP,)


def _outsider_to_host() -> Iterator[Rule]:
    """Yield the rules for what guests on a bridge of the host send to it: it may be their gateway."""
    yield from _ANSWERS
    yield (match(field("udp", "dport"), one_of([53, 67, 547])), ACCEPT)
    yield (match(field("tcp", "dport"), 53), ACCEPT)
    yield (match(field("icmp", "type"), "echo-request"), ACCEPT)
    yield (match(field("icmpv6", "type"), one_of(["echo-request", *_NEIGHBOR, *_MULTICAST_6])), ACCEPT)
    yield (DROP,)
