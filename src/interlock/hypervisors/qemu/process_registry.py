"""The process registry: the guests of one host, and the folder that they are kept in.

`open` locks the folder and adopts the QEMU processes that outlived an earlier server or agent; `close` detaches from
them. What is done with a guest is not here: see `adapter`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

import msgspec
import structlog

from interlock.confinement.control_groups import ControlGroups, control_groups
from interlock.confinement.host_users import HostUsers, UserClaim
from interlock.confinement.sandbox import Account, Namespaces, namespaces_for
from interlock.core.errors import OperationRejected, Unavailable
from interlock.core.records import GuestEvent
from interlock.hypervisors.host_identity import host_id
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder, Phase
from interlock.hypervisors.qemu.guest import Guest, no_guest
from interlock.hypervisors.qemu.process.accelerator import choose
from interlock.hypervisors.qemu.process.process_scan import GuestFolder
from interlock.hypervisors.qemu.process.qemu_process import find_in, shared_account, started_ticks
from interlock.hypervisors.qemu.process.strays import LOCK, settle_strays
from interlock.hypervisors.qemu.protections import protections
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.networks.host_abilities import why_no_filter
from interlock.networks.host_programs import find
from interlock.ports import HypervisorEvent
from interlock.ports.hosts import Protection

_LOG = structlog.get_logger(__name__)
AnswerT = TypeVar("AnswerT")

_SAFE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HOST_PREFIX: Final = 8
_CONCURRENT_ADOPTIONS: Final = 128
_CATCH_UP_S: Final = 0.5
"""How long `open` waits for guests to respond, in seconds. A guest that takes longer delays only its own operations."""
_PROCESS_SEARCH_S: Final = 2.0
"""How long a process that was being started during a crash may take to become recognisable, in seconds."""


class ProcessRegistry:
    """The guests that have a QEMU process, by instance id."""

    def __init__(
        self,
        settings: QemuSettings,
        on_adopted: Callable[[Guest], Coroutine[Any, Any, None]],
        on_disconnected: Callable[[Guest, str], None],
        on_ended: Callable[[Guest], Coroutine[Any, Any, None]],
    ) -> None:
        """`on_adopted` runs in the background for each guest that is adopted in `open`.

        `on_disconnected` is called with the name of a network of QEMU that has lost its other end; `on_ended` runs in
        the background when a process has ended.
        """
        self._on_adopted = on_adopted
        self._on_disconnected = on_disconnected
        self._on_ended = on_ended
        self.settings = settings
        """Accelerator and CPU model are resolved from `open` on."""
        self.account: Account | None = None
        """The account that QEMU runs as, from `open` on; None if it runs as this process does. With `users`, its user
        and group are replaced by the VM's own."""
        self.users: HostUsers | None = None
        """The users of VMs, from `open` on; None if VMs share one."""
        self.namespaces = Namespaces.NONE
        """How namespaces of VMs are made, from `open` on."""
        self.groups: ControlGroups | None = None
        """The control groups of VMs, from `open` on; None if there are none."""
        self.protections: tuple[Protection, ...] = ()
        """What confines VMs on this host, from `open` on."""
        self.path = settings.folder.absolute()
        self.home = GuestFolder(host_id="", path=str(self.path), device=0, inode=0)
        """Identifies the folder to later processes, from `open` on."""
        self.why_not_kvm = ""
        """Why guests do not run with KVM, for people; empty if they do, and before `open`."""
        self._guests: dict[str, Guest] = {}
        self._lock: int | None = None
        self._listener: Callable[[HypervisorEvent], None] = _ignore
        self._background: set[asyncio.Task[Any]] = set()
        self._catching_up: dict[str, asyncio.Task[bool]] = {}
        """Adopted guests whose events from before the adoption are not reported yet."""

    # --------------------------------------------------------------------------------------------- open and close

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        """Lock the folder and adopt its guests. Raises as `Hypervisor.open`."""
        self._require_programs()
        await asyncio.to_thread(self._choose_confinement)
        self._lock_folder()
        self._listener = listener
        try:
            self.home = GuestFolder.of(self.path, host_id(self.path))
            await settle_strays(self.home)
        except Unavailable:
            self._unlock_folder()
            raise
        try:
            remaining = iter(sorted(await self.known()))
            async with asyncio.TaskGroup() as adoptions:
                for _ in range(_CONCURRENT_ADOPTIONS):
                    adoptions.create_task(self._adopt_each(remaining))
            if self.groups is not None:
                await asyncio.to_thread(self.groups.remove_unused, self.group_name(""))
            if self._catching_up:
                await asyncio.wait(self._catching_up.values(), timeout=_CATCH_UP_S)
        except BaseExceptionGroup as failures:
            await self.close()
            raise failures.exceptions[0] from failures

    def _choose_confinement(self) -> None:
        users = HostUsers(self.settings.users_first, self.settings.users_max)
        shared = users.unusable() if os.geteuid() == 0 else "the server does not run as root"
        if not shared:
            self.users = users
            chosen = choose(self.settings, Account(user_id=users.first, group_id=users.first))
        else:
            chosen = choose(self.settings, shared_account(self.settings))
        self.settings, self.account, self.why_not_kvm = chosen.settings, chosen.account, chosen.because
        namespaced = namespaces_for(self.account)
        self.namespaces = namespaced.namespaces
        self.groups, no_groups = control_groups()
        self.protections = protections(
            self.users or shared,
            namespaced,
            self.groups,
            no_groups,
            has_passt=find("passt") is not None,
            no_filter=why_no_filter(),
        )

    def _require_programs(self) -> None:
        packages = {
            self.settings.qemu_binary: "qemu-system-x86",
            self.settings.image_tool_binary: "qemu-utils",
            "setpriv": "util-linux",
            "prlimit": "util-linux",
            "env": "coreutils",
        }
        for program, package in packages.items():
            if shutil.which(program) is None:
                raise Unavailable(f"{program} is not installed.", remedy=f"Run: apt-get install {package}")

    def _lock_folder(self) -> None:
        try:
            (self.path / "vms").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock_folder()
            raise Unavailable(
                f"The VM folder {self.path} is locked by another server or agent.",
                remedy="Stop it first, or configure another folder.",
            ) from None
        except OSError as error:
            raise Unavailable(
                f"The VM folder {self.path} cannot be used: {error.strerror}.",
                remedy="Give the server's user write access to it, and check that there is space.",
            ) from error

    def _unlock_folder(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def close(self) -> None:
        """Detach from the guests, which keep running."""
        self._listener = _ignore
        guests, self._guests = tuple(self._guests.values()), {}
        await asyncio.gather(*(guest.close() for guest in guests), *self._background)
        self._unlock_folder()

    # --------------------------------------------------------------------------------------------------- adoption

    async def _adopt_each(self, remaining: Iterator[str]) -> None:
        for instance_id in remaining:
            await self._adopt(instance_id)
            await asyncio.sleep(0)  # most are folders without a process, and the event loop has other work

    async def _adopt(self, instance_id: str) -> None:
        """Take over the process of an instance; report one that ended unobserved."""
        folder = self.folder(instance_id)
        record = folder.process_record()
        guest = None
        if folder.held():
            process_id = await self._find_process(folder)
            if process_id is not None:
                with contextlib.suppress(ProcessLookupError):
                    guest = self.add(instance_id, folder, process_id)
        if guest is not None:
            catching_up = self._catching_up[instance_id] = self.run_in_background(self._catch_up(guest))
            catching_up.add_done_callback(lambda _: self._catching_up.pop(instance_id, None))
        elif record is not None:
            if record.phase is Phase.RUNNING:
                self._listener(HypervisorEvent(instance_id=instance_id, kind=GuestEvent.VANISHED, during_watch=False))
            folder.remove_process_record()

    async def _catch_up(self, guest: Guest) -> bool:
        """Report what an adopted guest did unobserved. Return False if it did not respond in time."""
        responded = await guest.catch_up()
        self.run_in_background(self._on_adopted(guest))
        return responded

    async def caught_up(self, instance_id: str) -> bool:
        """Wait until an adopted guest's earlier events are reported. Return False if it did not respond in time."""
        catching_up = self._catching_up.get(instance_id)
        return catching_up is None or await asyncio.shield(catching_up)

    async def _find_process(self, folder: InstanceFolder) -> int | None:
        """Return the process that holds the instance: the recorded one if it is still that, else found by a scan."""
        record = folder.process_record()
        # Its working folder says no more than that: a process that was broken out of can change it.
        if record is not None and record.process_id and started_ticks(record.process_id) == record.started_ticks:
            return record.process_id
        deadline = asyncio.get_running_loop().time() + _PROCESS_SEARCH_S
        while folder.held():
            found = find_in(folder.inside)
            if found is not None:
                return found
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(
                    f"The VM in {folder.path} is locked by a process that is not visible to this user.",
                    remedy="Run the server as the user who started it, or end that process.",
                )
            # It is forked and has not executed QEMU yet: there is no notification for that.
            await asyncio.sleep(0.005)
        return None

    # ----------------------------------------------------------------------------------------------------- guests

    def add(self, instance_id: str, folder: InstanceFolder, process_id: int) -> Guest:
        """Register a process. Raises `ProcessLookupError` if it has ended."""
        guest = Guest(
            instance_id,
            folder,
            process_id,
            self.settings,
            listener=self._notify,
            on_end=self._remove,
            on_disconnected=self._on_disconnected,
        )
        self._guests[instance_id] = guest
        return guest

    def _notify(self, event: HypervisorEvent) -> None:
        self._listener(event)

    def _remove(self, guest: Guest) -> None:
        if self._guests.get(guest.instance_id) is guest:
            del self._guests[guest.instance_id]
        self.run_in_background(guest.monitor.close())
        self.run_in_background(self._clean_up(guest.instance_id, self._on_ended(guest)))

    async def _clean_up(self, instance_id: str, ending: Coroutine[Any, Any, None]) -> None:
        """Remove the group of a guest that has ended, once the other processes in it have."""
        try:
            await ending
        finally:
            if self.groups is not None and instance_id not in self._guests:
                await asyncio.to_thread(self.groups.remove, self.group_name(instance_id))

    def claim_user(self, name: str, opened: contextlib.ExitStack) -> tuple[Account | None, UserClaim | None]:
        """Claim a user for a process that is started in a block, and gets the claim's descriptor.

        Returns:
            The account that it runs as, and the claim; None where VMs share an account.

        Raises:
            OperationRejected, OSError: as `HostUsers.claim`.
        """
        if self.account is None or self.users is None:
            return self.account, None
        claim = self.users.claim(name)
        opened.callback(os.close, claim.descriptor)
        return msgspec.structs.replace(self.account, user_id=claim.user_id, group_id=claim.user_id), claim

    async def join_group(self, guest: Guest, process_id: int) -> None:
        """Place a process that serves a guest in the guest's control group."""
        if self.groups is None or guest.process.ended.is_set():
            return
        try:
            await asyncio.to_thread(self.groups.join, self.group_name(guest.instance_id), process_id)
        except OSError as error:
            if started_ticks(process_id) is not None:
                _LOG.warning("process not limited", instance=guest.instance_id, process=process_id, why=str(error))

    def run_in_background(self, work: Coroutine[Any, Any, AnswerT]) -> asyncio.Task[AnswerT]:
        """Start a task that `close` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def __len__(self) -> int:
        return len(self._guests)

    def __iter__(self) -> Iterator[Guest]:
        return iter(tuple(self._guests.values()))

    def find(self, instance_id: str) -> Guest | None:
        """Return the guest, or None if the instance has no process."""
        return self._guests.get(instance_id)

    def require(self, instance_id: str) -> Guest:
        """Return the guest. Raises `GuestNotFound` if the instance has no process."""
        guest = self._guests.get(instance_id)
        if guest is None:
            raise no_guest(instance_id)
        return guest

    def require_started(self, instance_id: str) -> Guest:
        """As `require`; raises `GuestNotFound` also if the guest's vCPUs have not run yet."""
        guest = self.require(instance_id)
        if guest.phase is Phase.STARTING:
            raise no_guest(instance_id)
        return guest

    async def known(self) -> frozenset[str]:
        """Return the ids of all instances that have a folder."""
        with os.scandir(self.path / "vms") as entries:
            return frozenset(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    def group_name(self, instance_id: str) -> str:
        """Return the name of the control group of an instance, which no other host of this machine uses."""
        return f"{self.home.host_id[:_HOST_PREFIX]}-{instance_id}"

    def can_name_folder(self, instance_id: str) -> bool:
        """Whether an id can be the name of a folder."""
        return _SAFE_ID.fullmatch(instance_id) is not None

    def folder(self, instance_id: str) -> InstanceFolder:
        """Return the folder of an instance, which may not exist. Raises `OperationRejected` for an invalid id."""
        if not self.can_name_folder(instance_id):
            raise OperationRejected(f"Invalid instance id {instance_id!r}: it cannot be used as the name of a folder.")
        return InstanceFolder(self.path / "vms" / instance_id)


def _ignore(_event: HypervisorEvent) -> None:
    """Drop an event: the registry is closed."""
