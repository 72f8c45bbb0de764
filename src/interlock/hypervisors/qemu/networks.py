"""A guest's networks in QEMU's words. Pure: nothing is plugged in or asked here."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Final

from interlock.core.errors import Refused
from interlock.core.records import Interface, Spec

_INTERFACE_PREFIX: Final = "interface-"
_MAC_PREFIX: Final = "52:54:00"
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_NOT_FORWARDED: Final = re.compile(r"Could not set up host forwarding rule 'tcp:127\.0\.0\.1:(\d+)-")
_SAFE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checked_name(identity: str, what: str) -> str:
    """An id that becomes part of a name in QEMU. Raises `Refused` for one that QEMU could misread."""
    if _SAFE_ID.fullmatch(identity) is None:
        raise Refused(
            f"The {what} id {identity!r} cannot be used.",
            remedy="Use up to 64 letters, digits, dots, dashes and underscores.",
        )
    return identity


def interface_device(interface_id: str) -> str:
    """What QEMU calls the device of an interface. Raises as `device_name`."""
    return _INTERFACE_PREFIX + checked_name(interface_id, "interface")


def interface_of_device(name: str) -> str | None:
    """The interface id behind a device's name, or None if it is no interface of ours."""
    return name.removeprefix(_INTERFACE_PREFIX) if name.startswith(_INTERFACE_PREFIX) else None


def first_mac(instance_id: str) -> str:
    """The hardware address of the first interface, which follows from the instance's id."""
    return ":".join((_MAC_PREFIX, *(f"{byte:02x}" for byte in hashlib.sha256(instance_id.encode()).digest()[:3])))


def network_arguments(interface_id: str) -> dict[str, Any]:
    """The network behind an interface beyond the first: the arguments of `netdev_add`.

    Each has addresses of its own, which follow from its id, so that the guest can tell its networks apart.
    """
    high, low = hashlib.sha256(interface_id.encode()).digest()[:2]
    return {"type": "user", "id": f"network-{interface_id}", "net": f"10.{64 + high % 64}.{low}.0/24"}


def interface_arguments(interface: Interface, port: str) -> dict[str, Any]:
    """How an interface is plugged into a port: the arguments of `device_add`. Raises `Refused`."""
    if _MAC.fullmatch(interface.mac) is None:
        raise Refused(
            f"The hardware address {interface.mac!r} cannot be used.",
            remedy="Use six pairs of hexadecimal digits with colons.",
        )
    return {
        "driver": "virtio-net-pci",
        "id": interface_device(interface.id),
        "netdev": f"network-{interface.id}",
        "mac": interface.mac,
        "bus": port,
        "romfile": "",
    }


def taken_port(words: str) -> int | None:
    """The port of the host that QEMU could not forward, told from its last words; None where they speak of another."""
    found = _NOT_FORWARDED.search(words)
    return None if found is None else int(found[1])


def first_interface(instance_id: str, spec: Spec) -> list[str]:
    """The words for the interface that each guest has, and for the ports that are forwarded through it."""
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{forward.host_port}-:{forward.guest_port}" for forward in spec.forwards)
    device = f"virtio-net-pci,netdev=network,mac={first_mac(instance_id)},romfile="
    return ["-netdev", f"user,id=network{forwards}", "-device", device]
