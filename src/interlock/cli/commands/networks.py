"""`interlock network` and `interlock security-group`: create, list, show, change and delete."""

from __future__ import annotations

import click

from interlock.api.schemas.networks import Network, NetworkList, SecurityGroup, SecurityGroupList
from interlock.cli.client.paths import NETWORKS, SECURITY_GROUPS, path_of
from interlock.cli.completion import completer
from interlock.cli.context import Invocation, with_json
from interlock.cli.output.confirmation import confirm, yes_option
from interlock.cli.output.formatting import age
from interlock.core.networks import NetworkKind
from interlock.service.request_models import NewNetwork, NewSecurityGroup, NewSubnet, SecurityGroupChange


@click.group("network")
def network_commands() -> None:
    """Networks, to which the interfaces of VMs are connected."""


@network_commands.command("create")
@click.argument("name")
@click.option(
    "--subnet",
    "subnets",
    multiple=True,
    metavar="PREFIX[,GATEWAY]",
    help="Addresses of a managed network, such as 10.7.0.0/24 or fd00:7::/64. Once for IPv4, once for IPv6. Default: a "
    "free range of IPv4.",
)
@click.option("--bridge", help="A bridge that the hosts have, for a network of the kind bridge. For admins.")
@click.option("--vlan", type=click.IntRange(1, 4094), help="With --bridge: VLAN of a bridge that filters VLANs.")
@click.option(
    "--kind",
    type=click.Choice([kind.value for kind in NetworkKind]),
    help="Kind of network. Default: bridge with --bridge, else managed.",
)
@click.option("--mtu", type=click.IntRange(min=1), help="MTU. Default: that of the bridge.")
@click.option("--domain", default="", help="DNS domain of its guests. Default: NAME.internal.")
@click.option("--no-outbound", is_flag=True, help="Guests reach nothing beyond the network.")
@click.option("--closed-inside", is_flag=True, help="Guests reach each other only as security groups allow.")
@click.option("--open-outside", is_flag=True, help="Guests are reached from outside, whatever security groups say.")
@click.option("--shared", is_flag=True, help="All projects may use it. For admins.")
@with_json
def create_network(
    invocation: Invocation,
    *,
    name: str,
    subnets: tuple[str, ...],
    bridge: str | None,
    vlan: int | None,
    kind: str | None,
    mtu: int | None,
    domain: str,
    no_outbound: bool,
    closed_inside: bool,
    open_outside: bool,
    shared: bool,
) -> None:
    """Create the network NAME: by default one with DHCP, DNS and address translation.

    Guests of a managed network on different hosts do not reach each other; the kind bridge is for that.
    """
    ranges = [one.partition(",") for one in subnets]
    new = NewNetwork(
        name=name,
        kind=NetworkKind(kind) if kind else NetworkKind.BRIDGE if bridge else NetworkKind.MANAGED,
        shared=shared,
        subnets=tuple(NewSubnet(prefix=prefix, gateway=gateway or None) for prefix, _, gateway in ranges),
        domain=domain,
        bridge=bridge or "",
        vlan=vlan,
        mtu=mtu,
        outbound=not no_outbound,
        closed_inside=closed_inside,
        open_outside=open_outside,
    )
    reply = invocation.client.post(NETWORKS, new)
    if not invocation.print_json(reply):
        made = reply.decode(Network)
        invocation.echo(f"Created: network {made.name} ({_range(made)}), id {made.id}")


def _range(network: Network) -> str:
    """Return the addresses or the bridge of a network, or its kind if it has neither."""
    vlan = "" if network.vlan is None else f" VLAN {network.vlan}"
    return ", ".join(one.prefix for one in network.subnets) or f"{network.bridge}{vlan}" or network.kind.value


@network_commands.command("list")
@with_json
def list_networks(invocation: Invocation) -> None:
    """List the project's networks and the shared ones."""
    columns = {
        "NAME": lambda one: one.name,
        "KIND": lambda one: one.kind.value,
        "ADDRESSES OR BRIDGE": lambda one: _range(one) if one.kind is not NetworkKind.USER else "-",
        "PROJECT": lambda one: one.project or "(shared)",
        "VMS": lambda one: "-" if one.instances is None else str(one.instances),
        "AGE": lambda one: age(one.created_at, invocation.client.now),
        "ID": lambda one: one.id,
    }
    invocation.print_items(invocation.client.get(NETWORKS), NetworkList, columns)


