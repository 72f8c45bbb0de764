"""QEMU's command line and the arguments of its hotplug commands, from a spec. Pure: no I/O.

QEMU gets no paths. Every file that it uses is opened by the server and passed as a descriptor, so that its unprivileged
user needs no permission on any folder, and a compromised process can open none of the server's files. `Descriptors` has
the numbers of the descriptors.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.networks import NetworkKind, mac_of
from interlock.core.records import Disk, Forward, Image, Interface, Spec
from interlock.core.specs import PRIMARY
from interlock.hypervisors.qemu.settings import QemuSettings

ROOT: Final = "root"
"""The id of the disk that is created for the instance, an overlay of its image."""
RESCUE: Final = "rescue"
"""The id of the disk that a guest boots during a rescue, an overlay of the rescue image."""
SEED: Final = "seed"
"""The cloud-init seed."""
EVENT_LOG: Final = "journal"
"""The pipes `journal.in` and `journal.out` of the event log, in QEMU's working folder."""
MACHINE_TYPE: Final = "q35"
MONITOR: Final = "monitor"
AGENT: Final = "agent"
CONSOLE: Final = "console"
"""The character devices, and sockets, of the command monitor, the guest agent and the serial console."""

_CDROM: Final = "cdrom"
_DEVICE_PREFIX: Final = "disk-"
_PORT_PREFIX: Final = "port-"
_SEED_PORT: Final = "seed-port"
_SERIAL_LENGTH_MAX: Final = 20
_NAMESPACE: Final = uuid.UUID("5f0c7a1e-6a57-5c8e-9d6c-3d0f5b8f7c11")
_NETWORK: Final = "network"
_INTERFACE_PREFIX: Final = "interface-"
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_FAILED_FORWARD: Final = re.compile(r"Could not set up host forwarding rule '(?:tcp|udp):[0-9.]+:(\d+)-")
_SAFE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of the descriptors that are passed to QEMU."""

    monitor: int
    agent: int
    console: int
    console_log: int
    disks: dict[str, int]
    """By disk id."""
    backings: dict[str, int] = {}
    """By the id of the overlay."""
    seed: int | None = None
    cdrom: int | None = None
    kernel: int | None = None
    initrd: int | None = None
    networks: dict[str, int] = {}
    """By interface id: a tap, or a listening socket of a user network. Others have QEMU's own user network."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a guest's memory belongs to: it can be restored in no other."""

    kind: str
    """QEMU's machine type with its version: `q35` alone changes with QEMU."""
    accelerator: str
    cpu_model: str
    hotplug_ports: int
    display: bool
    ports: dict[str, str] = {}
    """The port of each device, by name."""


def machine_of(settings: QemuSettings, spec: Spec | None) -> Machine:
    """Return the default machine for a spec."""
    return Machine(
        kind=MACHINE_TYPE,
        accelerator=settings.accelerator,
        cpu_model=settings.cpu_model,
        hotplug_ports=settings.hotplug_ports if spec is None else _ports(spec, settings),
        display=settings.display,
    )


def settings_of(machine: Machine, settings: QemuSettings) -> QemuSettings:
    """Return the settings that create such a machine."""
    return msgspec.structs.replace(
        settings,
        accelerator=machine.accelerator,
        cpu_model=machine.cpu_model,
        hotplug_ports=machine.hotplug_ports,
        display=machine.display,
    )


def machine_uuid(instance_id: str) -> str:
    """Return the UUID that the guest sees: the instance's id if that is one, else one derived from it."""
    try:
        return str(uuid.UUID(instance_id))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, instance_id))


def _checked_name(identity: str, what: str) -> str:
    """Return an id for a name in QEMU. Raises `OperationRejected` if QEMU could misread it."""
    if _SAFE_ID.fullmatch(identity) is None:
        raise OperationRejected(
            f"The {what} id {identity!r} cannot be used.",
            remedy="Use up to 64 letters, digits, dots, dashes and underscores.",
        )
    return identity


def device_name(disk_id: str) -> str:
    """Return the name of a disk's device. Raises `OperationRejected` for an invalid id."""
    return _DEVICE_PREFIX + _checked_name(disk_id, "disk")


def disk_of_device(name: str) -> str | None:
    """Return the disk id of a device name, or None if it is no disk."""
    return name.removeprefix(_DEVICE_PREFIX) if name.startswith(_DEVICE_PREFIX) else None


def node_name(disk_id: str) -> str:
    """Return the name of a disk's block node. QEMU limits it to 31 characters, too few for a UUID."""
    return "node-" + hashlib.sha256(disk_id.encode()).hexdigest()[:20]


