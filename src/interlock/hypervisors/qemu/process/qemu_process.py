"""QEMU processes: started without privileges, found again after a restart, watched and killed.

Each has a session of its own, with no terminal and no pipe to the server, so that it outlives the server and a Ctrl-C
in its terminal. Its end is noticed by a pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import json
import os
import pwd
import select
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from interlock.confinement.sandbox import BWRAP, Account
from interlock.core.errors import NotResponding, Unavailable
from interlock.hypervisors.qemu.settings import QemuSettings

FIRST_DESCRIPTOR: Final = 3
"""The number of the first descriptor that is passed to a process; a guest's is the lock of its instance."""

_PARKED: Final = 256
"""Descriptors are duplicated above this number before they are passed, so that none overwrites another."""
_REPORT_BYTES: Final = 4096
_PARENT_FIELD: Final = 3 - 2
_START_TIME_FIELD: Final = 21 - 2
"""The index of `starttime` in /proc/PID/stat, counted after the name in parentheses."""


def shared_account(settings: QemuSettings) -> Account | None:
    """Return the unprivileged account of the settings, which VMs share, or None if this process is not root.

    Raises:
        Unavailable: the user or group does not exist.
    """
    if os.geteuid() != 0:
        return None
    try:
        return Account(user_id=pwd.getpwnam(settings.user).pw_uid, group_id=grp.getgrnam(settings.group).gr_gid)
    except KeyError as absent:
        raise Unavailable(
            f"QEMU cannot run as user {settings.user}, group {settings.group}: {absent.args[0]}.",
            remedy="Create that account, or configure another one.",
        ) from None


def spawn(command: list[str], errors: int, descriptors: Sequence[int]) -> int:
    """Start a process in a session of its own and return its id.

    It gets `descriptors` under the numbers from `FIRST_DESCRIPTOR` on, in that order, `errors` as its standard error,
    and nothing else that is open here.
    """
    parked: list[int] = []
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        sources = [nothing, nothing, errors, *descriptors]
        actions: list[tuple[int, int, int] | tuple[int, int]] = []
        for number, source in enumerate(sources):
            parked.append(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _PARKED))
            actions.append((os.POSIX_SPAWN_DUP2, parked[-1], number))
        actions += [(os.POSIX_SPAWN_CLOSE, stray) for stray in _inheritable_descriptors(above=len(sources))]
        return os.posix_spawnp(command[0], command, dict(os.environ), file_actions=actions, setsid=True)
    finally:
        for descriptor in (nothing, *parked):
            os.close(descriptor)


def reported_child(report: int, timeout_ms: int) -> int | None:
    """Read the id of the process that a confined command becomes, from what `confined` reports.

    Returns:
        The process id as this process sees it; None if there is none within the time.
    """
    text, poll = b"", select.poll()
    poll.register(report, select.POLLIN)
    while poll.poll(timeout_ms):
        chunk = os.read(report, _REPORT_BYTES)
        if not chunk:
            break
        text += chunk
    with contextlib.suppress(ValueError, KeyError):
        return int(json.loads(text)["child-pid"])
    return None


def reap(process_id: int) -> None:
    """Kill a child that leads a session and failed to start a process, with what it began, and wait for it."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.killpg(process_id, signal.SIGKILL)
        os.waitpid(process_id, 0)


def _inheritable_descriptors(*, above: int) -> list[int]:
    """Return descriptors that this process inherited and a guest must not keep open, such as the pipe of a shell."""
    found = []
    for place in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if int(place.name) >= above and os.get_inheritable(int(place.name)):
                found.append(int(place.name))
    return found


def started_ticks(process_id: int) -> int | None:
    """Return the start time of the process in clock ticks; None if it does not exist."""
    fields = _stat(process_id)
    return int(fields[_START_TIME_FIELD]) if fields else None


def has_ended(process_id: int) -> bool:
    """Whether the process does not exist or is a zombie."""
    fields = _stat(process_id)
    return not fields or fields[0] in {b"Z", b"X"}


def lives(process_id: int, ticks: int) -> bool:
    """Whether the process with that start time exists and is not a zombie: its id may have been reused."""
    return started_ticks(process_id) == ticks and not has_ended(process_id)


def kill(process_id: int, ticks: int, wait_ms: int = 0) -> bool:
    """Send SIGKILL to the process with that start time; return whether it has ended within the time. Blocks for it."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(process_id)
        try:
            if lives(process_id, ticks):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                poll = select.poll()
                poll.register(process, select.POLLIN)
                return bool(poll.poll(wait_ms))
        finally:
            os.close(process)
    return True