@network_commands.command("show")
@click.argument("network", shell_complete=completer(NETWORKS))
@with_json
def show_network(invocation: Invocation, *, network: str) -> None:
    """Show a network."""
    reply = invocation.client.get(path_of(NETWORKS, network))
    if invocation.print_json(reply):
        return
    one = reply.decode(Network)
    facts = {
        "Name": one.name,
        "Id": one.id,
        "Kind": one.kind.value,
        "Project": one.project or "shared by all",
        "Subnets": ", ".join(f"{subnet.prefix} (gateway {subnet.gateway})" for subnet in one.subnets),
        "Domain": one.domain,
        "Bridge": one.bridge,
        "VLAN": None if one.vlan is None else str(one.vlan),
        "MTU": None if one.mtu is None else str(one.mtu),
        "Outbound": "allowed" if one.outbound else "refused",
        "From outside": "open" if one.open_outside else "as security groups and forwards allow",
        "Inside": "as security groups allow" if one.closed_inside else "open",
        "VMs": None if one.instances is None else str(one.instances),
        "Created": f"{age(one.created_at, invocation.client.now)} ago by {one.created_by}",
    }
    invocation.print_facts(facts, 14)


@network_commands.command("delete")
@click.argument("network", shell_complete=completer(NETWORKS))
@yes_option
@with_json
def delete_network(invocation: Invocation, *, network: str, yes: bool) -> None:
    """Delete a network that no VM uses, after confirmation."""
    confirm(f"Delete the network {network}?", yes=yes)
    reply = invocation.client.delete(path_of(NETWORKS, network))
    invocation.print_removed(reply, f"Deleted: {network}")


@click.group("security-group")
def security_group_commands() -> None:
    """Security groups: rules on who may connect, which interfaces of VMs share."""


@security_group_commands.command("create")
@click.argument("name")
@click.option("--allow", default="", help="Rules, such as `tcp 22 from 10.0.0.0/8, icmp`. Default: none.")
@with_json
def create_security_group(invocation: Invocation, *, name: str, allow: str) -> None:
    """Create the security group NAME in the project."""
    reply = invocation.client.post(SECURITY_GROUPS, NewSecurityGroup(name=name, allow=allow))
    if not invocation.print_json(reply):
        made = reply.decode(SecurityGroup)
        invocation.echo(f"Created: security group {made.name}, id {made.id}")


@security_group_commands.command("list")
@with_json
def list_security_groups(invocation: Invocation) -> None:
    """List the project's security groups."""
    columns = {
        "NAME": lambda one: one.name,
        "ALLOWS": lambda one: ", ".join(one.allow) or "-",
        "PROJECT": lambda one: one.project,
        "VMS": lambda one: str(one.instances),
        "AGE": lambda one: age(one.created_at, invocation.client.now),
        "ID": lambda one: one.id,
    }
    invocation.print_items(invocation.client.get(SECURITY_GROUPS), SecurityGroupList, columns)


@security_group_commands.command("show")
@click.argument("group", shell_complete=completer(SECURITY_GROUPS))
@with_json
def show_security_group(invocation: Invocation, *, group: str) -> None:
    """Show a security group."""
    reply = invocation.client.get(path_of(SECURITY_GROUPS, group))
    if invocation.print_json(reply):
        return
    one = reply.decode(SecurityGroup)
    facts = {
        "Name": one.name,
        "Id": one.id,
        "Project": one.project,
        "Allows": ", ".join(one.allow) or "nothing",
        "VMs": str(one.instances),
        "Created": f"{age(one.created_at, invocation.client.now)} ago by {one.created_by}",
    }
    invocation.print_facts(facts, 14)


@security_group_commands.command("set")
@click.argument("group", shell_complete=completer(SECURITY_GROUPS))
@click.option("--allow", required=True, help="The new rules, such as `tcp 22 from 10.0.0.0/8, icmp`. Empty: none.")
@with_json
def set_security_group(invocation: Invocation, *, group: str, allow: str) -> None:
    """Replace the rules of a security group. VMs that have it follow, also while they run."""
    reply = invocation.client.patch(path_of(SECURITY_GROUPS, group), SecurityGroupChange(allow=allow))
    if not invocation.print_json(reply):
        one = reply.decode(SecurityGroup)
        invocation.echo(f"Changed: security group {one.name} allows {', '.join(one.allow) or 'nothing'}")


@security_group_commands.command("delete")
@click.argument("group", shell_complete=completer(SECURITY_GROUPS))
@yes_option
@with_json
def delete_security_group(invocation: Invocation, *, group: str, yes: bool) -> None:
    """Delete a security group that no VM has, after confirmation."""
    confirm(f"Delete the security group {group}?", yes=yes)
    reply = invocation.client.delete(path_of(SECURITY_GROUPS, group))
    invocation.print_removed(reply, f"Deleted: {group}")
