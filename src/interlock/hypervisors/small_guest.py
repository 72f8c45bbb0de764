"""The small guest: a real Linux built from the distribution's own kernel and busybox packages, about a second to boot.

What goes into it and how it is put together is here; where packages come from is in `packages`, what its processes do
is in `small_guest_files/`. Nothing is installed on this machine: a kernel package's hooks would touch its /boot.

The same package versions give the same bytes, and what was built is kept under a name made of them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from importlib import resources
from pathlib import Path

import msgspec

from interlock.core.errors import Unavailable
from interlock.hypervisors import initramfs, kernel_payload, packages, small_disk
from interlock.hypervisors.durable_files import sync_file, sync_folder

KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic")
"""The first that can be had is taken: Debian's and Ubuntu's kernels for virtual machines, then their general ones."""
BUSYBOX_PACKAGES = ("busybox-static",)
CMDLINE = (
    "console=ttyS0 quiet cryptomgr.notests noreplace-smp apparmor=0 rcupdate.rcu_expedited=1 "
    "tsc=reliable no_timer_check nolapic_timer pti=on"
)
"""Shortens the start by a third under emulation. `pti=on` keeps a guest whole that is migrated under emulation."""

_KERNEL_PARTS = re.compile(r"linux-(image|modules|binary)-")
_KERNEL_PATH = re.compile(r"(boot/vmlinuz-[^/]+|(usr/)?lib/modules/[^/]+/vmlinuz)")
_MODULE_PATH = re.compile(r"(?:usr/)?lib/modules/[^/]+/kernel/.*/([^/]+)\.ko(?:\.[a-z0-9]+)?")
_BUILTIN_PATH = re.compile(r"(usr/)?lib/modules/[^/]+/modules\.builtin")
_BUSYBOX_PATH = re.compile(r"(usr/)?bin/busybox")

_MODULES = ("evdev", "button", "virtio_pci", "virtio_blk", "virtio_net", "pvpanic_mmio", "pvpanic_pci")
"""The power button, PCI devices, disks, network, and telling of a panic. A kernel has some of them built in."""
_LATER_MODULES = ("virtio_console", "isofs")
"""The guest agent's port and the seed's file system: loaded when the guest is up already."""
_LIKELY_NEEDED = (
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "failover", "net_failover", "pvpanic"),
    "cdrom",
)
"""What those need in the kernels of today; anything else is found by reading what the modules say and looking again."""
_APPLETS = (
    *("acpid", "base64", "cat", "chmod", "cp", "dd", "dmesg", "echo", "free", "grep", "halt", "head", "hostname"),
    *("httpd", "insmod", "ip", "kill", "ls", "mkdir", "mkfifo", "mkpasswd", "mount", "nc", "nproc", "poweroff", "ps"),
    *("reboot", "rm", "rmdir", "sed", "setsid", "sh", "sleep", "sync", "tr", "udhcpc", "uevent", "umount", "uptime"),
    *("vi", "yes"),
)
_SCRIPTS = {
    "init": "init",
    "bin/plugged": "plugged",
    "bin/leased": "leased",
    "bin/agent": "agent",
    "bin/console_shell": "console_shell",
    "bin/count": "count",
    "bin/seed": "seed",
    "etc/acpi/PWRF/00000080": "power_button",
    **{
        f"www/cgi-bin/{name}": "misbehave"
        for name in (
            *("poweroff", "reboot", "panic", "ignore-power-button", "heed-power-button", "silence-agent"),
            *("wake-agent", "flood-console", "dirty-memory", "rest"),
        )
    },
    "www/cgi-bin/status": "status",
    "www/cgi-bin/write": "disk_content",
    "www/cgi-bin/read": "disk_content",
}
_FOLDERS = (
    *("bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "etc/seed", "modules", "proc", "root", "root/.ssh", "run"),
    *("run/disks", "run/interfaces", "sys", "tmp", "www", "www/cgi-bin"),
)
_TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/shadow": "root:*:::::::\n",
    "run/busy": "",
    "run/freezes": "0\n",
}


class SmallGuest(msgspec.Struct, frozen=True, kw_only=True):
    """The files of the small guest, in the cache that they were built in."""

    kernel: Path
    initrd: Path
    disk: Path
    """A raw disk that boots the same by itself."""
    cmdline: str = CMDLINE


class _Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What the files hold."""

    kernel: bytes
    initrd: bytes
    disk: bytes


class _KernelFiles(msgspec.Struct, frozen=True, kw_only=True):
    kernel: bytes
    modules: dict[str, bytes]
    """Unpacked, by name with underscores, in the order to load them."""


