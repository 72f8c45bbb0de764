"""Admission of agents: binding of host names to identities, replacing and renaming hosts.

A name is bound to the identity (data folder) of the host that had it first. Another host gets the name only when the
guests of the first have ended for certain. Instances recorded under the name stay with the first host, which becomes a
fenced host of another name, from which they can be evacuated.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import msgspec
import structlog

from interlock.core import host_changes
from interlock.core.errors import Forbidden, HostTaken, Invalid
from interlock.core.records import Change, Instance
from interlock.core.references import MIGRATIONS
from interlock.driver.host_registry import HostRegistry
from interlock.driver.leases import Leases
from interlock.ports import Host, HostIdentity, HostState, InstanceFilter, Store, every_instance

_LOG = structlog.get_logger(__name__)
_SUFFIX: Final = "-old"
_NAME_MAX: Final = 63


class Join(Protocol):
    """Subscribes to a host's events."""

    async def __call__(self, host: str, *, again: bool = False) -> None: ...


class HostAdmission:
    """Admits agents, one at a time for each name.

    Args:
        store: has the instances.
        hosts: knows which agents respond.
        leases: has the host records, and knows whether their guests may run.
        join: awaited before anything is recorded on a host of a new name.
        resume: called with each instance whose host was renamed.
    """

    def __init__(
        self,
        store: Store,
        hosts: HostRegistry,
        leases: Leases,
        *,
        join: Join,
        resume: Callable[[Instance], None],
    ) -> None:
        self._store = store
        self._hosts = hosts
        self._leases = leases
        self._join = join
        self._resume = resume
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._binding: dict[str, str] = {}
        """Names that are being bound, by the id of the host."""

    async def open(self) -> None:
        """Complete renames that an earlier server began."""
        for host in self._leases.hosts():
            if host.replaces is not None:
                await self._move_instances(host)

    async def admit(self, host: Host) -> None:
        """Bind the name to the host, if it is free or already this host's; durable when this returns.

        Raises:
            HostTaken: another host has the name, or a copy of this one.
            Forbidden: this host has another name.
        """
        identity = host.identity
        assert identity is not None
        async with self._locks[host.name]:
            self._require_own_name(host.name, identity)
            self._binding[identity.id] = host.name
            try:
                await self._admit(host, identity)
            finally:
                self._binding.pop(identity.id, None)

    def _require_own_name(self, name: str, identity: HostIdentity) -> None:
        bound = {
            one.name for one in self._leases.hosts() if one.identity is not None and one.identity.id == identity.id
        }
        bound |= {self._binding[identity.id]} if identity.id in self._binding else set()
        if bound and name not in bound:
            own = min(bound)
            raise Forbidden(
                f"The data folder of this agent belongs to the host {own}, and not to {name}.",
                remedy=f"Start it with --name {own} and a token for that host, or with its own data folder.",
            )

    async def _admit(self, host: Host, identity: HostIdentity) -> None:
        # Before the record is read: it may change while the agent is waited for.
        answers = await self._hosts.answers(host.name)
        before = self._leases.find(host.name)
        if before is None:
            await self._leases.keep(host)
        elif before.identity is None:
            # Recorded by a version without identities: the first agent gets the name.
            await self._leases.admit(msgspec.structs.replace(before, identity=identity))
        elif before.identity.id != identity.id:
            self._require_fenced(before, answers=answers)
            await self._retire(before)
            await self._leases.keep(host)
        else:
            self._require_same_folder(before, before.identity, identity, answers=answers)
            await self._leases.admit(msgspec.structs.replace(before, identity=identity))
        _LOG.info("host admitted", host=host.name, identity=identity.id)

    def _require_fenced(self, host: Host, *, answers: bool) -> None:
        """Raise `HostTaken` while the guests of the host that has the name may run."""
        if answers:
            raise HostTaken(
                f"Another agent is connected as the host {host.name}, with another data folder.",
                remedy=f"Give this agent another name. To replace {host.name}: stop that agent; this one is admitted "
                f"when {host.name} is fenced, or after `interlock host replace {host.name} --i-am-sure`.",
            )
        if host.state is HostState.FENCED:
            return
        raise HostTaken(
            f"The host {host.name} has another data folder. Its agent is disconnected, and its VMs may run.",
            remedy=f"This agent is admitted when {host.name} is fenced, or when its VMs have ended and an admin "
            f"confirms it with `interlock host replace {host.name} --i-am-sure`.",
            retry_ms=self._leases.ends_in_ms(host.name),
        )

    def _require_same_folder(self, host: Host, before: HostIdentity, now: HostIdentity, *, answers: bool) -> None:
        """Raise `HostTaken` while guests may run that were started from the folder at another location."""
        if answers:
            raise self._copy(host.name)
        if host.state is HostState.FENCED or now.same_folder(before):
            return
        ends_in_ms = self._leases.ends_in_ms(host.name)
        if ends_in_ms is None and now.is_rebooted(before):
            return
        raise HostTaken(
            f"The data folder of the host {host.name} was at another path or on another machine when its agent was "
            "last connected, and VMs may run there.",
            remedy=f"This agent is admitted when {host.name} is fenced, or when its VMs have ended and an admin "
            f"confirms it with `interlock host fence {host.name}`.",
            retry_ms=ends_in_ms,
        )

    @staticmethod
    def _copy(name: str) -> HostTaken:
        return HostTaken(
            f"An agent is connected as the host {name}, with a copy of this data folder.",
            remedy="Use a data folder with one agent only: start this one with an empty folder and another name.",
        )

    # ----------------------------------------------------------------------------------------- replace and rename

    async def replace(self, name: str, by: str) -> Host:
        """Fence a host after an admin's confirmation, and free its name for the next agent.

        Return the fenced host, which keeps its instances under another name.

        Raises:
            NotFound: the host does not exist.
            Invalid: its agent is connected.
        """
        async with self._locks[name]:
            return await self._rename(await self._leases.fence(name, by))

    async def rename(self, name: str, new: str) -> Host:
        """Rename a host, with its agent connected or not; durable when this returns.

        The agent may use its former names until it is restarted with the new one, or the host is renamed back.

        Raises:
            NotFound: the host does not exist.
            Invalid: the new name is in use, also as a former name of another host, or migrations to or from the host
                are outstanding.
        """
        async with self._locks[name]:
            host = self._leases.host(name)
            self._require_free(new, host)
            await self._require_settled(name)
            renamed = await self._leases.rename(host, new)
            await self._join(new, again=True)
            _LOG.info("host renamed", host=name, now=new)
            return await self._move_instances(renamed)

    def _require_free(self, name: str, host: Host) -> None:
        """Raise `Invalid` unless the name is free, or a former one of that host."""
        if name == self._hosts.own or self._leases.find(name) is not None:
            raise Invalid(f"Host {name} already exists.", remedy="Choose another name.")
        owner = self._hosts.current_name(name)
        if owner not in {name, host.name}:
            raise Invalid(
                f"{name} is a former name of the host {owner}, whose agent may still use it.",
                remedy=f"Choose another name, or restart that agent with --name {owner} first.",
            )

    async def _require_settled(self, name: str) -> None:
        """Raise `Invalid` while migrations to or from the host are outstanding: their requests have its name."""
        migrating = [
            one.name
            for one in await self._store.unsettled()
            if one.left_host == name
            or any(
                request.operation in MIGRATIONS and name in {one.host, request.parameters.get("host")}
                for request in (*one.outstanding, *one.held)
            )
        ]
        if migrating:
            raise Invalid(
                f"VMs are migrating to or from host {name}: {', '.join(sorted(migrating)[:5])}.",
                remedy="Rename it when the migrations have ended, or cancel them.",
            )

    async def _retire(self, host: Host) -> None:
        """Free the name of a fenced host, and delete the host unless it has instances."""
        async for _ in every_instance(self._store, InstanceFilter(host=host.name)):
            await self._rename(host)
            return
        self._hosts.disconnect(host.name)
        await self._leases.drop(host.name)

    async def _rename(self, host: Host) -> Host:
        renamed = next((one for one in self._leases.hosts() if one.replaces == host.name), None)
        if renamed is None:
            name = self._free_name(host.name)
            await self._join(name)
            renamed = await self._leases.keep(
                msgspec.structs.replace(host, name=name, former=None, other_former=(), replaces=host.name)
            )
        self._hosts.disconnect(host.name)
        _LOG.warning("host replaced", host=host.name, now=renamed.name)
        return await self._move_instances(renamed)

    def _free_name(self, name: str) -> str:
        taken = {self._hosts.own, *(host.name for host in self._leases.hosts())}
        number = 1
        while True:
            suffix = _SUFFIX if number == 1 else f"{_SUFFIX}-{number}"
            found = name[: _NAME_MAX - len(suffix)] + suffix
            if found not in taken:
                return found
            number += 1

    async def _move_instances(self, host: Host) -> Host:
        """Move all instances from the host's former name to the present one, and free the former one."""
        assert host.replaces is not None
        rename = partial(_renamed, host.replaces, host.name)
        found = [one.id async for one in every_instance(self._store, InstanceFilter(host=host.replaces))]
        for instance_id in found:
            self._resume(await self._store.change(instance_id, rename))
        await self._leases.drop(host.replaces)
        # Its agent may have connected meanwhile.
        return await self._leases.keep(msgspec.structs.replace(self._leases.host(host.name), replaces=None))


def _renamed(before: str, name: str, instance: Instance, now_ms: int) -> Change[Instance]:
    if instance.host != before:
        return Change(instance=instance, answer=instance)
    return host_changes.rename_host(instance, name, now_ms)
