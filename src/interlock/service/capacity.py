"""Capacity of hosts: total, allocated and free memory, vCPUs and disk, and the checks of claims against them.

What projects may use is judged beside it, by `Capacity.quotas`.

The store keeps the sums of the instances' claims and updates them with each decision, so that concurrent requests
cannot claim the same capacity. The sums of volumes are kept here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from interlock.config import Config
from interlock.core.errors import InsufficientCapacity, InUse
from interlock.core.records import Instance
from interlock.core.resource_claims import Claim, apart_place, claims_of
from interlock.ports import Limits, Store, Tally
from interlock.service.quotas import Quotas

_MIB: Final = 1024**2
_NAMES: Final = {"memory_mib": "MiB of memory", "vcpus": "virtual processors", "disk_mib": "MiB of disk"}
_TALLIES: Final = {"memory_mib": Tally.MEMORY_MIB, "vcpus": Tally.VCPUS, "disk_mib": Tally.DISK_MIB}
_UNITS: Final = {"memory_mib": " MiB", "vcpus": "", "disk_mib": " MiB"}
_REMEDY: Final = (
    "Delete, migrate or offload others, ask for less, or raise the host_* limits of that host's configuration."
)


_APART_REMEDY: Final = (
    "Name a host without one, add a host, or take the VM out of the group with `vm label --apart-from`."
)


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """Amounts of a host's resources; None: unlimited."""

    memory_mib: int | None = None
    vcpus: int | None = None
    disk_mib: int | None = None


class Occupancy(msgspec.Struct, frozen=True, kw_only=True):
    """The use of a host's capacity."""

    total: Amounts
    claimed: Amounts
    free: Amounts
    guests: int
    """Number of instances on it, running or not."""
    disk_free_mib: int | None
    """Free space of its file system in MiB; None if unknown."""


class Sums(Protocol):
    """The sums of claims that a store keeps."""

    def tally(self, what: Tally, of: str) -> int: ...
    def tallies(self, what: Tally) -> dict[str, int]: ...
    def port_user(self, host: str, port: int) -> str | None: ...


class Elsewhere(Protocol):
    """Capacity that other hosts reported. Implemented by the driver's leases."""

    def limits(self, name: str) -> Limits: ...
    def disk_free_mib(self, name: str) -> int | None: ...


def disk_free_mib(folder: Path) -> int:
    """Return the free space of the folder's file system in MiB."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize // _MIB


def limits_of(config: Config, folder: Path) -> Limits:
    """Return this host's limits from the configuration and its hardware; `folder` must exist."""
    if config.hypervisor == "simulated":
        return Limits(memory_mib=config.host_memory_mib or None)
    memory_mib = config.host_memory_mib
    if not memory_mib:
        has_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MIB
        memory_mib = max(0, has_mib - config.host_memory_reserved_mib)
    stats = os.statvfs(folder)
    return Limits(
        memory_mib=memory_mib,
        vcpus=int((os.cpu_count() or 1) * config.host_vcpus_overcommit),
        disk_mib=int(stats.f_frsize * stats.f_blocks * config.host_disk_overcommit) // _MIB,
        disk_reserved_mib=config.host_disk_reserved_gib * 1024,
        devices_max=config.qemu.hotplug_ports,
    )


class _HypotheticalSums:
    """The store's sums plus hypothetical claims."""

    def __init__(self, store: Sums) -> None:
        self._store = store
        self._added: Counter[tuple[Tally, str]] = Counter()
        self._ports: dict[tuple[str, int], str] = {}

    def tally(self, what: Tally, of: str) -> int:
        return self._store.tally(what, of) + self._added[what, of]

    def tallies(self, what: Tally) -> dict[str, int]:
        added = {of: amount for (kind, of), amount in self._added.items() if kind is what}
        return Counter(self._store.tallies(what)) + Counter(added)

    def port_user(self, host: str, port: int) -> str | None:
        return self._ports.get((host, port)) or self._store.port_user(host, port)

    def add(self, instance_id: str, claim: Claim) -> None:
        self._added[Tally.GUESTS, claim.host] += 1
        for what, amount in _amounts(claim).items():
            self._added[_TALLIES[what], claim.host] += amount
        self._added.update((Tally.APART, apart_place(claim.host, group)) for group in claim.apart)
        self._ports.update({(claim.host, port): instance_id for port in claim.ports})


