"""Control groups of VMs: limits for memory and threads, and weights for CPU and I/O.

Where systemd runs, each VM gets a transient scope; elsewhere its groups are made in the file system of cgroup version 1
or 2. A group holds only processes that were placed in it, and is removed with the VM.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

import msgspec

PARENT: Final = "interlock"
"""The group that has those of VMs."""
_MOUNTS: Final = Path("/proc/mounts")
_SYSTEMD: Final = Path("/run/systemd/system")
_WEIGHT: Final = 100
"""The weight of a group that has none of its own, in version 2."""
_SHARES: Final = 1024
"""The same in version 1, `cpu.shares`."""
_SHARES_RANGE: Final = (2, 262_144)
_BLKIO_RANGE: Final = (10, 1_000)
_MANAGER: Final = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_CALL_S: Final = 10.0
_SCOPE_S: Final = 5.0
_LOOK_S: Final = 0.005


class Resource(StrEnum):
    """What a control group limits or weighs."""

    MEMORY = "memory"
    THREADS = "threads"
    CPU = "cpu"
    IO = "io"


class GroupLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and weights of a group; a weight of 100 is that of a group without one."""

    memory_bytes: int
    threads: int
    cpu_weight: int
    io_weight: int


class ControlGroups(Protocol):
    """The control groups of VMs on a host."""

    kind: str
    """How they are made, for people."""

    @property
    def resources(self) -> frozenset[Resource]:
        """What they control on this host."""
        ...

    def place(self, name: str, process_id: int, limits: GroupLimits) -> None:
        """Create a group and move a process with its threads into it. Blocks. Raises OSError."""
        ...

    def join(self, name: str, process_id: int) -> None:
        """Move another process into a group, whose limits may be set later. Blocks. Raises OSError."""
        ...

    def remove(self, name: str) -> None:
        """Remove a group, unless it has processes."""
        ...

    def remove_unused(self, prefix: str) -> None:
        """Remove the groups without processes whose names begin with `prefix`."""
        ...


def control_groups(
    mounts: Path = _MOUNTS, systemd: Path = _SYSTEMD, *, as_root: bool | None = None
) -> tuple[ControlGroups | None, str]:
    """Find how control groups can be made on this host.

    Returns:
        The control groups, or None and the reason, for people.
    """
    as_root = os.geteuid() == 0 if as_root is None else as_root
    hierarchies, unified = _mounted(mounts)
    if systemd.is_dir() and shutil.which("busctl"):
        groups: SystemdScopes | VersionOne | VersionTwo = SystemdScopes(unified, as_root=as_root)
    elif hierarchies:
        groups = VersionOne(hierarchies)
    elif unified is not None:
        groups = VersionTwo(unified)
    else:
        return None, "no cgroup file system is mounted"
    try:
        groups.prepare()
    except OSError as error:
        return None, f"{groups.kind}: {error}"
    return groups, ""


def _mounted(mounts: Path) -> tuple[dict[Resource, Path], Path | None]:
    """Return the mount points of version 1, by what they control, and that of version 2."""
    first: dict[Resource, Path] = {}
    unified = None
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2":
            unified = Path(place)
        elif kind == "cgroup":
            for resource, controller in _CONTROLLERS.items():
                if controller in options.split(","):
                    first[resource] = Path(place)
    return first, unified


_CONTROLLERS: Final = {
    Resource.MEMORY: "memory",
    Resource.THREADS: "pids",
    Resource.CPU: "cpu",
    Resource.IO: "blkio",
}
"""The controllers of version 1; those of version 2 have the same names, but for `io`."""


