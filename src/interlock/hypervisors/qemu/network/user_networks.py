"""User networks of guests: a passt process for each interface, as long as QEMU has it.

QEMU listens on a socket per interface, and accepts one process after another, so that one that has ended is replaced.
QEMU reports its end as an event; what it does not report is found when a guest is adopted.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Sequence
from typing import Final

import structlog

from interlock.core.errors import HypervisorError, InterlockError, NotResponding, OperationRejected
from interlock.core.specs import PRIMARY, Forward, Interface, Spec
from interlock.hypervisors.qemu.command_line import interfaces_of, is_user, network_arguments, network_name, user_subnet
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder, NetworkProcess
from interlock.hypervisors.qemu.guest import UNFENCED, Guest
from interlock.hypervisors.qemu.network import passt
from interlock.hypervisors.qemu.network.passt import UserSubnet
from interlock.hypervisors.qemu.network.user_rules import UserRules
from interlock.hypervisors.qemu.process.qemu_process import kill, lives
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.hypervisors.qemu.qmp.monitor import retrieve_exception
from interlock.networks.connections import network_tag
from interlock.networks.user_filter import UserFilter
from interlock.ports import Permit

_LOG = structlog.get_logger(__name__)
_END_MS: Final = 5_000
_ACCEPT_MS: Final = 5_000
"""How long QEMU may take to accept a process, in milliseconds."""
_ANNOUNCEMENT: Final = {"initial": 50, "max": 50, "rounds": 1, "step": 10}
_LISTENING: Final = re.compile(r"(\S+): .*listening")
"""A network without its other end, as QEMU describes it."""
_RETRY_CONNECT_S: Final = 0.01
_RETRY_S: Final = 1.0
_RETRY_MAX_S: Final = 60.0
"""Pause before a process is started again that could not be, in seconds; doubled each time up to the second."""


class UserNetworks:
    """The passt processes of the guests of one host.

    Args:
        registry: the guests.
        separate: whether passt is used; None: where it is installed.
    """

    def __init__(self, registry: ProcessRegistry, *, separate: bool | None = None) -> None:
        self.separate = passt.is_installed() if separate is None else separate
        """Whether processes of their own do what needs the host's network, and not QEMU."""
        self._registry = registry
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._rules = UserRules(None, passt.host_resolvers)
        self._is_open = asyncio.Event()

    async def open(self) -> None:
        """Make the rules of the processes that run."""
        registry, rules = self._registry, None
        if registry.users is not None and self.separate:
            rules = UserFilter(network_tag(registry.home.host_id), registry.users.first, registry.users.count)
        self._rules = UserRules(rules, passt.host_resolvers)
        running: dict[tuple[str, str], tuple[int, bool]] = {}
        for guest in registry:
            spec = guest.folder.spec()
            for interface in () if spec is None else interfaces_of(guest.instance_id, spec):
                process = guest.folder.network_process(interface.id)
                if process is not None and process.user_id is not None and _lives(process):
                    running[guest.instance_id, interface.id] = process.user_id, _outbound(interface)
        for instance_id in await registry.known():
            if registry.find(instance_id) is None:
                await self.end_former(registry.folder(instance_id))
        await self._rules.open(running)
        self._is_open.set()

    def listen(self, folder: InstanceFolder, spec: Spec) -> dict[str, socket.socket]:
        """Return listening sockets for a new QEMU, by interface id. Raises OSError."""
        return {one.id: folder.listen(network_name(one.id)) for one in self._served(folder.path.name, spec)}

    def _served(self, instance_id: str, spec: Spec) -> list[Interface]:
        """Return the interfaces that have a process."""
        return [one for one in interfaces_of(instance_id, spec) if self.separate and is_user(one)]

    async def connect_all(self, guest: Guest, spec: Spec) -> None:
        """Start the processes of a new QEMU. Raises as `connect`."""
        for interface in self._served(guest.instance_id, spec):
            await self.connect(guest, interface, spec.forwards_of(interface))

    async def connect(self, guest: Guest, interface: Interface, forwards: Sequence[Forward] = ()) -> None:
        """Start the process of an interface, unless it runs; QEMU listens.

        Raises:
            OperationRejected: a forwarded port is in use, or it did not start.
        """
        # A process that was begun is recorded, also if who wants it is cancelled.
        connecting = self._registry.run_in_background(self._connect(guest, interface, forwards))
        connecting.add_done_callback(retrieve_exception)
        await asyncio.shield(connecting)

    async def _connect(self, guest: Guest, interface: Interface, forwards: Sequence[Forward]) -> None:
        async with self._lock(guest.instance_id, interface.id):
            if not self._runs(guest.folder, interface.id):
                await self._start(guest, interface, forwards)

    async def _replace(self, guest: Guest, interface: Interface, forwards: Sequence[Forward]) -> None:
        """Start a process in place of one that has ended, which learns the guest's MAC address from an announcement.

        A guest drops what comes to the broadcast address, and so all connections until it has sent something itself.
        """
        with guest.events("NETDEV_STREAM_CONNECTED") as connected:
            await self._start(guest, interface, forwards)
            if await connected.next_within(_ACCEPT_MS) is not None:
                await guest.execute(UNFENCED, "announce-self", _ANNOUNCEMENT)

    async def forward(self, permit: Permit, guest: Guest, interface: Interface, forwards: Sequence[Forward]) -> None:
        """Replace the process by one that forwards these ports. Connections through it end.

        Raises:
            OperationRejected: a port is in use, and the former process was started again.
        """
        spec = guest.folder.spec()
        async with self._lock(guest.instance_id, interface.id):
            permit.check()
            await self._end(guest.folder, interface.id)
            try:
                await self._replace(guest, interface, forwards)
            except OperationRejected:
                if spec is not None:
                    await self._replace(guest, interface, spec.forwards)
                raise

    async def add(self, permit: Permit, guest: Guest, interface: Interface) -> None:
        """Add the network of an interface to QEMU. Raises as `connect`, and as `Guest.execute`."""
        if not self.separate:
            await guest.execute(permit, "netdev_add", network_arguments(interface, None))
            return
        name = network_name(interface.id)
        await self._end(guest.folder, interface.id)
        with guest.folder.os_errors_rejected():
            listening = guest.folder.listen(name)
        with listening:
            # By number: QEMU listens in a thread that knows no names, and crashes later if it could not.
            given = await guest.execute(permit, "add-fd", attach=listening.fileno())
        await guest.execute(permit, "netdev_add", network_arguments(interface, str(given["fd"])))
        await self.connect(guest, interface)

    async def update(self, permit: Permit, guest: Guest, interface: Interface, forwards: Sequence[Forward]) -> None:
        """Bring an interface to what it is to be. Raises as `ports.Hypervisor.update_interface`."""
        spec = guest.folder.spec()
        if interface.id != PRIMARY or spec is None or tuple(forwards) == spec.forwards:
            return
        if not self.separate:
            raise OperationRejected(
                "This host cannot change the forwards of a VM while it runs: passt is not installed.",
                remedy="Install it there, or stop the VM first.",
            )
        await self.forward(permit, guest, interface, forwards)

    async def end(self, folder: InstanceFolder, interface_id: str) -> None:
        """End the process of an interface that is gone."""
        self._locks.pop((folder.path.name, interface_id), None)
        await self._end(folder, interface_id)
        await self._rules.forget(folder.path.name, interface_id)

    async def end_former(self, folder: InstanceFolder) -> None:
        """End the processes of a guest that has ended, which were stopped by a signal: others have by themselves."""
        if folder.held():
            return
        for process in folder.network_processes():
            await _kill_if_possible(folder.path.name, process)

    async def ended(self, instance_id: str, processes: Sequence[NetworkProcess]) -> None:
        """End the processes of a guest that has ended, and drop their rules."""
        async with contextlib.AsyncExitStack() as none_is_started:
            for key in [one for one in self._locks if one[0] == instance_id]:
                await none_is_started.enter_async_context(self._locks[key])
            for process in processes:
                await _kill_if_possible(instance_id, process)
        await self._rules.forget(instance_id)

    def lost(self, guest: Guest, name: str) -> None:
        """Note that QEMU's network `name` is disconnected, and start another process unless its interface is gone."""
        task = asyncio.get_running_loop().create_task(self._reconnect(guest, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop watching; the processes keep running."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._is_open.is_set():
            await self._rules.close()

    async def adopt(self, guest: Guest) -> None:
        """Start the processes that ended while nobody watched."""
        with contextlib.suppress(HypervisorError):
            spec = guest.folder.spec()
            described = str(await guest.query("human-monitor-command", **{"command-line": "info network"}))
            listening = set(_LISTENING.findall(described))
            for interface in () if spec is None else interfaces_of(guest.instance_id, spec):
                if (name := network_name(interface.id)) in listening:
                    self.lost(guest, name)

    async def _reconnect(self, guest: Guest, name: str) -> None:
        pause_s = _RETRY_S
        await self._is_open.wait()
        while not guest.process.ended.is_set():
            spec = guest.folder.spec()
            interfaces = () if spec is None else interfaces_of(guest.instance_id, spec)
            found = next((one for one in interfaces if network_name(one.id) == name and is_user(one)), None)
            if spec is None or found is None:
                return
            try:
                async with self._lock(guest.instance_id, found.id):
                    if not self._runs(guest.folder, found.id):
                        await self._replace(guest, found, spec.forwards_of(found))
            except (InterlockError, OSError) as error:
                _LOG.warning(
                    "user network not restored", instance=guest.instance_id, interface=found.id, why=str(error)
                )
            else:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(guest.process.ended.wait(), pause_s)
            pause_s = min(pause_s * 2, _RETRY_MAX_S)

    async def _start(self, guest: Guest, interface: Interface, forwards: Sequence[Forward]) -> None:
        with contextlib.ExitStack() as opened, guest.folder.os_errors_rejected():
            account, claim = self._registry.claim_user(f"{guest.instance_id}/{interface.id}", opened)
            user_id = None if claim is None else claim.user_id
            key = guest.instance_id, interface.id
            await self._rules.allow(key, user_id, outbound=_outbound(interface))
            connected = opened.enter_context(await self._connected(guest, network_name(interface.id)))
            process = await passt.start(
                connected.fileno(), claim, account, UserSubnet(start=user_subnet(interface.id)), forwards
            )
            guest.folder.write_network_process(interface.id, process)
        await self._registry.join_group(guest, process.process_id)

    async def _connected(self, guest: Guest, name: str) -> socket.socket:
        """Connect to the socket of a network, where a process that ended may still be waiting to be accepted."""
        until = asyncio.get_running_loop().time() + _ACCEPT_MS / 1000
        while True:
            try:
                return guest.folder.connect(name)
            except (ConnectionRefusedError, BlockingIOError):
                guest.require_process()
                if asyncio.get_running_loop().time() > until:
                    raise NotResponding(f"QEMU of VM {guest.instance_id} does not listen for its network.") from None
            # QEMU does not say when it accepts.
            await asyncio.sleep(_RETRY_CONNECT_S)

    def _runs(self, folder: InstanceFolder, interface_id: str) -> bool:
        process = folder.network_process(interface_id)
        return process is not None and _lives(process)

    async def _end(self, folder: InstanceFolder, interface_id: str) -> None:
        process = folder.network_process(interface_id)
        if process is not None:
            await _kill(process)
            folder.remove_network_process(interface_id)

    def _lock(self, instance_id: str, interface_id: str) -> asyncio.Lock:
        return self._locks.setdefault((instance_id, interface_id), asyncio.Lock())


def _outbound(interface: Interface) -> bool:
    return interface.network is None or interface.network.outbound


def _lives(process: NetworkProcess) -> bool:
    return lives(process.process_id, process.started_ticks)


async def _kill_if_possible(instance_id: str, process: NetworkProcess) -> None:
    try:
        await _kill(process)
    except NotResponding as error:
        _LOG.warning("user network not ended", instance=instance_id, why=str(error))


async def _kill(process: NetworkProcess) -> None:
    """Kill a process and wait until it has ended, unless it has and its id means another one.

    Raises:
        NotResponding: it does not end in time.
    """
    if not await asyncio.to_thread(kill, process.process_id, process.started_ticks, _END_MS):
        raise NotResponding(f"Process {process.process_id} was killed and has not ended.")
