"""Preconditions of the operations on interfaces and forwards. They are part of `preconditions.PRECONDITIONS`."""

from __future__ import annotations

from typing import Final

from interlock.core.networks import NetworkKind
from interlock.core.operations import Operation
from interlock.core.situations import Precondition, Situation
from interlock.core.specs import INTERFACES_MAX, PRIMARY
from interlock.core.states import PowerState, VmState

_O = Operation


def _interfaces_full(of: Situation) -> bool:
    held = (one.id for one in of.instance.held if one.operation is _O.ATTACH_INTERFACE)
    return len({*of.interfaces, *held}) >= INTERFACES_MAX


def _mac_taken(of: Situation) -> bool:
    mac = of.parameters.get("mac")
    return mac is not None and mac.lower() in of.interfaces.values()


def _no_such_interface(of: Situation) -> bool:
    wanted = of.parameters.get("interface")
    return not of.interfaces if wanted is None else wanted not in of.interfaces


def _no_such_or_first(of: Situation) -> bool:
    wanted = of.parameters.get("interface")
    return wanted is not None and wanted != PRIMARY and wanted not in of.interfaces


def _host_lacks_network(of: Situation) -> bool:
    return of.host == of.instance.host and bool(of.facts.host_lacks_network)


def _in_that_network(of: Situation) -> bool:
    network, wanted = of.facts.network, of.parameters.get("interface")
    present = {one.id: one.network for one in of.spec.all_interfaces}.get(wanted or "")
    return network is not None and present is not None and present.id == network.id and not of.moving


def _other_device(of: Situation) -> bool:
    network, wanted = of.facts.network, of.parameters.get("interface")
    present = {one.id: one.network for one in of.spec.all_interfaces}.get(wanted or "")
    on_user = present is None or present.kind is NetworkKind.USER
    runs = of.settled and of.instance.power_state is not PowerState.NONE
    return runs and network is not None and on_user is not (network.kind is NetworkKind.USER) and not of.moving


def _forwards_to_bridge(of: Situation) -> bool:
    network = of.facts.network
    bridged = network is not None and network.kind is NetworkKind.BRIDGE
    return bridged and of.parameters.get("interface") == PRIMARY and bool(of.forwards)


def _first_on_bridge(of: Situation) -> bool:
    return of.first_network is not None and of.first_network.kind is NetworkKind.BRIDGE and not of.moving


def _no_limits_there(of: Situation) -> bool:
    wanted = of.parameters.get("interface")
    network = {one.id: one.network for one in of.spec.all_interfaces}.get(wanted or "")
    user = network is None or network.kind is NetworkKind.USER
    return wanted is not None and user and not of.moving


def _forwarded(of: Situation) -> bool:
    return of.parameters.get("host_port") in of.forwards


def _not_forwarded(of: Situation) -> bool:
    wanted = of.parameters.get("host_port")
    return not of.forwards if wanted is None else wanted not in of.forwards


def _paused(of: Situation) -> bool:
    return of.vm_state is VmState.PAUSED


PAUSED: Final = Precondition(
    reason="paused",
    broken=_paused,
    because="{name} is paused, or will be, and a paused guest does not release devices.",
    remedy="Unpause it first.",
)
_NETWORK_THERE: Final = Precondition(
    reason="host_lacks_network",
    broken=_host_lacks_network,
    because="{host_lacks_network}",
    remedy="Choose another network, or migrate the VM first; `interlock host show` says which kinds a host has.",
)
_INTERFACE_THERE: Final = Precondition(
    reason="no_such_interface",
    broken=_no_such_or_first,
    because="{name} has no interface {interface}, or will no longer have it.",
    remedy="`interlock vm show {name}` shows their ids; the first one is `primary`.",
)
PRECONDITIONS: Final[dict[Operation, tuple[Precondition, ...]]] = {
    _O.ATTACH_INTERFACE: (
        Precondition(
            reason="too_many_interfaces",
            broken=_interfaces_full,
            because="{name} has the maximum of " + str(INTERFACES_MAX) + " interfaces beyond its first, or soon will.",
            remedy="Detach one first.",
        ),
        Precondition(
            reason="address_taken",
            broken=_mac_taken,
            because="{name} already has an interface with the MAC address {mac}, or will have.",
            remedy="Choose another address, or omit it to have one generated.",
        ),
        _NETWORK_THERE,
    ),
    _O.MOVE_INTERFACE: (
        _INTERFACE_THERE,
        Precondition(
            reason="same_network",
            broken=_in_that_network,
            because="The interface {interface} of {name} is in the network {network} already.",
            remedy="Choose another network.",
        ),
        Precondition(
            reason="guest_runs",
            broken=_other_device,
            because="The interface {interface} of {name} cannot be moved between a user network and one of another "
            "kind while the guest runs.",
            remedy="Stop the VM first, or attach another interface.",
        ),
        Precondition(
            reason="has_forwards",
            broken=_forwards_to_bridge,
            because="{name} has forwards, and the network {network} is of the kind bridge, which has none.",
            remedy="Remove them first with `interlock vm remove-forward`.",
        ),
        _NETWORK_THERE,
    ),
    _O.SET_INTERFACE: (
        _INTERFACE_THERE,
        Precondition(
            reason="user_network",
            broken=_no_limits_there,
            because="The interface {interface} of {name} is on a user network, which has no limits and no rules.",
            remedy="Move it to a managed network or a bridge first.",
        ),
    ),
    _O.ADD_FORWARD: (
        Precondition(
            reason="on_bridge",
            broken=_first_on_bridge,
            because="The first interface of {name} is on a bridge: no port of the host can be forwarded to it.",
            remedy="Connect to the guest's own address.",
        ),
        Precondition(
            reason="already_forwarded",
            broken=_forwarded,
            because="{name} already has a forward of the port {host_port}, or will have.",
            remedy="Choose another port, or remove that forward first.",
        ),
    ),
    _O.REMOVE_FORWARD: (
        Precondition(
            reason="not_forwarded",
            broken=_not_forwarded,
            because="{name} has no forward of the port {host_port}, or will no longer have it.",
            remedy="`interlock vm show {name}` shows its forwards.",
        ),
    ),
    _O.DETACH_INTERFACE: (
        Precondition(
            reason="no_such_interface",
            broken=_no_such_interface,
            because="{name} has no interface {interface}, or will no longer have it.",
            remedy="`interlock vm show {name}` shows their ids.",
        ),
        PAUSED,
    ),
}
