"""Which hypervisor serves which host. Whether a host lives, and what it may be taken for, is in `leases`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from interlock.ports import Host, Hypervisor, RemoteHost


class Hosts:
    """The hypervisors of a server's hosts, by name.

    Args:
        own: the name of the host on which the server runs.
        hypervisor: of that host.
        make: makes the adapter of another host.
    """

    def __init__(self, own: str, hypervisor: Hypervisor, make: Callable[[str], RemoteHost]) -> None:
        self.own = own
        self._hypervisor = hypervisor
        self._make = make
        self._others: dict[str, RemoteHost] = {}
        self._listeners: list[Callable[[Host], None]] = []
        self.reachable: Callable[[str], bool] = _always
        """False of a host whose guests have ended for certain. Who keeps the leases says so."""

    def __contains__(self, name: object) -> bool:
        return name == self.own or name in self._others

    def of(self, name: str) -> Hypervisor:
        """The hypervisor of that host. A name that no other host has is the server's own, maybe from before it was
        given another name.
        """
        return self._others.get(name, self._hypervisor)

    def remote(self, name: str) -> RemoteHost:
        """The adapter of another host; it is made when the host is first named."""
        if name not in self._others:
            self._others[name] = self._make(name)
        return self._others[name]

    def linked(self, name: str) -> bool:
        """Whether that host can be asked now."""
        other = self._others.get(name)
        return other is None or other.linked

    def listen(self, listener: Callable[[Host], None]) -> None:
        """Call `listener` whenever another host is taken for something else than before, or its agent has come."""
        self._listeners.append(listener)

    def tell(self, host: Host) -> None:
        """Tell those who listen. For who keeps the leases."""
        for listener in self._listeners:
            listener(host)

    def all_linked(self) -> dict[str, RemoteHost]:
        """The other hosts that can be asked now, by name."""
        return {name: host for name, host in self._others.items() if host.linked}

    def disk_free_mib(self, name: str) -> int | None:
        """What the file system of that other host has free for real, as far as its agent has said; else None."""
        other = self._others.get(name)
        return None if other is None else other.disk_free_mib

    def superseded(self, instance_id: str, fence: int) -> None:
        """Have the other hosts know that nobody with a smaller fence may act on the instance any more."""
        for other in self._others.values():
            other.superseded(instance_id, fence)

    async def close(self) -> None:
        """Let go of all hosts; their guests are not disturbed."""
        await asyncio.gather(*(other.close() for other in self._others.values()))
        await self._hypervisor.close()


def _always(_name: str) -> bool:
    """Where nobody keeps leases, guests may run on every host."""
    return True
