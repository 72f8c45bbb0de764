"""Quotas of projects: their limits, what is used, and the check in the decision that uses more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from interlock.core.errors import not_found
from interlock.core.quotas import RESOURCES, Quota, place, require_within, use_of
from interlock.core.records import Instance
from interlock.ports import Store, Tally

_INSTANCE_SUMS = ("instances", "vcpus", "memory_mib", "disk_mib")


class Quotas:
    """The limits and the use of each project.

    Args:
        store: keeps the sums of instances and the images.
        volumes: returns the number of a project's volumes and their size in MiB.
    """

    def __init__(self, store: Store, volumes: Callable[[str], tuple[int, int]]) -> None:
        self._store = store
        self._volumes = volumes
        self._limits: dict[str, Quota] = {}
        """Of the projects that have a limit."""
        self.networks: Counter[str] = Counter()
        """The number of networks of each project."""
        self.security_groups: Counter[str] = Counter()
        """The number of security groups of each project."""
        self.closed: set[str] = set()
        """Projects that are being deleted, or were: requests that are still on their way create nothing there."""

    def set_limits(self, project: str, quota: Quota) -> None:
        """Limit a project from now on. What it uses already stays."""
        self._limits.pop(project, None)
        if quota.limits:
            self._limits[project] = quota

    def used(self, project: str) -> dict[str, int]:
        """Return what a project uses of each resource, with decisions that are not durable yet."""
        tally = self._store.tally
        volumes, volumes_mib = self._volumes(project)
        used = {what: tally(Tally.QUOTA, place(what, project)) for what in _INSTANCE_SUMS}
        used["disk_mib"] += volumes_mib
        used["volumes"] = volumes
        used["networks"] = self.networks[project]
        used["images"] = self._store.images.count(project) + tally(Tally.IMAGES_IN_PROJECT, project)
        used["outstanding_requests"] = tally(Tally.OUTSTANDING_IN_PROJECT, project)
        used["held_requests"] = tally(Tally.HELD_IN_PROJECT, project)
        return {what: used[what] for what in RESOURCES}

    def check(self, instance: Instance, before: Instance | None, *, requests: bool = True) -> None:
        """Check what an instance uses more. Call it in the decision that commits it.

        Args:
            instance: its new record.
            before: its present record; None for a new one.
            requests: whether the numbers of outstanding and held requests are checked too.

        Raises:
            QuotaExceeded: the project may not use so much.
            NotFound: the project is being deleted.
        """
        if before is None:
            self.require_open(instance.project)
        quota = self._limits.get(instance.project)
        if quota is None:
            return
        present = {} if before is None else use_of(before)
        growth = {what: amount - present.get(what, 0) for what, amount in use_of(instance).items()}
        if not requests:
            growth.update(outstanding_requests=0, held_requests=0)
        self._require(instance.project, instance.name, quota, growth)

    def check_volume(self, project: str, name: str, size_mib: int) -> None:
        """Check a new volume, as `check`. Raises as that."""
        self.require_open(project)
        quota = self._limits.get(project)
        if quota is not None:
            self._require(project, f"The volume {name}", quota, {"volumes": 1, "disk_mib": size_mib})

    def check_network(self, project: str, name: str) -> None:
        """Check a new network, as `check`. Raises as that."""
        self.require_open(project)
        quota = self._limits.get(project)
        if quota is not None:
            self._require(project, f"The network {name}", quota, {"networks": 1})

    def require_open(self, project: str) -> None:
        """Raise `NotFound` if a project is being deleted."""
        if project in self.closed:
            raise not_found("Project", project)

    def _require(self, project: str, what: str, quota: Quota, growth: Mapping[str, int]) -> None:
        if any(growth.get(one, 0) > 0 for one in quota.limits):
            require_within(project, what, quota, self.used(project), growth)
