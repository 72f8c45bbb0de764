"""From a spec to the words with which QEMU is started. Pure: nothing is opened, made or asked here.

QEMU is given no path of its own. Every file that it uses is opened by us and handed over as a descriptor, so that its
unprivileged user needs no permission on any folder, and a process that was broken into can open nothing of ours.
`Descriptors` tells under which number it finds each of them.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import Any, Final

import msgspec

from interlock.core.records import Disk, Image, Spec
from interlock.hypervisors.qemu.networks import (
    checked_name,
    first_interface,
    interface_arguments,
    interface_device,
    network_arguments,
)
from interlock.hypervisors.qemu.settings import QemuSettings

ROOT: Final = "root"
"""The id of the disk that is made for the instance, on top of its image."""
RESCUE: Final = "rescue"
"""The id of the disk that a rescued guest boots, on top of its rescue image."""
SEED: Final = "seed"
"""The disk on which a guest finds what it is told of itself."""
JOURNAL: Final = "journal"
"""The pair of pipes `journal.in` and `journal.out`, in the folder in which QEMU is started."""
MACHINE_TYPE: Final = "q35"
MONITOR: Final = "monitor"
AGENT: Final = "agent"
CONSOLE: Final = "console"
"""The character devices of the command monitor, the guest agent's port and the serial console, and the sockets that
stand for them."""

_CDROM: Final = "cdrom"
_DEVICE_PREFIX: Final = "disk-"
_PORT_PREFIX: Final = "port-"
_SEED_PORT: Final = "seed-port"
_SERIAL_LENGTH_MAX: Final = 20
_NAMESPACE: Final = uuid.UUID("5f0c7a1e-6a57-5c8e-9d6c-3d0f5b8f7c11")
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers under which QEMU finds what was opened for it."""

    monitor: int
    agent: int
    console: int
    console_log: int
    disks: dict[str, int]
    """By disk id."""
    backings: dict[str, int] = {}
    """By the id of the disk that is a layer over it."""
    seed: int | None = None
    cdrom: int | None = None
    kernel: int | None = None
    initrd: int | None = None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a guest's memory belongs to, and without which it means nothing."""

    kind: str
    """QEMU's name for it, version included: what `q35` means changes with QEMU."""
    accelerator: str
    cpu_model: str
    hotplug_ports: int
    display: bool
    ports: dict[str, str] = {}
    """In which port each device is, by their names."""


def machine_of(settings: QemuSettings, spec: Spec | None) -> Machine:
    """The machine that is made for `spec` where nothing says otherwise."""
    return Machine(
        kind=MACHINE_TYPE,
        accelerator=settings.accelerator,
        cpu_model=settings.cpu_model,
        hotplug_ports=settings.hotplug_ports if spec is None else _ports(spec, settings),
        display=settings.display,
    )


def settings_of(machine: Machine, settings: QemuSettings) -> QemuSettings:
    """The settings with which such a machine is made."""
    return msgspec.structs.replace(
        settings,
        accelerator=machine.accelerator,
        cpu_model=machine.cpu_model,
        hotplug_ports=machine.hotplug_ports,
        display=machine.display,
    )


def machine_uuid(instance_id: str) -> str:
    """The UUID that the guest sees: the instance's id where that is one, else one that follows from it."""
    try:
        return str(uuid.UUID(instance_id))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, instance_id))


def device_name(disk_id: str) -> str:
    """What QEMU calls the device of a disk. Raises `Refused` for an id that QEMU could misread."""
    return _DEVICE_PREFIX + checked_name(disk_id, "disk")


def disk_of_device(name: str) -> str | None:
    """The disk id behind a device's name, or None if it is no disk of ours."""
    return name.removeprefix(_DEVICE_PREFIX) if name.startswith(_DEVICE_PREFIX) else None


def node_name(disk_id: str) -> str:
    """What QEMU calls the contents of a disk: at most 31 characters, so that a UUID does not fit as it stands."""
    return "node-" + hashlib.sha256(disk_id.encode()).hexdigest()[:20]


def port_name(number: int) -> str:
    return f"{_PORT_PREFIX}{number}"


def is_port(name: str) -> bool:
    return name.startswith(_PORT_PREFIX)


def disk_serial(disk_id: str) -> str:
    """The serial number by which the guest finds the disk: the first 20 characters of its id, all that fit."""
    return disk_id[:_SERIAL_LENGTH_MAX]


def node_arguments(disk: Disk, descriptor_set: int, *, backing: str | None = None) -> dict[str, Any]:
    """How QEMU opens the contents of a disk: the arguments of `blockdev-add`."""
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
        # Without a backing of ours an image must not choose one itself: it could name any file of the host.
        arguments["backing"] = backing
    return arguments


def device_arguments(disk: Disk, port: str) -> dict[str, Any]:
    """How a disk is plugged into a port: the arguments of `device_add`."""
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
    """QEMU's arguments, its own name not included. The guest's processors stand still until `cont`.

    With a `machine` it is made just so, and waits for the guest's memory.
    """
    if machine is not None:
        settings = settings_of(machine, settings)
    return [
        *("-name", f"guest=interlock-{instance_id}"),
        *("-uuid", machine_uuid(instance_id)),
        *("-no-user-config", "-nodefaults", "-display", "none"),
        *("-sandbox", _SANDBOX),
        *("-S", "-no-shutdown", "-action", "panic=pause"),
        *_processor(spec, settings, machine),
        *_monitors(at),
        *_console(at),
        *_agent(at),
        *("-device", "pvpanic"),
        *first_interface(instance_id, spec),
        *_disks(spec, settings, at, machine),
        *_seed(spec, settings, at),
        *_cdrom(spec, at),
        *_interfaces(spec, machine),
        *_kernel(spec, at),
        *_screen(settings),
        *(("-incoming", "defer") if machine is not None else ()),
    ]