class Capacity:
    """Allocated and free capacity of each host.

    Args:
        store: keeps the sums of claims.
        host: name of the server's own host.
        folder: data folder of that host.
        limits: returns the limits of that host; called by `open`.
        elsewhere: limits of the other hosts.
    """

    def __init__(
        self, store: Store, host: str, folder: Path, limits: Callable[[], Limits], elsewhere: Elsewhere
    ) -> None:
        self._store = store
        self._sums: Sums = store
        self.host = host
        self._elsewhere = elsewhere
        self._folder = folder
        self._find_limits = limits
        self._limits = Limits()
        self._volumes: dict[str, tuple[str, int]] = {}
        """The project of each volume, and its disk on the server's own host in MiB."""
        self._volume_sums: Counter[tuple[str, str]] = Counter()
        """The number of volumes (`count`) and their disk in MiB (`mib`), by project."""
        self.quotas = Quotas(store, self.volumes_of)

    async def open(self) -> None:
        """Load the claims of volumes. The store must be open."""
        self._limits = self._find_limits()
        for volume in await self._store.volumes.all():
            self._keep_volume(volume.id, volume.project, _disk_mib(volume.size_bytes))

    # -------------------------------------------------------------------------------------------------------- claims

    def check(self, instance: Instance, before: Instance | None) -> None:
        """Check the claims of an instance on its host and its target. Call it in the decision that commits them.

        Args:
            instance: its new record.
            before: its present record; None for a new one.

        Raises:
            InsufficientCapacity: it does not fit on one of its hosts.
            InUse: a host port is forwarded to another instance, or another instance of its group is on the host.
        """
        self._examine(instance, claims_of(instance), () if before is None else claims_of(before))

    def choose(self, instance: Instance, hosts: Sequence[str], *, new: bool = False) -> str:
        """Return the host with the fewest instances among those with capacity for the instance, or the first of equals.

        Claims nothing. A `new` instance has no claims yet.

        Raises:
            InsufficientCapacity: it fits on none of them.
        """
        claim = next(iter(claims_of(instance)), None)
        if claim is None:
            return hosts[0]
        guests = self._sums.tallies(Tally.GUESTS)
        before = () if new else claims_of(instance)
        reasons = []
        for host in sorted(hosts, key=lambda name: guests.get(name, 0)):
            try:
                self._examine(instance, (msgspec.structs.replace(claim, host=host),), before)
            except (InsufficientCapacity, InUse) as error:
                reasons.append((host, error))
            else:
                return host
        short = next((error for _, error in reasons if isinstance(error, InsufficientCapacity)), None)
        only_apart = all(error.remedy == _APART_REMEDY for _, error in reasons)
        raise InsufficientCapacity(
            " ".join([f"{instance.name} fits on none of {len(reasons)} hosts.", *(one.message for _, one in reasons)]),
            needed=short.needed if short else {},
            free=short.free if short else {},
            remedy=_APART_REMEDY if only_apart else _REMEDY,
        )

    def check_apart(self, instance: Instance, before: Instance) -> None:
        """Raise `InUse` if another instance of one of its groups is on its host, or migrating there."""
        claimed = {claim.host: claim for claim in claims_of(before)}
        for claim in claims_of(instance):
            self._check_apart(instance.name, claim, claimed.get(claim.host, Claim(host=claim.host)))

    def imagined(self) -> ImaginedCapacity:
        """Return a copy for planning with hypothetical claims."""
        return ImaginedCapacity(self)

    def claim_volume(self, volume_id: str, name: str, size_bytes: int, project: str) -> None:
        """Claim a volume's disk. Raises `InsufficientCapacity`, `QuotaExceeded`."""
        self.quotas.check_volume(project, name, _disk_mib(size_bytes))
        self._check(name, Claim(host=self.host, disk_bytes=size_bytes), Claim(host=self.host))
        self._keep_volume(volume_id, project, _disk_mib(size_bytes))

    def release_volume(self, volume_id: str) -> None:
        """Release the claim of a volume that was deleted or not created."""
        if volume_id in self._volumes:
            project, size_mib = self._volumes.pop(volume_id)
            self._volume_sums.subtract({(project, "count"): 1, (project, "mib"): size_mib})

    def volumes_of(self, project: str) -> tuple[int, int]:
        """Return the number of a project's volumes, and their size in MiB."""
        return self._volume_sums[project, "count"], self._volume_sums[project, "mib"]

    def _keep_volume(self, volume_id: str, project: str, size_mib: int) -> None:
        self._volumes[volume_id] = (project, size_mib)
        self._volume_sums.update({(project, "count"): 1, (project, "mib"): size_mib})

    def _examine(self, instance: Instance, claims: Sequence[Claim], claimed: Sequence[Claim]) -> None:
        """Raise `InsufficientCapacity` or `InUse` if `claims` cannot replace the instance's present claims."""
        before = {claim.host: claim for claim in claimed}
        for claim in claims:
            present = before.get(claim.host, Claim(host=claim.host))
            for port in claim.ports:
                if self._sums.port_user(claim.host, port) not in {None, instance.id}:
                    raise InUse(
                        f"Port {port} of the host {claim.host} is already forwarded to another VM.",
                        remedy="Choose another port.",
                    )
            self._check(instance.name, claim, present)
            self._check_apart(instance.name, claim, present)

    def _check_apart(self, name: str, claim: Claim, before: Claim) -> None:
        for group in sorted(claim.apart):
            others = self._sums.tally(Tally.APART, apart_place(claim.host, group)) - (group in before.apart)
            if others > 0:
                raise InUse(
                    f"{name} cannot be on the host {claim.host}, which has another VM of its group {group[1]}.",
                    remedy=_APART_REMEDY,
                )

    def _check(self, name: str, claim: Claim, before: Claim) -> None:
        """Raise `InsufficientCapacity` unless the increase over the claim before is free."""
        self._check_devices(name, claim, before)
        more = {what: amount - _amounts(before)[what] for what, amount in _amounts(claim).items()}
        free = self._free(claim.host)
        short = [what for what, amount in more.items() if amount > 0 and _less(free[what], amount)]
        if short:
            needed = {what: more[what] for what in short}
            available = {what: max(0, free[what] or 0) for what in short}
            parts = [f"needs {needed[what]} {_NAMES[what]}, {available[what]}{_UNITS[what]} free" for what in short]
            raise InsufficientCapacity(
                f"{name} does not fit on the host {claim.host}: {'; '.join(parts)}.",
                needed=needed,
                free=available,
                remedy=_REMEDY,
            )
        reserved_mib = self._limits_of(claim.host).disk_reserved_mib
        if more["disk_mib"] <= 0 or not reserved_mib:
            return
        left_mib = self._disk_free_mib(claim.host)
        if left_mib is not None and left_mib < reserved_mib:
            raise InsufficientCapacity(
                f"{name} does not fit on the host {claim.host}: no space left on its disk: {left_mib} MiB free, "
                f"{reserved_mib} MiB reserved.",
                needed={"disk_mib": reserved_mib},
                free={"disk_mib": left_mib},
                remedy="Free space on the file system of that host's data folder.",
            )

    def _check_devices(self, name: str, claim: Claim, before: Claim) -> None:
        """Raise `InsufficientCapacity` if a guest there has too few hotplug ports for the instance's devices."""
        most = self._limits_of(claim.host).devices_max
        if most is not None and claim.devices > max(most, before.devices):
            raise InsufficientCapacity(
                f"{name} does not fit on the host {claim.host}: it needs hotplug ports for {claim.devices - 1} volumes "
                f"and additional interfaces; a guest there has {most - 1} beside its root disk.",
                needed={"devices": claim.devices - before.devices},
                free={"devices": max(0, most - before.devices)},
                remedy="Detach a device first, or raise qemu.hotplug_ports in that host's configuration.",
            )

    # --------------------------------------------------------------------------------------------------------- usage

    async def occupancy(self, host: str | None = None) -> Occupancy:
        """Return the use of a host's capacity; by default of the server's own."""
        host = host or self.host
        claimed = self._claimed(host)
        limits = self._limits_of(host)
        return Occupancy(
            total=Amounts(memory_mib=limits.memory_mib, vcpus=limits.vcpus, disk_mib=limits.disk_mib),
            claimed=Amounts(**claimed),
            free=Amounts(**{what: None if left is None else max(0, left) for what, left in self._free(host).items()}),
            guests=self._sums.tally(Tally.GUESTS, host),
            disk_free_mib=self._disk_free_mib(host),
        )

    def _limits_of(self, host: str) -> Limits:
        return self._limits if host == self.host else self._elsewhere.limits(host)

    def _free(self, host: str) -> dict[str, int | None]:
        """Return what is not allocated; negative if limits were lowered."""
        claimed = self._claimed(host)
        totals = {what: getattr(self._limits_of(host), what) for what in _NAMES}
        return {what: None if total is None else total - claimed[what] for what, total in totals.items()}

    def _disk_free_mib(self, host: str) -> int | None:
        return disk_free_mib(self._folder) if host == self.host else self._elsewhere.disk_free_mib(host)

    def _claimed(self, host: str) -> dict[str, int]:
        claimed = {what: self._sums.tally(tally, host) for what, tally in _TALLIES.items()}
        if host == self.host:
            claimed["disk_mib"] += sum(size_mib for _, size_mib in self._volumes.values())
        return claimed


class ImaginedCapacity(Capacity):
    """Capacity with hypothetical claims, for planning several moves; nothing is committed."""

    def __init__(self, real: Capacity) -> None:
        self.__dict__.update(real.__dict__)
        self._hypothetical = self._sums = _HypotheticalSums(self._store)

    def claim(self, instance: Instance, before: Instance) -> None:
        """Add the instance's claims on new hosts. Raises as `check`."""
        self.check(instance, before)
        hosts_before = {claim.host for claim in claims_of(before)}
        for claim in claims_of(instance):
            if claim.host not in hosts_before:
                self._hypothetical.add(instance.id, claim)


def _amounts(claim: Claim) -> dict[str, int]:
    return {"memory_mib": claim.memory_mib, "vcpus": claim.vcpus, "disk_mib": _disk_mib(claim.disk_bytes)}


def _disk_mib(size_bytes: int) -> int:
    return -(-size_bytes // _MIB)


def _less(free: int | None, needed: int) -> bool:
    return free is not None and free < needed
