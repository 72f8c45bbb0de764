"""The process that holds a guest: started without privileges, recognised after we were away, watched and ended.

It lives in a session of its own, with no terminal and no pipe to us, so that it outlives us and the Ctrl-C of our
terminal. Its end is noticed by a pidfd. What it is told to do is not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import os
import pwd
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from interlock.core.errors import NotResponding, Unavailable
from interlock.hypervisors.qemu.settings import QemuSettings

FIRST_DESCRIPTOR: Final = 3
"""The number under which a process finds the first descriptor that it is given."""

_PARKED: Final = 256
"""Descriptors are moved above this number before they are handed over, so that none overwrites another."""
_START_TIME_FIELD: Final = 21 - 2
"""Where `starttime` stands in /proc/PID/stat, counted after the name in parentheses."""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Whom QEMU runs as."""

    user_id: int
    group_id: int
    group_ids: tuple[int, ...] = ()
    """Further groups."""


def account(settings: QemuSettings) -> Account | None:
    """The unprivileged account of the settings, or None if we have no privileges to drop.

    Raises:
        Unavailable: there is no such user or group.
    """
    if os.geteuid() != 0:
        return None
    try:
        return Account(user_id=pwd.getpwnam(settings.user).pw_uid, group_id=grp.getgrnam(settings.group).gr_gid)
    except KeyError as absent:
        raise Unavailable(
            f"QEMU is to run as user {settings.user}, group {settings.group}: {absent.args[0]}.",
            remedy="Create that account, or name another one in the settings of the QEMU hypervisor.",
        ) from None


def confined(command: Sequence[str], folder: Path, limits: Sequence[str], to: Account | None) -> list[str]:
    """The command, wrapped so that it runs in `folder` under limits and without privileges, now or to be gained."""
    words = ["env", "-i", f"--chdir={folder}", f"PATH={os.environ.get('PATH', os.defpath)}"]
    words += ["prlimit", *limits, "--", "setpriv", "--no-new-privs"]
    if to is not None:
        words += [f"--reuid={to.user_id}", f"--regid={to.group_id}"]
        words += ["--groups=" + ",".join(map(str, to.group_ids)) if to.group_ids else "--clear-groups"]
        words += ["--inh-caps=-all", "--bounding-set=-all"]
    return [*words, "--", *command]


def spawn(command: list[str], errors: int, descriptors: Sequence[int]) -> int:
    """Start a process of its own session and return its id.

    It finds `descriptors` under the numbers from `FIRST_DESCRIPTOR` on, in that order, `errors` as its standard error,
    and nothing else of what we have open.
    """
    parked: list[int] = []
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        sources = [nothing, nothing, errors, *descriptors]
        actions: list[tuple[int, int, int] | tuple[int, int]] = []
        for number, source in enumerate(sources):
            parked.append(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _PARKED))
            actions.append((os.POSIX_SPAWN_DUP2, parked[-1], number))
        actions += [(os.POSIX_SPAWN_CLOSE, stray) for stray in _inheritable(above=len(sources))]
        return os.posix_spawnp(command[0], command, dict(os.environ), file_actions=actions, setsid=True)
    finally:
        for descriptor in (nothing, *parked):
            os.close(descriptor)


def _inheritable(*, above: int) -> list[int]:
    """What we were given by whoever started us and that a guest must not keep open, such as the pipe of a shell."""
    found = []
    for place in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if int(place.name) >= above and os.get_inheritable(int(place.name)):
                found.append(int(place.name))
    return found


def started_ticks(process_id: int) -> int | None:
    """When the process started, in the kernel's own count; None if there is no such process."""
    try:
        text = Path(f"/proc/{process_id}/stat").read_bytes()
    except OSError:
        return None
    return int(text.rpartition(b")")[2].split()[_START_TIME_FIELD])


def runs_in(process_id: int, folder: Path) -> bool:
    """Whether the process was started in `folder`, which only the process of that instance is."""
    try:
        theirs, ours = Path(f"/proc/{process_id}/cwd").stat(), folder.stat()
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def find_in(folder: Path) -> int | None:
    """The process that was started in `folder`, looked for among all."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and runs_in(int(place.name), folder):
            return int(place.name)
    return None


class Process:
    """One running process, held by a descriptor (pidfd) that never comes to mean another one."""

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
        self._loop.add_reader(self._descriptor, self._notice_end)

    def _notice_end(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(ChildProcessError):
            # Only a child of ours needs it; whoever else's child it is reaps it.
            os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
        self.let_go()
        self.ended.set()
        self._on_end()

    def kill(self) -> None:
        """End it without asking it."""
        if self._descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    async def wait_ended(self, timeout_ms: int) -> None:
        """Wait until it has ended. Raises `NotResponding` if the kernel does not end it in time."""
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self.ended.wait()
        except TimeoutError:
            raise NotResponding(
                f"Process {self.process_id} was killed and has not ended after {timeout_ms} ms.",
                remedy="It probably waits for a disk that does not answer; look at the host's storage.",
            ) from None

    def let_go(self) -> None:
        """Stop watching, without disturbing it."""
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
