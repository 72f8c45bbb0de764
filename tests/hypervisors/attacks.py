#!/usr/bin/python3 -IS
"""Attacks of a compromised QEMU on its host and on other VMs: run in QEMU's place, writes what succeeded as JSON.

It is started as a VM's QEMU, with QEMU's arguments. Beside it lies `target.json`: the process and the files of another
VM, and paths of the host.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(sys.argv[0]).parent
PATIENCE_S = 10.0


def outcome(attempt: Callable[..., object], *arguments: Any) -> str:
    """Return `done`, or the name of the error."""
    try:
        attempt(*arguments)
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return "done"


def read_memory(process_id: int) -> None:
    place = Path(f"/proc/{process_id}")
    with (place / "mem").open("rb", 0) as memory:
        memory.seek(int((place / "maps").read_text().partition("-")[0], 16))
        memory.read(16)


def read_file(path: str) -> None:
    with Path(path).open("rb") as file:
        file.read(1)


def write_file(path: str) -> None:
    Path(path).write_bytes(b"x")
    Path(path).unlink()


def attach_memory_segment(key: int) -> None:
    if ctypes.CDLL(None, use_errno=True).shmget(key, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "")


def bomb(most: int) -> int:
    """Start processes that wait, until the kernel refuses; return how many there were."""
    ours, theirs = os.pipe()
    started = 0
    try:
        for _ in range(most):
            if os.fork() == 0:
                os.close(theirs)
                os.read(ours, 1)
                os._exit(0)
            started += 1
    except OSError:
        pass
    os.close(theirs)
    for _ in range(started):
        os.wait()
    return started


def take_memory(mebibytes: int) -> int:
    """Write to memory in a process of its own; return the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        held = bytearray(mebibytes << 20)
        held[:: resource.getpagesize()] = b"x" * len(held[:: resource.getpagesize()])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def await_group() -> list[str]:
    """Wait until this process is in its control group; return the groups."""
    until = time.monotonic() + PATIENCE_S
    while True:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        groups = [line for line in lines if "/interlock" in line]
        if groups or time.monotonic() > until:
            return groups
        time.sleep(0.01)


def main() -> None:
    target = json.loads((HERE / "target.json").read_text())
    victim = target["process_id"]
    found: dict[str, Any] = {
        "user": os.getuid(),
        "group": os.getgid(),
        "groups": os.getgroups(),
        "processes": [int(place.name) for place in Path("/proc").iterdir() if place.name.isdigit()],
        "memory": outcome(read_memory, victim),
        "signal": outcome(os.kill, victim, 0),
        "files": {path: outcome(read_file, path) for path in target["files"]},
        "written": [path for path in target["writable"] if outcome(write_file, path) == "done"],
        "shared_memory": outcome(attach_memory_segment, target["shared_memory"]),
        "hostname": outcome(socket.sethostname, "attacked"),
        "namespaces": {kind: str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("mnt", "pid", "ipc", "uts")},
        "status": dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()),
        "become_root": outcome(os.setuid, 0),
        "cgroups": await_group() if target["cgroups"] else [],
        "bomb": bomb(target["processes_max"]),
    }
    if target["cgroups"]:
        found["memory_signal"] = take_memory(target["memory_mib"])
    with os.fdopen(os.dup(2), "w") as report:
        report.write(json.dumps(found) + "\n")


main()
