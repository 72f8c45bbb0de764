"""Whether a host has room for what is asked of it, judged before anything is made.

The sums are kept in memory: raised inside the decision that promises something, on the event loop, so that two who ask
at once cannot both get the last room; lowered when the store's events tell that less is promised. In between they are
too high, never too low. The store remains the truth: from it they are summed up at the start.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

import msgspec

from interlock.config import Config
from interlock.core.claims import Claim, claims_of
from interlock.core.errors import InUse, NoRoom
from interlock.core.records import ENDS, Event, Instance
from interlock.ports import Limits, Store, every_instance

_MIB: Final = 1024**2
_ENDS: Final = frozenset(f"request.{status.value}" for status in ENDS)
_NAMES: Final = {"memory_mib": "MiB of memory", "vcpus": "virtual processors", "disk_mib": "MiB of disk"}
_UNITS: Final = {"memory_mib": " MiB", "vcpus": "", "disk_mib": " MiB"}
_REMEDY: Final = (
    "Delete, migrate or offload others, ask for less, or raise the host_* limits of that host's configuration."
)


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """So much of a host; None: without limit."""

    memory_mib: int | None = None
    vcpus: int | None = None
    disk_mib: int | None = None


class Occupancy(msgspec.Struct, frozen=True, kw_only=True):
    """How a host stands."""

    total: Amounts
    promised: Amounts
    free: Amounts
    guests: int
    """How many instances it holds, running or not."""
    disk_free_mib: int | None
    """What its file system has free for real, in MiB; None where that is not known."""


class Elsewhere(Protocol):
    """Knows what the agents of other hosts said of them. The driver's leases do."""

    def limits(self, name: str) -> Limits: ...
    def disk_free_mib(self, name: str) -> int | None: ...


