"""What the processes of user networks may reach: kept for each process of this host, and repaired."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Final

import structlog

from interlock.core.errors import OperationRejected
from interlock.networks.host_watch import HostWatch
from interlock.networks.user_filter import UserFilter

_LOG: Final = structlog.get_logger(__name__)
Key = tuple[str, str]
"""The ids of an instance and of its interface."""


class UserRules:
    """The rules of the processes of user networks, by the user that each runs as.

    Args:
        rules: None: this host gives processes no users of their own, so that nothing can be refused.
        resolvers: returns the addresses of the host's DNS servers.
    """

    def __init__(self, rules: UserFilter | None, resolvers: Callable[[], Collection[str]]) -> None:
        self._filter = rules
        self._resolvers = resolvers
        self._users: dict[Key, tuple[int, bool]] = {}
        """The user of each process, and whether it may connect to the outside."""
        self._watch = HostWatch(self._check)
        self._lock = asyncio.Lock()
        self._failure = ""

    async def open(self, running: dict[Key, tuple[int, bool]]) -> None:
        """Make the rules of the processes that run, and remove what is left of others."""
        self._users = dict(running)
        await self._settle(anew=bool(running))
        if self._filter is not None:
            self._watch.open()

    async def allow(self, key: Key, user_id: int | None, *, outbound: bool) -> None:
        """Make the rules of a process before it is started.

        Raises:
            OperationRejected: it must not connect to the outside, and this host cannot keep it from that.
        """
        if user_id is not None:
            self._users[key] = user_id, outbound
        if await self._settle() or outbound:
            return
        self._users.pop(key, None)
        raise OperationRejected(
            f"This host cannot keep a VM on a user network from connecting to the outside: {self._failure}",
            remedy="Run the server as root with nftables installed, or use a network with outbound access.",
        )

    async def forget(self, instance_id: str, interface_id: str | None = None) -> None:
        """Drop the rules of a process that has ended, or of all of an instance."""
        ended = [key for key in self._users if key[0] == instance_id and interface_id in {None, key[1]}]
        for key in ended:
            del self._users[key]
        if ended:
            await self._settle()

    async def close(self) -> None:
        """Stop watching; the rules stay."""
        await self._watch.close()

    async def _settle(self, *, anew: bool = False) -> bool:
        """Bring the rules to what the processes need. Return whether they are in force; if not, it is logged once."""
        if self._filter is None:
            self._failure = "VMs have no users of their own."
            return False
        async with self._lock:
            try:
                await self._filter.settle(dict(self._users.values()), self._resolvers(), anew=anew)
            except OperationRejected as error:
                if error.message != self._failure:
                    _LOG.error("user networks are not filtered", why=error.message, remedy=error.remedy)
                self._failure = error.message
                return False
        self._failure = ""
        return True

    async def _check(self, *, rules: bool) -> None:
        async with self._lock:
            is_changed = rules and self._filter is not None and await self._filter.is_changed()
        if is_changed:
            _LOG.warning("rules of user networks changed by others")
            await self._settle(anew=True)
