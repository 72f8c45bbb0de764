"""Hands on the disks of real guests, for tests: patterns written and read, files judged, copies caught on their way.

What is written where a guest's device writes goes through QEMU, so that a copy under way has to notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.hypervisors.qemu.guest import Guest
from interlock.ports import Permit
from waiting import PATIENCE_S

MIB: Final = 1 << 20
SLOW_BYTES_PER_S: Final = 4 * MIB
"""How fast a copy is that is to be caught on its way."""
_LEAKS: Final = 3
"""How the image tool ends when there are clusters in a file that nothing uses, and nothing worse."""


class Progress:
    """A report that a test can wait for."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int | None]] = []
        self._under_way = asyncio.Event()

    def __call__(self, done: int, total: int | None = None, **_more: str | None) -> None:
        self.told.append((done, total))
        if done and total and done < total:
            self._under_way.set()

    async def until_under_way(self) -> None:
        """Return once something is done, and not everything."""
        async with asyncio.timeout(PATIENCE_S):
            await self._under_way.wait()


def info(path: Path | str) -> dict[str, Any]:
    """What the image tool says of a disk, in use or not."""
    words = ["qemu-img", "info", "-U", "--output=json", str(path)]
    answer: dict[str, Any] = msgspec.json.decode(subprocess.check_output(words))
    return answer


def has_open(process_id: int, path: Path | str) -> bool:
    """Whether a process of ours has the file open."""
    found = set()
    for place in Path(f"/proc/{process_id}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(place.readlink()))
    return str(path) in found


def write_pattern(path: Path | str, pattern: int, mib: int, at_mib: int = 0) -> None:
    """Write to a disk (qcow2) that nobody uses."""
    words = ["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {at_mib}M {mib}M", str(path)]
    subprocess.check_output(words)


def has_pattern(path: Path | str, pattern: int, mib: int, at_mib: int = 0) -> bool:
    """Whether that part of a disk (qcow2) that nobody uses holds the pattern."""
    words = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} {at_mib}M {mib}M", str(path)]
    read = subprocess.run(words, check=False, capture_output=True)
    assert read.returncode == 0 or b"Pattern verification failed" in read.stdout, read
    return read.returncode == 0


def first_byte(path: Path | str) -> int:
    """The first byte of a disk (qcow2), in use or not."""
    words = ["qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read -v 0 16", str(path)]
    said = subprocess.check_output(words).decode()
    return int(said.split(":", 1)[1].split()[0], 16)


def is_whole(path: Path | str) -> bool:
    """Whether nothing in the file of a disk that nobody uses is damaged; clusters may be left over in it."""
    words = ["qemu-img", "check", "-q", "-f", "qcow2", str(path)]
    return subprocess.run(words, check=False).returncode in {0, _LEAKS}


def same_content(one: Path | str, other: Path | str) -> bool:
    """Whether a guest could not tell the two disks apart."""
    words = ["qemu-img", "compare", "-q", "-U", str(one), str(other)]
    return subprocess.run(words, check=False).returncode == 0


async def write_as_guest(permit: Permit, guest: Guest, disk_id: str, words: str) -> None:
    """Write to a disk where the guest's device does. `words` are those of qemu-io, such as `write -P 7 0 1M`."""
    device = (await guest.disk_devices())[disk_id]
    place = f"/machine/peripheral/{device}/virtio-backend"
    said = await guest.execute(permit, "human-monitor-command", {"command-line": f'qemu-io -d {place} "{words}"'})
    assert "rror" not in said, said
    assert "failed" not in said, said


async def full_speed(permit: Permit, guest: Guest) -> None:
    """Let the copy that is under way go on as fast as it can."""
    (job,) = await guest.query("query-jobs")
    await guest.execute(permit, "block-job-set-speed", {"device": job["id"], "speed": 0})