class VersionOne:
    """Groups in the hierarchies of version 1, one for each controller."""

    kind = "cgroup version 1"

    def __init__(self, hierarchies: Mapping[Resource, Path]) -> None:
        self._parents = {resource: place / PARENT for resource, place in hierarchies.items()}

    @property
    def resources(self) -> frozenset[Resource]:
        return frozenset(self._parents) - (frozenset() if self._io_file() else {Resource.IO})

    def _io_file(self) -> str | None:
        """Return the file for the weight of I/O, which exists only with some I/O schedulers."""
        parent = self._parents.get(Resource.IO)
        names = ("blkio.bfq.weight", "blkio.weight")
        return next((name for name in names if parent is not None and (parent / name).exists()), None)

    def prepare(self) -> None:
        """Create the parents. Raises OSError."""
        for parent in self._parents.values():
            _make_parent(parent)

    def place(self, name: str, process_id: int, limits: GroupLimits) -> None:
        for resource, parent in self._parents.items():
            group = parent / name
            group.mkdir(mode=0o755, exist_ok=True)
            match resource:
                case Resource.MEMORY:
                    (group / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
                case Resource.THREADS:
                    (group / "pids.max").write_text(str(limits.threads))
                case Resource.CPU:
                    shares = _within(limits.cpu_weight * _SHARES // _WEIGHT, _SHARES_RANGE)
                    (group / "cpu.shares").write_text(str(shares))
                case Resource.IO:
                    if io_file := self._io_file():
                        (group / io_file).write_text(str(_within(limits.io_weight, _BLKIO_RANGE)))
            (group / "cgroup.procs").write_text(str(process_id))

    def join(self, name: str, process_id: int) -> None:
        for parent in self._parents.values():
            _join(parent / name, process_id)

    def remove(self, name: str) -> None:
        _remove(parent / name for parent in self._parents.values())

    def remove_unused(self, prefix: str) -> None:
        _remove(group for parent in self._parents.values() for group in parent.glob(f"{prefix}*/"))


class VersionTwo:
    """Groups in the one hierarchy of version 2, where this process may make them."""

    kind = "cgroup version 2"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parent = root / PARENT

    @property
    def resources(self) -> frozenset[Resource]:
        return frozenset(resource for resource in Resource if _version_two_name(resource) in self._controllers())

    def _controllers(self) -> list[str]:
        return (self._parent / "cgroup.subtree_control").read_text().split()

    def prepare(self) -> None:
        """Create the parent, and pass the controllers on to it and to its groups. Raises OSError."""
        _make_parent(self._parent)
        wanted = {_version_two_name(resource) for resource in Resource}
        for place in (self._root, self._parent):
            found = wanted & set((place / "cgroup.controllers").read_text().split())
            missing = found - set((place / "cgroup.subtree_control").read_text().split())
            if missing:
                text = " ".join(f"+{name}" for name in sorted(missing))
                (place / "cgroup.subtree_control").write_text(text)

    def place(self, name: str, process_id: int, limits: GroupLimits) -> None:
        group = self._parent / name
        group.mkdir(mode=0o755, exist_ok=True)
        values = {
            Resource.MEMORY: ("memory.max", limits.memory_bytes),
            Resource.THREADS: ("pids.max", limits.threads),
            Resource.CPU: ("cpu.weight", limits.cpu_weight),
            Resource.IO: ("io.weight", limits.io_weight),
        }
        for resource in self.resources:
            file, value = values[resource]
            with contextlib.suppress(FileNotFoundError) if resource is Resource.IO else contextlib.nullcontext():
                (group / file).write_text(str(value))
        (group / "cgroup.procs").write_text(str(process_id))

    def join(self, name: str, process_id: int) -> None:
        _join(self._parent / name, process_id)

    def remove(self, name: str) -> None:
        _remove([self._parent / name])

    def remove_unused(self, prefix: str) -> None:
        _remove(self._parent.glob(f"{prefix}*/"))


class SystemdScopes:
    """A transient scope of systemd for each VM, in `interlock.slice`. systemd removes it with its last process.

    Args:
        unified: the mount point of version 2, if it is mounted.
        as_root: whether the system's manager makes them, and not that of this user.
        call: runs a command; raises OSError.
    """

    kind = "systemd scope"

    def __init__(self, unified: Path | None, *, as_root: bool, call: Callable[[list[str]], None] | None = None) -> None:
        self._unified = unified
        self._manager = "--system" if as_root else "--user"
        self._call = call or _run

    @property
    def resources(self) -> frozenset[Resource]:
        if self._unified is None or self._manager == "--system":
            return frozenset(Resource)
        user = os.geteuid()
        place = self._unified / f"user.slice/user-{user}.slice/user@{user}.service/cgroup.controllers"
        try:
            delegated = place.read_text().split()
        except OSError:
            return frozenset()
        return frozenset(resource for resource in Resource if _version_two_name(resource) in delegated)

    def prepare(self) -> None:
        """Check that systemd can be called. Raises OSError."""
        self._call(["busctl", self._manager, "--quiet", "get-property", *_MANAGER, "Version"])

    def place(self, name: str, process_id: int, limits: GroupLimits) -> None:
        scope = f"{PARENT}-{name}.scope"
        properties = [
            *("PIDs", "au", "1", str(process_id)),
            *("Slice", "s", f"{PARENT}.slice"),
            *("Description", "s", f"Interlock VM {name}"),
            *("CollectMode", "s", "inactive-or-failed"),
            *("MemoryMax", "t", str(limits.memory_bytes)),
            *("TasksMax", "t", str(limits.threads)),
            *("CPUWeight", "t", str(limits.cpu_weight)),
            *("IOWeight", "t", str(limits.io_weight)),
        ]
        words = ["busctl", self._manager, "--quiet", "call", *_MANAGER, "StartTransientUnit"]
        self._call([*words, "ssa(sv)a(sa(sv))", scope, "fail", "8", *properties, "0"])
        _await_group(process_id, scope)

    def join(self, name: str, process_id: int) -> None:
        """Do nothing: systemd moves no process into a scope that is not delegated."""

    def remove(self, name: str) -> None:
        """Do nothing: systemd removes the scope."""

    def remove_unused(self, prefix: str) -> None:
        """Do nothing, as `remove`."""


def _run(command: list[str]) -> None:
    try:
        ended = subprocess.run(command, capture_output=True, timeout=_CALL_S, check=False)  # noqa: S603 - our own words
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} timed out") from error
    if ended.returncode:
        raise OSError(ended.stderr.decode("utf-8", "replace").strip() or f"{command[0]} failed")


def _await_group(process_id: int, scope: str) -> None:
    """Wait until systemd, which only queues the call, has moved the process. Raises OSError."""
    until = time.monotonic() + _SCOPE_S
    while scope not in Path(f"/proc/{process_id}/cgroup").read_text():
        if time.monotonic() > until:
            raise OSError(f"systemd did not move process {process_id} to {scope}")
        time.sleep(_LOOK_S)


def _make_parent(parent: Path) -> None:
    """Create the group that has those of VMs. Raises OSError, also if it exists and belongs to another user."""
    parent.mkdir(mode=0o755, exist_ok=True)
    if not os.access(parent, os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))


def _join(group: Path, process_id: int) -> None:
    group.mkdir(mode=0o755, exist_ok=True)
    (group / "cgroup.procs").write_text(str(process_id))


def _version_two_name(resource: Resource) -> str:
    return "io" if resource is Resource.IO else _CONTROLLERS[resource]


def _within(value: int, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(value, bounds[1]))


def _remove(groups: Iterable[Path]) -> None:
    for group in groups:
        with contextlib.suppress(OSError):  # it has processes, or does not exist
            group.rmdir()
