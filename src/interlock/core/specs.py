"""The specification of an instance for a hypervisor: image, size, disks and interfaces.

The core does not interpret it. Import these classes from `records`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from interlock.core.errors import not_found
from interlock.core.networks import IngressRule, Network


class Image(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an instance boots.

    A `disk` image is the backing file of its root disk; a `kernel` image is booted directly; an `iso` image is booted
    as a CD-ROM, beside an empty root disk.
    """

    id: str
    name: str
    kind: str
    """`disk`, `kernel` or `iso`."""
    format: str = "raw"
    """Of a `disk` image: `raw` or `qcow2`."""
    path: str
    """The disk or the kernel in the server's image folder."""
    initrd: str | None = None
    cmdline: str | None = None
    size_bytes: int
    """The virtual size of a disk; the file size of a kernel."""
    stored_bytes: int = 0
    """The size of its files on disk when it was imported; 0: unknown (recorded by an older version)."""
    sha256: str
    """Of the uploaded file, before conversion."""
    converted_from: str | None = None
    """The uploaded format if it was converted, with compression and archive: `vmdk, ova`."""
    min_memory_mib: int = 0
    """The least memory with which it boots, in MiB; 0: unknown."""
    created_at_ms: int = 0
    project: str | None = None
    """The project of the instance of which it is a snapshot. None: public."""
    source_instance: str | None = None
    """The id of the instance of which it is a snapshot."""
    backup_type: str | None = None
    """The rotation group of a backup, such as `daily`."""


class Disk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One disk of an instance: its root disk, or an attached volume."""

    id: str
    """`root`, or the volume's id."""
    path: str
    format: str = "qcow2"
    read_only: bool = False


class Forward(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A port of the guest's first interface, reachable at an address of its host."""

    host_port: int
    guest_port: int
    host_address: str = "127.0.0.1"
    protocol: str = "tcp"
    """`tcp` or `udp`."""


INTERFACES_MAX: Final = 8
"""How many interfaces an instance may have beyond its first."""


PRIMARY: Final = "primary"
"""The id of the first interface."""


class Interface(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A network interface of an instance."""

    id: str
    """That of the request that attached it; `PRIMARY` for the first."""
    mac: str
    """As in `52:54:00:12:34:56`."""
    network: Network | None = None
    """None: the default user network."""
    addresses: tuple[str, ...] = ()
    """The addresses leased to it, without the length of their prefix; at most one of each address family."""
    hostname: str = ""
    """Of a managed network: its name in the network's DNS; empty: none."""
    security_groups: tuple[str, ...] = ()
    """The names of its security groups, whose rules are in `ingress`."""
    ingress: tuple[IngressRule, ...] = ()
    """The connections that are allowed: by its own rules, and by those of its security groups."""
    own_ingress: tuple[IngressRule, ...] = ()
    """Its own rules, which are in `ingress` too. Without security groups empty: all are its own."""
    inbound_kbit: int | None = None
    """The limit of what the guest receives, in kbit/s; None: unlimited."""
    outbound_kbit: int | None = None
    """The limit of what the guest sends, in kbit/s; None: unlimited."""


def with_groups(
    interface: Interface,
    rules: Mapping[str, tuple[IngressRule, ...]],
    *,
    own: tuple[IngressRule, ...] | None = None,
    groups: tuple[str, ...] | None = None,
) -> Interface:
    """Return an interface with the rules that its security groups have now, beside its own.

    Args:
        interface: one of an instance.
        rules: the rules of the project's security groups, by name.
        own: new rules of its own; None: as they are.
        groups: the names of its new groups; None: as they are.

    Raises:
        NotFound: a group does not exist.
    """
    named = interface.security_groups if groups is None else groups
    if own is None:
        own = interface.own_ingress if interface.security_groups else interface.ingress
    for name in named:
        if name not in rules:
            raise not_found("Security group", name)
    shared = (rule for name in named for rule in rules[name])
    return msgspec.structs.replace(
        interface,
        security_groups=named,
        ingress=tuple(dict.fromkeys((*own, *shared))),
        own_ingress=own if named else (),
    )


def repr_hiding(*secrets: str) -> Callable[[Any], str]:
    """Return a `__repr__` for a struct that shows these fields as `...`, unless they are None.

    A log, an error or a failed assertion may print a record with whatever is in it.
    """

    def text(struct: Any) -> str:
        fields = msgspec.structs.asdict(struct).items()
        shown = (f"{name}={'...' if name in secrets and value is not None else repr(value)}" for name, value in fields)
        return f"{type(struct).__name__}({', '.join(shown)})"

    return text


class Seed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The cloud-init NoCloud seed of an instance."""

    __repr__ = repr_hiding("user_data", "user_data_bytes", "network_config")

    hostname: str
    ssh_keys: tuple[str, ...] = ()
    user_data: str | None = None
    user_data_bytes: bytes | None = None
    """Binary user-data, such as gzip; instead of `user_data`."""
    network_config: str | None = None


class SharedFolder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A folder that hosts share, mounted at the same path on each."""

    path: str
    id: str
    """The content of its marker file, which distinguishes it from another folder at that path."""


class Spec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a hypervisor needs to run an instance."""

    image: Image
    """The backing image of its root disk, or the kernel or ISO that it boots."""
    rescue_image: Image | None = None
    """While it is rescued: what it boots instead, with its root disk as a second disk."""
    vcpus: int = 1
    memory_mib: int = 128
    root_gib: int = 0
    """Size of the root disk, in GiB; 0 keeps the image's size. With a kernel image, 0 means no root disk, and any other
    size an empty one."""
    root: int = 0
    """The number of its root disk: each rebuild, resize or unshelve creates the next."""
    root_made: bool | None = None
    """Whether that root disk was created; once it was, it is never created again, and a start without it fails.

    None: unknown (recorded by an older version)."""
    root_is_whole: bool = False
    """Whether the root disk has no backing file, instead of being an overlay of the image."""
    shared: SharedFolder | None = None
    """The shared folder with its root disks; None: they are on its host's own disk."""
    disks: tuple[Disk, ...] = ()
    """The attached volumes, in the order attached."""
    forwards: tuple[Forward, ...] = ()
    primary: Interface | None = None
    """The first interface; None: on the default user network."""
    interfaces: tuple[Interface, ...] = ()
    """Network interfaces beyond the first, in the order attached."""
    seed: Seed | None = None

    @property
    def all_interfaces(self) -> tuple[Interface, ...]:
        """The first interface, unless it is on the default user network, and the others."""
        return self.interfaces if self.primary is None else (self.primary, *self.interfaces)

    def forwards_of(self, interface: Interface) -> tuple[Forward, ...]:
        """Return the ports that lead to an interface: all to the first, none to others."""
        return self.forwards if interface.id == PRIMARY else ()

    @property
    def has_root(self) -> bool:
        """Whether it has a root disk."""
        return self.image.kind == "disk" or self.root_gib > 0
