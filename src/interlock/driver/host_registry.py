"""The registry of hosts and their hypervisors. The state of hosts is in `leases`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from interlock.core.errors import OperationRejected
from interlock.ports import Host, Hypervisor, RemoteHost


class HostRegistry:
    """The hypervisors of a server's hosts, by name.

    Args:
        own: the name of the host on which the server runs.
        hypervisor: of that host.
        make: creates the adapter of another host.
        reachable: returns False for a fenced host; see `Leases`.
        unencrypted: whether guests may be migrated without TLS between hosts of which one cannot do it.
    """

    def __init__(
        self,
        own: str,
        hypervisor: Hypervisor,
        make: Callable[[str], RemoteHost],
        reachable: Callable[[str], bool],
        *,
        unencrypted: bool = False,
    ) -> None:
        self.own = own
        self.reachable = reachable
        self._hypervisor = hypervisor
        self._make = make
        self._unencrypted = unencrypted
        self._others: dict[str, RemoteHost] = {}
        self._former: dict[str, str] = {}
        """Present names of hosts, by former name."""
        self._listeners: list[Callable[[Host], None]] = []

    def __contains__(self, name: object) -> bool:
        return name == self.own or name in self._others

    def of(self, name: str) -> Hypervisor:
        """Return the hypervisor of that host; an unknown name is the server's own host, perhaps a former name of it."""
        return self._others.get(self.current_name(name), self._hypervisor)

    def rename(self, before: str, name: str) -> None:
        """Rename another host, and keep its agent's connection; it has no former names until `set_former_names`."""
        # Of a deleted host, or of an agent that was refused.
        self.disconnect(name)
        self._others[name] = self.remote(before)
        del self._others[before]
        self._former = {alias: present for alias, present in self._former.items() if present != before}

    def set_former_names(self, name: str, former: frozenset[str]) -> None:
        """Make exactly these names aliases of another host. For `Leases`."""
        others = {alias: present for alias, present in self._former.items() if present != name}
        if former or len(others) < len(self._former):
            self._former = others | dict.fromkeys(former, name)
            self.remote(name).rename(name, former)

    def current_name(self, name: str) -> str:
        """Return the present name of a host, given its present or former one."""
        return self._former.get(name, name)

    def remote(self, name: str) -> RemoteHost:
        """Return the adapter of another host; created on first use."""
        if name not in self._others:
            self._others[name] = self._make(name)
        return self._others[name]

    def linked(self, name: str) -> bool:
        """Whether that host is connected."""
        other = self._others.get(name)
        return other is None or other.linked

    def listen(self, listener: Callable[[Host], None]) -> None:
        """Call `listener` whenever the record of another host changes, or its agent has connected."""
        self._listeners.append(listener)

    def notify(self, host: Host) -> None:
        """Notify the listeners. For `Leases`."""
        for listener in self._listeners:
            listener(host)

    async def answers(self, name: str) -> bool:
        """Whether that other host's agent is connected and responds."""
        other = self._others.get(name)
        return other is not None and await other.answers()

    def disconnect(self, name: str) -> None:
        """Close the connection of that other host's agent, if there is one."""
        if name in self._others:
            self._others[name].disconnect()

    def renewed_s(self, name: str) -> float:
        """Return when that other host's last renewal was granted, on the monotonic clock; 0: never."""
        other = self._others.get(name)
        return 0.0 if other is None else other.renewed_s

    def end_lease(self, name: str, unless_after_s: float | None = None) -> bool:
        """Grant that other host no more renewals, as `RemoteHost.end_lease`."""
        other = self._others.get(name)
        return other is None or other.end_lease(unless_after_s)

    def resume_lease(self, name: str) -> None:
        """Grant that other host renewals again."""
        if name in self._others:
            self._others[name].resume_lease()

    def all_linked(self) -> dict[str, RemoteHost]:
        """Return the connected other hosts, by name."""
        return {name: host for name, host in self._others.items() if host.linked}

    def certificate_names(self, source: str, target: str) -> tuple[str, str] | None:
        """Return the names in the certificates of two hosts, for TLS between them; None to migrate without encryption.

        Raises:
            OperationRejected: one of them has no certificate, and encryption is required.
        """
        names = {name: self._certificate_name(name) for name in (source, target)}
        if (one := names[source]) is not None and (other := names[target]) is not None:
            return one, other
        if self._unencrypted:
            return None
        lacking = next(name for name, certified in names.items() if certified is None)
        raise OperationRejected(
            f"VMs are migrated encrypted, and the agent of host {lacking} cannot do that: it speaks an earlier version "
            "of the protocol, or has no certificate.",
            remedy="Upgrade and restart that agent; the server's log says if it could not issue a certificate. "
            "qemu.migration_unencrypted, set on the server and both hosts, allows migration without encryption.",
        )

    def _certificate_name(self, name: str) -> str | None:
        """Return the name in the certificate of a host. The server's own has one as soon as another host has."""
        other = self._others.get(self.current_name(name))
        return self.own if other is None else other.certificate_name

    def disk_free_mib(self, name: str) -> int | None:
        """Return the free space of that other host's file system in MiB; None if unknown."""
        other = self._others.get(name)
        return None if other is None else other.disk_free_mib

    def superseded(self, instance_id: str, fence: int) -> None:
        """Notify the other hosts that calls with a smaller fence must be rejected for the instance."""
        for other in self._others.values():
            other.superseded(instance_id, fence)

    async def close(self) -> None:
        """Disconnect from all hosts; their guests keep running."""
        await asyncio.gather(*(other.close() for other in self._others.values()))
        await self._hypervisor.close()