def disk_free_mib(folder: Path) -> int:
    """What the file system of the folder has free for real, in MiB."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize // _MIB


def limits_of(config: Config, folder: Path) -> Limits:
    """The limits that the configuration sets, with what this host has; `folder` must be there."""
    if config.hypervisor == "simulated":
        return Limits(memory_mib=config.host_memory_mib or None)
    memory_mib = config.host_memory_mib
    if not memory_mib:
        has_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MIB
        memory_mib = max(0, has_mib - config.host_memory_reserved_mib)
    room = os.statvfs(folder)
    return Limits(
        memory_mib=memory_mib,
        vcpus=int((os.cpu_count() or 1) * config.host_vcpus_overcommit),
        disk_mib=int(room.f_frsize * room.f_blocks * config.host_disk_overcommit) // _MIB,
        disk_reserved_mib=config.host_disk_reserved_gib * 1024,
        devices_max=config.qemu.hotplug_ports,
    )


class Capacity:
    """What is promised of each host, and what is free.

    Args:
        store: keeps what is promised.
        host: the name of the server's own host.
        folder: where that keeps its guests.
        limits: finds the limits of that; called when this is opened.
        elsewhere: knows the limits of the other hosts.
    """

    def __init__(
        self, store: Store, host: str, folder: Path, limits: Callable[[], Limits], elsewhere: Elsewhere
    ) -> None:
        self._store = store
        self.host = host
        self._elsewhere = elsewhere
        self._folder = folder
        self._find_limits = limits
        self._limits = Limits()
        self._claims: dict[str, tuple[Claim, ...]] = {}
        """Of each instance and volume, one for each host."""
        self._sums: dict[str, Counter[str]] = {}
        self._ports: dict[tuple[str, int], str] = {}
        self._volumes: set[str] = set()
        self._deciding: Counter[str] = Counter()
        """For whom something is being decided: what the store shows of them may be from before that."""
        self._stale: dict[str, None] = {}

    async def open(self) -> None:
        """Sum up what is promised, and listen from now on. The store must be open."""
        self._limits = self._find_limits()
        self._store.listen(self._hear)
        async for instance in every_instance(self._store):
            self._set(instance.id, claims_of(instance))
        for volume in await self._store.volumes():
            self._volumes.add(volume.id)
            self._set(volume.id, (Claim(host=self.host, disk_bytes=volume.size_bytes),))

    def _hear(self, events: Sequence[Event]) -> None:
        """Note whose claims may have become smaller, or moved. The store's listener."""
        for event in events:
            if event.kind == "instance.state" or event.kind in _ENDS or event.kind == "instance.created":
                self._stale[event.instance_id] = None

    # ----------------------------------------------------------------------------------------------------- promising

    @asynccontextmanager
    async def deciding(self, key: str) -> AsyncIterator[None]:
        """Around a change of the store in whose decision something is claimed for the instance or volume `key`."""
        await self._refresh()
        self._deciding[key] += 1
        try:
            yield
        finally:
            self._deciding[key] -= 1
            if not self._deciding[key]:
                del self._deciding[key]
            self._stale[key] = None

    def claim(self, instance: Instance) -> None:
        """Promise the instance what it needs as it has just been decided to be, where it is and where it goes.

        May be called again.

        Raises:
            NoRoom: it does not fit on one of its hosts; nothing is promised.
            InUse: another instance of such a host has one of the host's ports.
        """
        self._set(instance.id, self._examine(instance.id, instance.name, claims_of(instance)))

    def choose(self, instance: Instance, hosts: Sequence[str]) -> str:
        """The host, of several, on which there are fewest instances of those that have room for the instance; of equal
        ones the first. Nothing is promised.

        Raises:
            NoRoom: it fits on none of them.
        """
        claim = next(iter(claims_of(instance)), None)
        if claim is None:
            return hosts[0]
        guests = self._guests()
        reasons = []
        for host in sorted(hosts, key=lambda name: guests[name]):
            try:
                self._examine(instance.id, instance.name, (msgspec.structs.replace(claim, host=host),))
            except (NoRoom, InUse) as error:
                reasons.append((host, error))
            else:
                return host
        short = next((error for _, error in reasons if isinstance(error, NoRoom)), None)
        raise NoRoom(
            " ".join([f"{instance.name} fits on none of {len(reasons)} hosts.", *(one.message for _, one in reasons)]),
            needed=short.needed if short else {},
            free=short.free if short else {},
            remedy=_REMEDY,
        )

    def claim_volume(self, volume_id: str, name: str, size_bytes: int) -> None:
        """Promise a volume its disk. Raises `NoRoom`."""
        claim = Claim(host=self.host, disk_bytes=size_bytes)
        self._set(volume_id, self._examine(volume_id, name, (claim,)))
        self._volumes.add(volume_id)

    def release_volume(self, volume_id: str) -> None:
        """The volume is gone, or was not made."""
        self._volumes.discard(volume_id)
        self._set(volume_id, ())

    def _examine(self, key: str, name: str, claims: Sequence[Claim]) -> tuple[Claim, ...]:
        """The claims, each with what it is promised already. Raises `NoRoom` and `InUse` if that cannot be promised."""
        before = {claim.host: claim for claim in self._claims.get(key, ())}
        examined = []
        for claim in claims:
            there = before.get(claim.host, Claim(host=claim.host))
            joined = claim.joined(there)
            for port in joined.ports:
                if self._ports.get((claim.host, port), key) != key:
                    raise InUse(
                        f"The port {port} of the host {claim.host} is forwarded to another instance already.",
                        remedy="Choose another port.",
                    )
            self._check(name, joined, there)
            examined.append(joined)
        return tuple(examined)

    def _check(self, name: str, claim: Claim, before: Claim) -> None:
        """Raise `NoRoom` unless what the claim has more than before is free."""
        self._check_places(name, claim, before)
        more = {what: amount - _amounts(before)[what] for what, amount in _amounts(claim).items()}
        free = self._free(claim.host)
        short = [what for what, amount in more.items() if amount > 0 and _less(free[what], amount)]
        if short:
            needed = {what: more[what] for what in short}
            there = {what: max(0, free[what] or 0) for what in short}
            parts = [f"needs {needed[what]} {_NAMES[what]}, {there[what]}{_UNITS[what]} are free" for what in short]
            raise NoRoom(
                f"{name} does not fit on the host {claim.host}: {'; '.join(parts)}.",
                needed=needed,
                free=there,
                remedy=_REMEDY,
            )
        reserved_mib = self._limits_of(claim.host).disk_reserved_mib
        if more["disk_mib"] <= 0 or not reserved_mib:
            return
        left_mib = self._disk_free_mib(claim.host)
        if left_mib is not None and left_mib < reserved_mib:
            raise NoRoom(
                f"{name} does not fit on the host {claim.host}: {reserved_mib} MiB of its disk must stay free, "
                f"{left_mib} are.",
                needed={"disk_mib": reserved_mib},
                free={"disk_mib": left_mib},
                remedy="Make room on the file system of that host's data folder.",
            )

    def _check_places(self, name: str, claim: Claim, before: Claim) -> None:
        """Raise `NoRoom` if a guest there has no place for all that the instance would have plugged in."""
        most = self._limits_of(claim.host).devices_max
        if most is not None and claim.devices > max(most, before.devices):
            raise NoRoom(
                f"{name} does not fit on the host {claim.host}: with this it has {claim.devices - 1} volumes and "
                f"further interfaces, and a guest there has places for {most - 1} beside its root disk.",
                needed={"devices": claim.devices - before.devices},
                free={"devices": max(0, most - before.devices)},
                remedy="Detach something first, or raise qemu.hotplug_ports of that host's configuration.",
            )

    # ------------------------------------------------------------------------------------------------------- looking

    async def occupancy(self, host: str | None = None) -> Occupancy:
        """How a host stands; the server's own where none is named."""
        await self._refresh()
        host = host or self.host
        sums = self._sums.get(host, Counter())
        limits = self._limits_of(host)
        return Occupancy(
            total=Amounts(memory_mib=limits.memory_mib, vcpus=limits.vcpus, disk_mib=limits.disk_mib),
            promised=Amounts(**{what: sums[what] for what in _NAMES}),
            free=Amounts(**{what: None if left is None else max(0, left) for what, left in self._free(host).items()}),
            guests=self._guests()[host],
            disk_free_mib=self._disk_free_mib(host),
        )

    def _guests(self) -> Counter[str]:
        """How many instances each host is promised to."""
        keys = (claims for key, claims in self._claims.items() if key not in self._volumes)
        return Counter(claim.host for claims in keys for claim in claims)

    def _limits_of(self, host: str) -> Limits:
        return self._limits if host == self.host else self._elsewhere.limits(host)

    def _free(self, host: str) -> dict[str, int | None]:
        """What may still be promised; below zero where limits were lowered."""
        sums = self._sums.get(host, Counter())
        totals = {what: getattr(self._limits_of(host), what) for what in _NAMES}
        return {what: None if total is None else total - sums[what] for what, total in totals.items()}

    def _disk_free_mib(self, host: str) -> int | None:
        return disk_free_mib(self._folder) if host == self.host else self._elsewhere.disk_free_mib(host)

    async def _refresh(self) -> None:
        """Bring the claims of those that changed into step with the store."""
        for key in tuple(self._stale):
            if key in self._deciding:
                continue
            del self._stale[key]
            if key in self._volumes:
                continue
            instance = await self._store.instance(key)
            if key not in self._deciding and key not in self._stale:
                self._set(key, () if instance is None else claims_of(instance))

    def _set(self, key: str, claims: tuple[Claim, ...]) -> None:
        """Replace what is promised to `key`, and keep the sums."""
        for before in self._claims.pop(key, ()):
            self._sums[before.host].subtract(_amounts(before))
            for port in before.ports:
                if self._ports.get((before.host, port)) == key:
                    del self._ports[before.host, port]
        if claims:
            self._claims[key] = claims
        for claim in claims:
            self._sums.setdefault(claim.host, Counter()).update(_amounts(claim))
            for port in claim.ports:
                self._ports.setdefault((claim.host, port), key)


def _amounts(claim: Claim) -> dict[str, int]:
    disk_mib = -(-claim.disk_bytes // _MIB)
    return {"memory_mib": claim.memory_mib, "vcpus": claim.vcpus, "disk_mib": disk_mib}


def _less(free: int | None, wanted: int) -> bool:
    return free is not None and free < wanted
