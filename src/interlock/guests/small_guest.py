"""The small guest: a Linux built from the distribution's kernel and busybox packages, which boots in about a second.

The packages are found by `packages`; the guest's scripts are in `small_guest_files/`. Nothing is installed on this
machine: the hooks of a kernel package would change its /boot.

The build is reproducible, and cached under a digest of its package versions.
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
from interlock.guests import initramfs, packages, small_disk
from interlock.images import kernel_payload
from interlock.images.atomic_files import sync_file, sync_folder
from interlock.images.image_folder import GuestFiles

KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic")
"""In order of preference: the kernels of Debian and Ubuntu for virtual machines, then their general ones."""
BUSYBOX_PACKAGES = ("busybox-static",)
CMDLINE = (
    "console=ttyS0 quiet cryptomgr.notests noreplace-smp apparmor=0 rcupdate.rcu_expedited=1 "
    "tsc=reliable no_timer_check nolapic_timer pti=on "
    "initcall_blacklist=trace_eval_init,tracer_init_tracefs,init_blk_tracer,ftrace_check_for_weak_functions"
)
"""Shortens the boot by a third under TCG, and further by leaving out the tables that the kernel makes for tracing.
`pti=on` is required for live migration under TCG."""

MEMORY_MIB_MIN = 96
"""With less, the kernel cannot decompress itself."""

_KERNEL_PARTS = re.compile(r"linux-(image|modules|binary)-")
_KERNEL_PATH = re.compile(r"(boot/vmlinuz-[^/]+|(usr/)?lib/modules/[^/]+/vmlinuz)")
_MODULE_PATH = re.compile(r"(?:usr/)?lib/modules/[^/]+/kernel/.*/([^/]+)\.ko(?:\.[a-z0-9]+)?")
_BUILTIN_PATH = re.compile(r"(usr/)?lib/modules/[^/]+/modules\.builtin")
_BUSYBOX_PATH = re.compile(r"(usr/)?bin/busybox")

_MODULES = ("evdev", "button", "virtio_pci", "virtio_blk", "virtio_net", "pvpanic_mmio", "pvpanic_pci")
"""The power button, PCI devices, disks, network, and reporting of a panic. Some may be built into the kernel."""
_LATER_MODULES = ("virtio_console", "isofs")
"""The guest agent's port and the seed's file system: loaded after the boot."""
_LIKELY_NEEDED = (
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "failover", "net_failover", "pvpanic"),
    "cdrom",
)
"""Probable dependencies of those; others are found from the modules' own dependency information."""
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
            *("poweroff", "reboot", "panic", "ignore-power-button", "obey-power-button", "silence-agent"),
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


class _Parts(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the packages."""

    kernel: bytes
    initrd: bytes
    disk: bytes


class _KernelFiles(msgspec.Struct, frozen=True, kw_only=True):
    kernel: bytes
    modules: dict[str, bytes]
    """Decompressed, by name with underscores, in load order."""


def build(cache: Path) -> GuestFiles:
    """Return the small guest of this system's newest packages; build it unless it is in `cache`. Blocks for seconds.

    `cache` may hold downloaded packages (`*.deb`), which are then not downloaded again.

    Raises:
        Unavailable: a package, or a program to read it, is not available.
    """
    cache.mkdir(parents=True, exist_ok=True)
    source = packages.PackageSource(cache)
    if (machine := packages.architecture()) != "amd64":
        raise Unavailable(
            f"The small guest is built for amd64 machines, and this one is {machine}.",
            remedy="Add an image with a kernel and initrd: `interlock image add`.",
        )
    source.ask((*KERNEL_PACKAGES, *BUSYBOX_PACKAGES))
    kernel_parts = packages.closure(source, packages.find_first(source, KERNEL_PACKAGES), _KERNEL_PARTS)
    busybox = packages.find_first(source, BUSYBOX_PACKAGES)
    built = cache / f"small-guest-{_recipe((*kernel_parts, busybox))}"
    guest = GuestFiles(
        kernel=built / "kernel",
        initrd=built / "initrd",
        disk=built / "disk",
        cmdline=CMDLINE,
        memory_mib_min=MEMORY_MIB_MIN,
    )
    if not built.is_dir():
        try:
            parts = _build(source, kernel_parts, busybox)
        except kernel_payload.UnreadableKernel as error:
            names = ", ".join(f"{part.name} {part.version}" for part in kernel_parts)
            raise Unavailable(f"The kernel in {names} cannot be used: {error}.") from error
        _keep(cache, built, guest, parts)
    return guest


def _recipe(parts: tuple[packages.Package, ...]) -> str:
    """Return a digest of the packages and of the code that builds the guest from them."""
    digest = hashlib.sha256()
    for part in sorted(parts, key=lambda part: part.name):
        digest.update(f"{part.name}={part.version}\n".encode())
    here = resources.files("interlock")
    for name in ("guests/small_guest.py", "guests/initramfs.py", "guests/small_disk.py", "images/kernel_payload.py"):
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
    # If QEMU cannot start the ELF kernel directly, the bzImage decompresses itself: slower, with the same result.
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
    # Checking its signature is most of what loading a module costs, and this kernel loads it without one too.
    unsigned = {name: kernel_payload.without_signature(module) for name, module in modules.items()}
    return _KernelFiles(kernel=kernels[0], modules=_in_loading_order(unsigned))


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
    """Return the name of the kernel module at `path`, or an empty string if it is none."""
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
        # The kernel opens the console for process 1, before anything is mounted.
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
    return resources.files("interlock.guests").joinpath("small_guest_files", name).read_bytes()


def _keep(cache: Path, built: Path, guest: GuestFiles, parts: _Parts) -> None:
    """Move the files to the paths of `guest` atomically."""
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
        # Another process has built the same guest meanwhile.
        if not built.is_dir():
            raise