def is_stopped(process_id: int) -> bool:
    """Whether a signal stopped the process (SIGSTOP)."""
    fields = _stat(process_id)
    return bool(fields) and fields[0] == b"T"


def _stat(process_id: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the state on; none if the process does not exist."""
    try:
        return Path(f"/proc/{process_id}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


def runs_in(process_id: int, folder: Path) -> bool:
    """Whether `folder` is the working folder of the process, as only that of the process of that instance is."""
    try:
        theirs, ours = Path(f"/proc/{process_id}/cwd").stat(), folder.stat()
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def find_in(folder: Path) -> int | None:
    """Return the process whose working folder is `folder`, of all that are visible."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and runs_in(int(place.name), folder):
            return int(place.name)
    return None


def _bubblewrap_above(process_id: int) -> int | None:
    """Return a pidfd of the process of bubblewrap that waits for a process; None if there is none."""
    fields = _stat(process_id)
    parent = int(fields[_PARENT_FIELD]) if fields else 0
    with contextlib.suppress(OSError):
        if parent and Path(f"/proc/{parent}/comm").read_text().strip() == BWRAP:
            return os.pidfd_open(parent)
    return None


class Process:
    """One running process, held by a pidfd, which never comes to mean another one."""

    def __init__(self, process_id: int, on_end: Callable[[], None]) -> None:
        """Watch the process; `on_end` is called once on the event loop when it has ended.

        Raises:
            ProcessLookupError: it has ended, and was reaped.
        """
        self.process_id = process_id
        self.started_ticks = started_ticks(process_id) or 0
        self.ended = asyncio.Event()
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._descriptor: int | None = os.pidfd_open(process_id)
        self._bubblewrap = _bubblewrap_above(process_id)
        self._loop.add_reader(self._descriptor, self._on_readable)

    def _on_readable(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(ChildProcessError):
            # Only a child needs this; the parent of any other process reaps it.
            os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
        bubblewrap, self._bubblewrap = self._bubblewrap, None
        self.detach()
        if bubblewrap is not None:
            self._end_bubblewrap(bubblewrap)
        self.ended.set()
        self._on_end()

    def _end_bubblewrap(self, descriptor: int) -> None:
        """Kill the process of bubblewrap, which ends by itself unless somebody has stopped it, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)

        def on_end() -> None:
            self._loop.remove_reader(descriptor)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG)
            os.close(descriptor)

        self._loop.add_reader(descriptor, on_end)

    def run_queue_wait_s(self) -> float:
        """Return how long the thread that waited most for a processor has waited, in seconds; 0 if that is unknown."""
        waited = 0
        for task in Path(f"/proc/{self.process_id}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                waited = max(waited, int(task.read_bytes().split()[1]))
        return waited / 1e9

    def kill(self) -> None:
        """Send SIGKILL."""
        if self._descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    async def wait_ended(self, timeout_ms: int) -> None:
        """Wait until it has ended. Raises `NotResponding` on timeout."""
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self.ended.wait()
        except TimeoutError:
            raise NotResponding(
                f"Process {self.process_id} was killed and has not ended after {timeout_ms} ms.",
                remedy="It probably waits for I/O: check the host's storage.",
            ) from None

    def detach(self) -> None:
        """Stop watching; the process keeps running."""
        if self._bubblewrap is not None:
            os.close(self._bubblewrap)
            self._bubblewrap = None
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