def port_name(number: int) -> str:
    return f"{_PORT_PREFIX}{number}"


def is_port(name: str) -> bool:
    return name.startswith(_PORT_PREFIX)


def disk_serial(disk_id: str) -> str:
    """Return the serial number that the guest sees: the first 20 characters of the disk's id."""
    return disk_id[:_SERIAL_LENGTH_MAX]


def node_arguments(disk: Disk, descriptor_set: int, *, backing: str | None = None) -> dict[str, Any]:
    """Return the arguments of `blockdev-add` for a disk."""
    arguments: dict[str, Any] = {
        "driver": disk.format,
        "node-name": node_name(disk.id),
        "read-only": disk.read_only,
        "file": {
            "driver": "file",
            "filename": f"/dev/fdset/{descriptor_set}",
            "read-only": disk.read_only,
        },
    }
    if disk.format == "qcow2":
        # The backing file in the header is ignored: it could name any file of the host.
        arguments["backing"] = backing
    return arguments


def device_arguments(disk: Disk, port: str) -> dict[str, Any]:
    """Return the arguments of `device_add` for a disk in a port."""
    return {
        "driver": "virtio-blk-pci",
        "id": device_name(disk.id),
        "drive": node_name(disk.id),
        "bus": port,
        "serial": disk_serial(disk.id),
    }


def arguments(
    instance_id: str, spec: Spec, settings: QemuSettings, at: Descriptors, machine: Machine | None = None
) -> list[str]:
    """Return QEMU's arguments, without the program. The vCPUs are paused until `cont`.

    With a `machine`, QEMU creates exactly that and waits for the guest's memory.
    """
    if machine is not None:
        settings = settings_of(machine, settings)
    return [
        # QEMU names its threads, so that `top -H` shows which ones are vCPUs.
        *("-name", f"guest=interlock-{instance_id},debug-threads=on"),
        *("-uuid", machine_uuid(instance_id)),
        *("-no-user-config", "-nodefaults", "-display", "none"),
        *("-sandbox", _SANDBOX),
        *("-S", "-no-shutdown", "-action", "panic=pause"),
        *_processor(spec, settings, machine),
        *_monitors(at),
        *_console(at),
        *_agent(at),
        *("-device", "pvpanic"),
        *_first_interface(instance_id, spec, at),
        *_disks(spec, settings, at, machine),
        *_seed(spec, settings, at),
        *_cdrom(spec, at),
        *_interfaces(spec, at, machine),
        *_kernel(spec, at),
        *_display(settings),
        *(("-incoming", "defer") if machine is not None else ()),
    ]


def _display(settings: QemuSettings) -> list[str]:
    """A VGA display. VNC clients are passed to QEMU by QMP: nothing listens."""
    return ["-device", "VGA", "-vnc", "none"] if settings.display else []


def _processor(spec: Spec, settings: QemuSettings, machine: Machine | None) -> list[str]:
    cache = f",tb-size={settings.translation_cache_mib}" if settings.accelerator == "tcg" else ""
    return [
        *("-machine", MACHINE_TYPE if machine is None else machine.kind),
        *("-accel", settings.accelerator + cache, "-cpu", settings.cpu_model),
        *("-m", f"{spec.memory_mib}M", "-smp", str(spec.vcpus)),
    ]


def _monitors(at: Descriptors) -> list[str]:
    """A QMP monitor for commands, and one for the event log, whose events wait in a pipe until they are read."""
    return [
        *("-chardev", _socket(MONITOR, at.monitor), "-mon", f"chardev={MONITOR},mode=control"),
        *("-chardev", f"pipe,id=journal,path={EVENT_LOG}", "-mon", "chardev=journal,mode=control"),
    ]


def _console(at: Descriptors) -> list[str]:
    """The serial console: its output goes to the log and to the client that is connected."""
    log = f"logfile=/dev/fdset/{at.console_log},logappend=on"
    words = _descriptor_set(at.console_log)
    return [*words, "-chardev", f"{_socket(CONSOLE, at.console)},{log}", "-serial", f"chardev:{CONSOLE}"]


def _agent(at: Descriptors) -> list[str]:
    """The virtio-serial port of the guest agent."""
    port = f"virtserialport,chardev={AGENT},name=org.qemu.guest_agent.0"
    return ["-chardev", _socket(AGENT, at.agent), "-device", "virtio-serial-pci", "-device", port]


def _socket(name: str, descriptor: int) -> str:
    return f"socket,id={name},fd={descriptor},server=on,wait=off"


