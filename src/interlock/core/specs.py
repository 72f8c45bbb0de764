"""What a hypervisor needs to know to hold an instance: what it boots, its size, and what is plugged into it.

Values only, which mean nothing to the core; import them from `records`. What is kept of an instance and of what was
asked of it is there.
"""

from __future__ import annotations

from typing import Final

import msgspec


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance boots.

    A `disk` image is the base of its root disk; a `kernel` image is booted directly; an `iso` image is booted as a
    CD-ROM, with an empty root disk beside it.
    """

    id: str
    name: str
    kind: str
    """`disk`, `kernel` or `iso`."""
    format: str = "raw"
    """Of a `disk` image: `raw` or `qcow2`."""
    path: str
    """The disk, or the kernel, inside the server's image folder."""
    initrd: str | None = None
    cmdline: str | None = None
    size_bytes: int
    """The size that the guest sees, for a disk."""
    stored_bytes: int = 0
    """How much room its files took when it was brought in; 0 for what was kept before that was noted."""
    sha256: str
    """Of what was given, before it was converted."""
    converted_from: str | None = None
    """The format in which it was given, if that is not the one in which it is kept."""
    created_at_ms: int = 0
    project: str | None = None
    """Whose it is: the project of the instance that it was made of. None: every project may use it."""
    source_instance: str | None = None
    """The id of the instance of whose root disk it is a snapshot."""
    backup_type: str | None = None
    """Of a snapshot that rotates: with which others, such as `daily`."""


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of an instance: its root disk, or an attached volume."""

    id: str
    """`root`, or the volume's id."""
    path: str
    format: str = "qcow2"
    read_only: bool = False


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """A TCP port of the guest, reachable on the host's loopback address."""

    host_port: int
    guest_port: int


INTERFACES_MAX: Final = 8
"""How many interfaces an instance may have beyond its first."""


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface of an instance, beyond the first one that each has."""

    id: str
    mac: str
    """Six pairs of hexadecimal digits with colons."""


class Seed(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest is told of itself when it first starts, in the words of cloud-init's NoCloud."""

    hostname: str
    ssh_keys: tuple[str, ...] = ()
    user_data: str | None = None
    network_config: str | None = None


class SharedFolder(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that hosts have in common, under the same name on each."""

    path: str
    id: str
    """What its marker says, by which another folder at that place is told from it."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a hypervisor needs to know to hold an instance."""

    image: Image
    """What its root disk is built on, or the kernel that it boots."""
    rescue_image: Image | None = None
    """While it is rescued: what it boots instead, its root disk beside it as another disk."""
    vcpus: int = 1
    memory_mib: int = 128
    root_gib: int = 0
    """Size of the root disk, in GiB; 0 keeps the image's own size. With a kernel image, 0 means that there is no root
    disk, and any other size an empty one."""
    root: int = 0
    """Which root disk it has: each rebuild, resize or unshelving makes the next, so that two are never mistaken."""
    root_is_whole: bool = False
    """Whether the root disk stands by itself, instead of being a layer over the image."""
    shared: SharedFolder | None = None
    """Where its root disks are, for every host that has that folder; None: on the disk of the host where it is."""
    disks: tuple[Disk, ...] = ()
    """The attached volumes, in the order attached."""
    forwards: tuple[Forward, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    """Network interfaces beyond the first, in the order attached."""
    seed: Seed | None = None

    @property
    def has_root(self) -> bool:
        """Whether it has a disk of its own."""
        return self.image.kind == "disk" or self.root_gib > 0
