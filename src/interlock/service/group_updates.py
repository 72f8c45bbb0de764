"""Brings changed rules of security groups to the instances that have them.

Each interface is changed by an ordinary request, so the gate may deny one while others follow. What is left is found by
comparing the interfaces with their groups: nothing else is recorded, so a server that was killed is continued.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import structlog

from interlock.core.errors import InterlockError, StoreClosed
from interlock.core.networks import NetworkKind
from interlock.core.operations import Operation
from interlock.core.records import ENDS, Admitted, Event, Instance
from interlock.core.restarts import SERVER_REQUESTER
from interlock.core.roles import Role
from interlock.core.specs import Interface, with_groups
from interlock.ports import InstanceFilter, Store, every_instance
from interlock.service.auth import Caller
from interlock.service.instances import Instances
from interlock.service.pass_loop import PassLoop
from interlock.service.request_models import NewRequest
from interlock.service.security_groups import SecurityGroups

_LOG = structlog.get_logger(__name__)
_TRIGGERS: Final = frozenset({"instance.state", *(f"request.{end.value}" for end in ENDS)})
_RETRY_MS_MAX: Final = 3_600_000


class GroupUpdates:
    """Submits `set_interface` for the interfaces whose rules are not those of their security groups.

    Args:
        store: reads instances.
        groups: the security groups.
        instances: submits the requests.
        retry_ms: how long to wait before an interface is submitted again; doubled each time.
    """

    def __init__(self, store: Store, groups: SecurityGroups, instances: Instances, retry_ms: int) -> None:
        self._store = store
        self._groups = groups
        self._instances = instances
        self._retry_ms = retry_ms
        self._attempts: dict[tuple[str, str], tuple[int, int]] = {}
        """By instance and interface: how often it was submitted, and when it may be again."""
        self._watched: set[str] = set()
        self._passes = PassLoop(
            "rules of security groups",
            self._pass,
            retry_ms,
            failed="failed to apply the rules of security groups",
            broke="applying the rules of security groups broke",
        )
        self._unlisten: Callable[[], None] | None = None

    async def open(self) -> None:
        """Start the task, which first looks for what a former server left."""
        self._unlisten = self._store.listen(self._on_events)
        self._groups.listen(self._on_change)
        self._passes.open()

    async def close(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
        await self._passes.close()

    def _on_change(self) -> None:
        self._attempts.clear()
        self._passes.wake()

    def _on_events(self, events: Sequence[Event]) -> None:
        """Look again when an instance that is to be changed may have become ready for it. A listener of the store."""
        if any(event.instance_id in self._watched and event.kind in _TRIGGERS for event in events):
            self._passes.wake()

    async def _pass(self) -> bool:
        """Submit what is due; return whether any interface still has other rules than its groups."""
        found = [one async for one in self._outdated()]
        self._watched = {instance.id for instance, _ in found}
        keys = {(instance.id, interface.id) for instance, interface in found}
        self._attempts = {key: value for key, value in self._attempts.items() if key in keys}
        for instance, interface in found:
            await self._submit_if_due(instance, interface)
        return bool(found)

    async def _outdated(self) -> AsyncIterator[tuple[Instance, Interface]]:
        for project in self._groups.projects_with_users():
            rules = self._groups.rules(project)
            async for instance in every_instance(self._store, InstanceFilter(project=project)):
                for one in () if instance.spec is None else instance.spec.all_interfaces:
                    filtered = one.network is not None and one.network.kind is not NetworkKind.USER
                    if filtered and one.security_groups and with_groups(one, rules) != one:
                        yield instance, one

    async def _submit_if_due(self, instance: Instance, interface: Interface) -> None:
        now_ms, key = self._store.now_ms(), (instance.id, interface.id)
        times, again_at_ms = self._attempts.get(key, (0, 0))
        waiting = (*instance.outstanding, *instance.held)
        asked = any(
            one.operation is Operation.SET_INTERFACE and one.parameters.get("interface") == interface.id
            for one in waiting
        )
        if asked or again_at_ms > now_ms:
            return
        caller = Caller(token_id=SERVER_REQUESTER, name=SERVER_REQUESTER, role=Role.ADMIN, project=instance.project)
        wanted = {"interface": interface.id, "security_groups": ",".join(interface.security_groups)}
        request = NewRequest(operation=Operation.SET_INTERFACE, parameters=wanted)
        try:
            # What would be denied is not submitted: each denial would be recorded.
            planned = await self._instances.judge(caller, instance.id, request)
            if not isinstance(planned.disposition, Admitted):
                return
            await self._instances.submit(caller, instance.id, request)
        except StoreClosed:
            raise
        except InterlockError as error:
            _LOG.warning("rules of security groups not applied", instance=instance.id, why=error.message)
        self._attempts[key] = (times + 1, now_ms + min(_RETRY_MS_MAX, self._retry_ms << min(times, 20)))