def _interfaces(spec: Spec, at: Descriptors, machine: Machine | None) -> list[str]:
    words: list[str] = []
    for number, interface in enumerate(spec.interfaces, len(all_disks(spec))):
        device = interface_arguments(interface, _port_of(interface_device(interface.id), number, machine))
        network = network_arguments(interface, _number(at.networks.get(interface.id)))
        words += ["-netdev", _json(network), "-device", _json(device)]
    return words


def booted_image(spec: Spec) -> Image:
    """Return the image that the guest boots: its rescue image, if it has one."""
    return spec.image if spec.rescue_image is None else spec.rescue_image


def all_disks(spec: Spec) -> tuple[Disk, ...]:
    """Return the disks of a guest in their order: rescue disk, root disk, volumes."""
    own = []
    if spec.rescue_image is not None and spec.rescue_image.kind == "disk":
        own.append(Disk(id=RESCUE, path=""))
    if spec.has_root:
        own.append(Disk(id=ROOT, path=""))
    return (*own, *spec.disks)


def backing_images(spec: Spec) -> dict[str, Image]:
    """Return the backing images of the guest's disks, by disk id."""
    found = {}
    if spec.rescue_image is not None and spec.rescue_image.kind == "disk":
        found[RESCUE] = spec.rescue_image
    if spec.image.kind == "disk" and not spec.root_is_whole:
        found[ROOT] = spec.image
    return found


def _disks(spec: Spec, settings: QemuSettings, at: Descriptors, machine: Machine | None) -> list[str]:
    disks = all_disks(spec)
    words: list[str] = []
    for number in range(_ports(spec, settings)):
        words += ["-device", f"pcie-root-port,id={port_name(number)},chassis={number + 1}"]
    backings = backing_images(spec)
    for disk_id, image in backings.items():
        base = Disk(id=disk_id, path="", format=image.format, read_only=True)
        node = {**node_arguments(base, at.backings[disk_id]), "node-name": _backing_name(disk_id)}
        words += [*_descriptor_set(at.backings[disk_id]), "-blockdev", _json(node)]
    for number, disk in enumerate(disks):
        backing = _backing_name(disk.id) if disk.id in backings else None
        node = node_arguments(disk, at.disks[disk.id], backing=backing)
        device = device_arguments(disk, _port_of(device_name(disk.id), number, machine))
        if number == 0 and (booted_image(spec).kind == "disk" or (at.cdrom is not None and spec.rescue_image is None)):
            device["bootindex"] = 0
        named = _descriptor_set(at.disks[disk.id], for_node=node_name(disk.id))
        words += [*named, "-blockdev", _json(node), "-device", _json(device)]
    return words


def _ports(spec: Spec, settings: QemuSettings) -> int:
    """Return the number of ports: never fewer than the guest has devices, so that it always starts."""
    return max(settings.hotplug_ports, len(all_disks(spec)) + len(spec.interfaces))


def _seed(spec: Spec, settings: QemuSettings, at: Descriptors) -> list[str]:
    """The seed as a disk, for kernels without a CD-ROM driver too. It comes last, as does its port."""
    if at.seed is None:
        return []
    node = node_arguments(Disk(id=SEED, path="", format="raw", read_only=True), at.seed)
    device = {"driver": "virtio-blk-pci", "id": SEED, "drive": node["node-name"], "bus": _SEED_PORT, "serial": SEED}
    port = f"pcie-root-port,id={_SEED_PORT},chassis={_ports(spec, settings) + 1}"
    return ["-device", port, *_descriptor_set(at.seed), "-blockdev", _json(node), "-device", _json(device)]


def _cdrom(spec: Spec, at: Descriptors) -> list[str]:
    """The ISO image that is booted: first during a rescue, else if the root disk is not bootable (yet)."""
    if at.cdrom is None:
        return []
    node = node_arguments(Disk(id=_CDROM, path="", format="raw", read_only=True), at.cdrom)
    order = 1 if spec.rescue_image is None else 0
    device = {"driver": "ide-cd", "bus": "ide.0", "drive": node["node-name"], "bootindex": order}
    return [*_descriptor_set(at.cdrom), "-blockdev", _json(node), "-device", _json(device)]


def _port_of(device: str, number: int, machine: Machine | None) -> str:
    """Return the port of a device: the one it had, if the machine is created again."""
    return port_name(number) if machine is None else machine.ports.get(device, port_name(number))


def _backing_name(disk_id: str) -> str:
    return f"backing-{disk_id}"