def _screen(settings: QemuSettings) -> list[str]:
    """The cheapest screen there is. Whoever looks at it is handed over by the monitor: nothing listens."""
    return ["-device", "VGA", "-vnc", "none"] if settings.display else []


def _processor(spec: Spec, settings: QemuSettings, machine: Machine | None) -> list[str]:
    cache = f",tb-size={settings.translation_cache_mib}" if settings.accelerator == "tcg" else ""
    return [
        *("-machine", MACHINE_TYPE if machine is None else machine.kind),
        *("-accel", settings.accelerator + cache, "-cpu", settings.cpu_model),
        *("-m", f"{spec.memory_mib}M", "-smp", str(spec.vcpus)),
    ]


def _monitors(at: Descriptors) -> list[str]:
    """One monitor for commands, and one whose events wait in a pipe while nobody reads them."""
    return [
        *("-chardev", _socket(MONITOR, at.monitor), "-mon", f"chardev={MONITOR},mode=control"),
        *("-chardev", f"pipe,id=journal,path={JOURNAL}", "-mon", "chardev=journal,mode=control"),
    ]


def _console(at: Descriptors) -> list[str]:
    """The serial console: all that is written there goes to its log, and to whoever is connected."""
    log = f"logfile=/dev/fdset/{at.console_log},logappend=on"
    words = _descriptor_set(at.console_log)
    return [*words, "-chardev", f"{_socket(CONSOLE, at.console)},{log}", "-serial", f"chardev:{CONSOLE}"]


def _agent(at: Descriptors) -> list[str]:
    """The port on which a guest agent finds us, by the name that it looks for."""
    port = f"virtserialport,chardev={AGENT},name=org.qemu.guest_agent.0"
    return ["-chardev", _socket(AGENT, at.agent), "-device", "virtio-serial-pci", "-device", port]


def _socket(name: str, descriptor: int) -> str:
    return f"socket,id={name},fd={descriptor},server=on,wait=off"


def _interfaces(spec: Spec, machine: Machine | None) -> list[str]:
    words: list[str] = []
    for number, interface in enumerate(spec.interfaces, len(all_disks(spec))):
        device = interface_arguments(interface, _port_of(interface_device(interface.id), number, machine))
        words += ["-netdev", _json(network_arguments(interface.id)), "-device", _json(device)]
    return words


def booted_image(spec: Spec) -> Image:
    """What the guest boots: its rescue image while it has one."""
    return spec.image if spec.rescue_image is None else spec.rescue_image


def all_disks(spec: Spec) -> tuple[Disk, ...]:
    """The disks with which a guest is started, in the order in which it finds them.

    That is what it is rescued from, where that is a disk; its root disk, if it has one; and its volumes.
    """
    own = []
    if spec.rescue_image is not None and spec.rescue_image.kind == "disk":
        own.append(Disk(id=RESCUE, path=""))
    if spec.has_root:
        own.append(Disk(id=ROOT, path=""))
    return (*own, *spec.disks)


def backing_images(spec: Spec) -> dict[str, Image]:
    """The images over which disks of the guest are layers, by the id of the disk."""
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
    """How many places for disks and interfaces there are: never fewer than it has of them, so that it always starts."""
    return max(settings.hotplug_ports, len(all_disks(spec)) + len(spec.interfaces))


def _seed(spec: Spec, settings: QemuSettings, at: Descriptors) -> list[str]:
    """The seed as a disk, which also kernels without drivers for CD-ROMs find. It comes last, as its port does."""
    if at.seed is None:
        return []
    node = node_arguments(Disk(id=SEED, path="", format="raw", read_only=True), at.seed)
    device = {"driver": "virtio-blk-pci", "id": SEED, "drive": node["node-name"], "bus": _SEED_PORT, "serial": SEED}
    port = f"pcie-root-port,id={_SEED_PORT},chassis={_ports(spec, settings) + 1}"
    return ["-device", port, *_descriptor_set(at.seed), "-blockdev", _json(node), "-device", _json(device)]


def _cdrom(spec: Spec, at: Descriptors) -> list[str]:
    """The disc that is booted: first where it rescues, and else once the root disk has nothing to boot (yet)."""
    if at.cdrom is None:
        return []
    node = node_arguments(Disk(id=_CDROM, path="", format="raw", read_only=True), at.cdrom)
    order = 1 if spec.rescue_image is None else 0
    device = {"driver": "ide-cd", "bus": "ide.0", "drive": node["node-name"], "bootindex": order}
    return [*_descriptor_set(at.cdrom), "-blockdev", _json(node), "-device", _json(device)]


def _port_of(device: str, number: int, machine: Machine | None) -> str:
    """Where a device is: where it was, if the machine was there before."""
    return port_name(number) if machine is None else machine.ports.get(device, port_name(number))


def _backing_name(disk_id: str) -> str:
    return f"backing-{disk_id}"


def _descriptor_set(descriptor: int, *, for_node: str | None = None) -> list[str]:
    """A file that QEMU is given, and the node for which, where that may be closed while the guest runs."""
    what_for = "" if for_node is None else f",opaque={for_node}"
    return ["-add-fd", f"fd={descriptor},set={descriptor}{what_for}"]


def _kernel(spec: Spec, at: Descriptors) -> list[str]:
    if at.kernel is None:
        return []
    words = ["-kernel", f"/proc/self/fd/{at.kernel}", "-append", booted_image(spec).cmdline or ""]
    if at.initrd is not None:
        words += ["-initrd", f"/proc/self/fd/{at.initrd}"]
    return words


def _json(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()
