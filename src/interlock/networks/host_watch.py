"""Notices that somebody may have changed the links, rules or DHCP servers of a host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

_LOG = structlog.get_logger(__name__)
_ROUTE: Final = 0
_NETFILTER: Final = 12
_LINK_GROUPS: Final = 0x1 | 0x10 | 0x100
"""Links, and the addresses of IPv4 and IPv6."""
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_NFTABLES: Final = 7
_MESSAGE_BYTES: Final = 65_536
_QUIET_S: Final = 0.5
"""For how long further changes are awaited, so that many cause one check."""
_INTERVAL_S: Final = 60.0
"""The kernel may drop messages."""


class HostWatch:
    """Calls `check` soon after the kernel announced a change, or a process that is followed ended.

    Args:
        check: looks at what is there, and repairs it.
    """

    def __init__(self, check: Callable[[], Awaitable[None]]) -> None:
        self._check = check
        self._noticed = asyncio.Event()
        self._sockets: list[socket.socket] = []
        self._processes: dict[int, int] = {}
        """The descriptors of processes that are followed, by id."""
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to watch. Idempotent."""
        if self._task is not None:
            return
        loop = asyncio.get_running_loop()
        for protocol in (_ROUTE, _NETFILTER):
            listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
            self._sockets.append(listening)
            # Without the privilege, there is nothing of ours either.
            with contextlib.suppress(OSError):
                listening.bind((0, _LINK_GROUPS if protocol == _ROUTE else 0))
                if protocol == _NETFILTER:
                    listening.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFTABLES)
            loop.add_reader(listening.fileno(), self._on_message, listening)
        self._task = loop.create_task(self._run())

    def follow(self, process: int) -> None:
        """Notice the end of a process. Idempotent."""
        if process in self._processes:
            return
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            self._noticed.set()
            return
        self._processes[process] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._on_end, process)

    def _on_message(self, listening: socket.socket) -> None:
        self._noticed.set()
        with contextlib.suppress(OSError):  # none is left, or some were dropped
            while listening.recv(_MESSAGE_BYTES):
                pass

    def _on_end(self, process: int) -> None:
        self._noticed.set()
        self._forget(process)

    def _forget(self, process: int) -> None:
        descriptor = self._processes.pop(process)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL_S):
                    await self._noticed.wait()
            await asyncio.sleep(_QUIET_S)
            self._noticed.clear()
            try:
                await self._check()
            except Exception:  # noqa: BLE001 - the next change is checked, too
                _LOG.exception("networks not checked")

    async def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        for process in list(self._processes):
            self._forget(process)
        for listening in self._sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
            listening.close()
        self._sockets.clear()
