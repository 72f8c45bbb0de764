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
from typing import Final

import msgspec

from interlock.config import Config
from interlock.core.claims import Claim, claim_of
from interlock.core.errors import InUse, NoRoom
from interlock.core.records import ENDS, Event, Instance
from interlock.ports import Store, every_instance

_MIB: Final = 1024**2
_ENDS: Final = frozenset(f"request.{status.value}" for status in ENDS)
_NAMES: Final = {"memory_mib": "MiB of memory", "vcpus": "virtual processors", "disk_mib": "MiB of disk"}
_UNITS: Final = {"memory_mib": " MiB", "vcpus": "", "disk_mib": " MiB"}


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
    disk_free_mib: int
    """What its file system has free for real, in MiB."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What may be promised of the server's own host in all; None: without limit."""

    memory_mib: int | None = None
    vcpus: int | None = None
    disk_mib: int | None = None
    disk_reserved_mib: int = 0
    """What must stay free of its file system for real when a disk is promised."""


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
    )


class Capacity:
    """What is promised of each host, and what is free. Only the server's own host has limits that are known here."""

    def __init__(self, store: Store, host: str, folder: Path, limits: Callable[[], Limits]) -> None:
        self._store = store
        self.host = host
        self._folder = folder
        self._find_limits = limits
        self._limits = Limits()
        self._claims: dict[str, Claim] = {}
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
            self._set(instance.id, claim_of(instance))
        for volume in await self._store.volumes():
            self._volumes.add(volume.id)
            self._set(volume.id, Claim(host=self.host, disk_bytes=volume.size_bytes))

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
        """Promise the instance what it needs as it has just been decided to be. May be called again.

        Raises:
            NoRoom: it does not fit on its host; nothing is promised.
            InUse: another instance of its host has one of the host's ports.
        """
        claim = claim_of(instance)
        if claim is not None:
            self._promise(instance.id, instance.name, claim)

    def claim_volume(self, volume_id: str, name: str, size_bytes: int) -> None:
        """Promise a volume its disk. Raises `NoRoom`."""
        self._promise(volume_id, name, Claim(host=self.host, disk_bytes=size_bytes))
        self._volumes.add(volume_id)

    def release_volume(self, volume_id: str) -> None:
        """The volume is gone, or was not made."""
        self._volumes.discard(volume_id)
        self._set(volume_id, None)

    def _promise(self, key: str, name: str, claim: Claim) -> None:
        before = self._claims.get(key)
        if before is not None and before.host == claim.host:
            claim = claim.joined(before)
        for port in claim.ports:
            if self._ports.get((claim.host, port), key) != key:
                raise InUse(
                    f"The host port {port} is forwarded to another instance already.", remedy="Choose another port."
                )
        if claim.host == self.host:
            self._check(name, claim, before or Claim(host=claim.host))
        self._set(key, claim)

    def _check(self, name: str, claim: Claim, before: Claim) -> None:
        """Raise `NoRoom` unless what the claim has more than before is free."""
        more = {what: amount - _amounts(before)[what] for what, amount in _amounts(claim).items()}
        free = self._free(self.host)
        short = [what for what, amount in more.items() if amount > 0 and _less(free[what], amount)]
        if short:
            needed = {what: more[what] for what in short}
            there = {what: max(0, free[what] or 0) for what in short}
            parts = [f"needs {needed[what]} {_NAMES[what]}, {there[what]}{_UNITS[what]} are free" for what in short]
            raise NoRoom(
                f"{name} does not fit on this host: {'; '.join(parts)}.",
                needed=needed,
                free=there,
                remedy="Delete or offload others, ask for less, or raise the host_* limits of the configuration.",
            )
        reserved_mib = self._limits.disk_reserved_mib
        if more["disk_mib"] > 0 and reserved_mib and (left_mib := self._disk_free_mib()) < reserved_mib:
            raise NoRoom(
                f"{name} does not fit on this host: {reserved_mib} MiB of its disk must stay free, {left_mib} are.",
                needed={"disk_mib": reserved_mib},
                free={"disk_mib": left_mib},
                remedy="Make room on the file system of the data folder.",
            )

    # ------------------------------------------------------------------------------------------------------- looking

    async def occupancy(self) -> Occupancy:
        """How the server's own host stands."""
        await self._refresh()
        sums = self._sums.get(self.host, Counter())
        limits = self._limits
        here = [key for key, claim in self._claims.items() if claim.host == self.host and key not in self._volumes]
        return Occupancy(
            total=Amounts(memory_mib=limits.memory_mib, vcpus=limits.vcpus, disk_mib=limits.disk_mib),
            promised=Amounts(**{what: sums[what] for what in _NAMES}),
            free=Amounts(
                **{what: None if left is None else max(0, left) for what, left in self._free(self.host).items()}
            ),
            guests=len(here),
            disk_free_mib=self._disk_free_mib(),
        )

    def _free(self, host: str) -> dict[str, int | None]:
        """What may still be promised; below zero where limits were lowered."""
        sums = self._sums.get(host, Counter())
        totals = {what: getattr(self._limits, what) for what in _NAMES}
        return {what: None if total is None else total - sums[what] for what, total in totals.items()}

    def _disk_free_mib(self) -> int:
        room = os.statvfs(self._folder)
        return room.f_bavail * room.f_frsize // _MIB

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
                self._set(key, None if instance is None else claim_of(instance))

    def _set(self, key: str, claim: Claim | None) -> None:
        """Replace what is promised to `key`, and keep the sums."""
        before = self._claims.pop(key, None)
        if before is not None:
            sums = self._sums[before.host]
            sums.subtract(_amounts(before))
            for port in before.ports:
                if self._ports.get((before.host, port)) == key:
                    del self._ports[before.host, port]
        if claim is not None:
            self._claims[key] = claim
            self._sums.setdefault(claim.host, Counter()).update(_amounts(claim))
            for port in claim.ports:
                self._ports.setdefault((claim.host, port), key)


def _amounts(claim: Claim) -> dict[str, int]:
    disk_mib = -(-claim.disk_bytes // _MIB)
    return {"memory_mib": claim.memory_mib, "vcpus": claim.vcpus, "disk_mib": disk_mib}


def _less(free: int | None, wanted: int) -> bool:
    return free is not None and free < wanted