def build(cache: Path) -> SmallGuest:
    """The small guest for this system's newest packages, built unless `cache` has it. Blocks for seconds.

    `cache` may hold downloaded packages (`*.deb`), which are then not downloaded again.

    Raises:
        Unavailable: with the remedy, when a package or what reads it is not to be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    source = packages.PackageSource(cache)
    if (machine := packages.architecture()) != "amd64":
        raise Unavailable(
            f"The small guest is built for amd64 machines, and this one is {machine}.",
            remedy="Bring a kernel and initial file system of your own: `interlock image add`.",
        )
    kernel_parts = packages.closure(source, packages.find_first(source, KERNEL_PACKAGES), _KERNEL_PARTS)
    busybox = packages.find_first(source, BUSYBOX_PACKAGES)
    built = cache / f"small-guest-{_recipe((*kernel_parts, busybox))}"
    guest = SmallGuest(kernel=built / "kernel", initrd=built / "initrd", disk=built / "disk")
    if not built.is_dir():
        try:
            parts = _build(source, kernel_parts, busybox)
        except kernel_payload.UnreadableKernel as error:
            names = ", ".join(f"{part.name} {part.version}" for part in kernel_parts)
            raise Unavailable(f"The kernel in {names} cannot be used: {error}.") from error
        _keep(cache, built, guest, parts)
    return guest


def _recipe(parts: tuple[packages.Package, ...]) -> str:
    """A name for what these packages are made into by this code."""
    digest = hashlib.sha256()
    for part in sorted(parts, key=lambda part: part.name):
        digest.update(f"{part.name}={part.version}\n".encode())
    here = resources.files("interlock.hypervisors")
    for name in ("small_guest.py", "initramfs.py", "kernel_payload.py", "small_disk.py"):
        digest.update(here.joinpath(name).read_bytes())
    for name in sorted(set(_SCRIPTS.values())):
        digest.update(_script(name))
    return digest.hexdigest()[:16]


def _build(
    source: packages.PackageSource, kernel_parts: tuple[packages.Package, ...], busybox: packages.Package
) -> _Parts:
    files = packages.read_members(source.fetch(busybox), lambda path: _BUSYBOX_PATH.fullmatch(path) is not None)
    if len(files) != 1:
        raise Unavailable(f"The package {busybox.name} {busybox.version} has no busybox in it.")
    found = _read_kernel([source.fetch(part) for part in kernel_parts])
    # Where QEMU cannot start the ELF kernel directly, the guest unpacks the bzImage by itself: slower, the same guest.
    kernel = kernel_payload.vmlinux(found.kernel) or found.kernel
    (binary,) = files.values()
    initrd = initramfs.archive(_entries(binary, found.modules))
    return _Parts(kernel=kernel, initrd=initrd, disk=small_disk.image(found.kernel, initrd, CMDLINE))


def _read_kernel(files: list[Path]) -> _KernelFiles:
    wanted = {*_MODULES, *_LATER_MODULES, *_LIKELY_NEEDED}
    while True:
        members = _members(files, wanted)
        builtin = _builtin(members)
        modules = {
            _module_name(path): kernel_payload.decompress(data) for path, data in members.items() if _module_name(path)
        }
        needed = {name for module in modules.values() for name in kernel_payload.module_dependencies(module)}
        missing = needed - wanted - builtin
        if not missing:
            break
        wanted |= missing
    kernels = [data for path, data in members.items() if _KERNEL_PATH.fullmatch(path)]
    if not kernels:
        raise Unavailable(f"There is no kernel in {', '.join(file.name for file in files)}.")
    return _KernelFiles(kernel=kernels[0], modules=_in_loading_order(modules))


def _members(files: list[Path], modules: set[str]) -> dict[str, bytes]:
    def wanted(path: str) -> bool:
        return (
            _KERNEL_PATH.fullmatch(path) is not None
            or _BUILTIN_PATH.fullmatch(path) is not None
            or _module_name(path) in modules
        )

    return {path: data for file in files for path, data in packages.read_members(file, wanted).items()}


def _builtin(members: dict[str, bytes]) -> set[str]:
    lines = [line for path, data in members.items() if _BUILTIN_PATH.fullmatch(path) for line in data.splitlines()]
    return {Path(line.decode()).stem.replace("-", "_") for line in lines}


def _module_name(path: str) -> str:
    """The kernel's name of the module at `path`, or an empty string if it is not a module's path."""
    match = _MODULE_PATH.fullmatch(path)
    return match.group(1).replace("-", "_") if match else ""


def _in_loading_order(modules: dict[str, bytes]) -> dict[str, bytes]:
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in modules:
            return
        for needed in kernel_payload.module_dependencies(modules[name]):
            add(needed)
        ordered[name] = modules[name]

    for name in (*_MODULES, *_LATER_MODULES):
        add(name)
    return ordered


def _entries(busybox: bytes, modules: dict[str, bytes]) -> list[initramfs.Entry]:
    names = list(modules)
    first = 1 + max((names.index(name) for name in _MODULES if name in modules), default=-1)
    return [
        *(initramfs.folder(path) for path in _FOLDERS),
        # The kernel opens this one for process 1, before that has mounted anything.
        initramfs.character_device("dev/console", 5, 1),
        initramfs.file("bin/busybox", busybox, permissions=0o755),
        *(initramfs.link(f"bin/{applet}", "busybox") for applet in _APPLETS),
        *(initramfs.file(path, _script(name), permissions=0o755) for path, name in _SCRIPTS.items()),
        *(initramfs.file(path, text.encode()) for path, text in _TEXTS.items()),
        *(initramfs.file(f"modules/{name}.ko", data) for name, data in modules.items()),
        initramfs.file("modules/order", _lines(names[:first])),
        initramfs.file("modules/later", _lines(names[first:])),
    ]


def _lines(names: list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def _script(name: str) -> bytes:
    return resources.files("interlock.hypervisors").joinpath("small_guest_files", name).read_bytes()


def _keep(cache: Path, built: Path, guest: SmallGuest, parts: _Parts) -> None:
    """Put the files where `guest` says in one step, so that what is there is whole."""
    begun = Path(tempfile.mkdtemp(prefix=".build-", dir=cache))
    try:
        for file, content in ((guest.kernel, parts.kernel), (guest.initrd, parts.initrd), (guest.disk, parts.disk)):
            (begun / file.name).write_bytes(content)
            sync_file(begun / file.name)
        sync_file(begun)
        begun.rename(built)
        sync_folder(cache)
    except OSError:
        shutil.rmtree(begun, ignore_errors=True)
        # Another process has built the same meanwhile.
        if not built.is_dir():
            raise