def _descriptor_set(descriptor: int, *, for_node: str | None = None) -> list[str]:
    """A descriptor that is passed to QEMU; `for_node` marks it for removal with that block node."""
    opaque = "" if for_node is None else f",opaque={for_node}"
    return ["-add-fd", f"fd={descriptor},set={descriptor}{opaque}"]


def _kernel(spec: Spec, at: Descriptors) -> list[str]:
    if at.kernel is None:
        return []
    words = ["-kernel", f"/proc/self/fd/{at.kernel}", "-append", booted_image(spec).cmdline or ""]
    if at.initrd is not None:
        words += ["-initrd", f"/proc/self/fd/{at.initrd}"]
    return words


def _json(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()


# --------------------------------------------------------------------------------------------------- networks


def interface_device(interface_id: str) -> str:
    """Return the name of an interface's device. Raises as `device_name`."""
    return _INTERFACE_PREFIX + _checked_name(interface_id, "interface")


def interface_of_device(name: str) -> str | None:
    """Return the interface id of a device name, or None if it is no interface."""
    return name.removeprefix(_INTERFACE_PREFIX) if name.startswith(_INTERFACE_PREFIX) else None


def interfaces_of(instance_id: str, spec: Spec) -> tuple[Interface, ...]:
    """Return all interfaces of an instance, the first included."""
    return (spec.primary or Interface(id=PRIMARY, mac=mac_of(instance_id)), *spec.interfaces)


def is_user(interface: Interface) -> bool:
    """Whether an interface is on a user network."""
    return interface.network is None or interface.network.kind is NetworkKind.USER


def network_name(interface_id: str) -> str:
    """Return the name of an interface's network in QEMU."""
    return _NETWORK if interface_id == PRIMARY else f"{_NETWORK}-{interface_id}"


def user_subnet(interface_id: str) -> str:
    """Return the first three numbers of the addresses of a user network, as in `10.0.2`.

    Those of the first interface are always the same; others are derived, so that a guest can distinguish its networks.
    """
    if interface_id == PRIMARY:
        return "10.0.2"
    high, low = hashlib.sha256(interface_id.encode()).digest()[:2]
    return f"10.{64 + high % 64}.{low}"


def network_arguments(interface: Interface, descriptor: str | None, forwards: Sequence[Forward] = ()) -> dict[str, Any]:
    """Return the arguments of `netdev_add` for an interface.

    Args:
        interface: the interface.
        descriptor: the number or name of its tap, or of its listening socket; None: QEMU's own user network, without
            access to other addresses.
        forwards: with that one, the ports that are forwarded.
    """
    name = network_name(interface.id)
    if descriptor is None:
        to_guest = [{"str": f"{one.protocol}:{one.host_address}:{one.host_port}-:{one.guest_port}"} for one in forwards]
        more = {"hostfwd": to_guest} if to_guest else {}
        return {"type": "user", "id": name, "net": f"{user_subnet(interface.id)}.0/24", "restrict": True, **more}
    if is_user(interface):
        return {"type": "stream", "id": name, "server": True, "addr": {"type": "fd", "str": descriptor}}
    return {"type": "tap", "id": name, "fd": descriptor}


def _number(descriptor: int | None) -> str | None:
    return None if descriptor is None else str(descriptor)


def interface_arguments(interface: Interface, port: str) -> dict[str, Any]:
    """Return the arguments of `device_add` for an interface in a port. Raises `OperationRejected`."""
    return {
        "driver": "virtio-net-pci",
        "id": interface_device(interface.id),
        "netdev": network_name(interface.id),
        "mac": checked_mac(interface.mac),
        "bus": port,
        "romfile": "",
    }


def checked_mac(mac: str) -> str:
    """Return a MAC address. Raises `OperationRejected` if it is none."""
    if _MAC.fullmatch(mac) is None:
        raise OperationRejected(
            f"The MAC address {mac!r} cannot be used.",
            remedy="Use six pairs of hexadecimal digits with colons.",
        )
    return mac


def failed_forward(error: str) -> int | None:
    """Return the port of the host that QEMU could not forward, by its error; None if it is another error."""
    found = _FAILED_FORWARD.search(error)
    return None if found is None else int(found[1])


def _first_interface(instance_id: str, spec: Spec, at: Descriptors) -> list[str]:
    interface = interfaces_of(instance_id, spec)[0]
    network = network_arguments(interface, _number(at.networks.get(PRIMARY)), spec.forwards)
    device = f"virtio-net-pci,netdev={_NETWORK},mac={checked_mac(interface.mac)},romfile="
    return ["-netdev", _json(network), "-device", device]
