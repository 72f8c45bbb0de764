"""Notices that somebody may have changed the links, rules or DHCP servers of a host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Final, Protocol

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
_NEW_GENERATION: Final = 10 << 8 | 15
"""The message that ends each transaction of nftables."""
_HEADER: Final = struct.Struct("=IHHII")
_SHARE: Final = 4
"""How many times as long as a check took is waited until the next."""
_QUIET_S: Final = 0.5
"""For how long further changes are awaited, so that many cause one check."""
_INTERVAL_S: Final = 60.0
"""The kernel may drop messages."""


class Check(Protocol):
    """Looks at what is there, and repairs it."""

    async def __call__(self, *, rules: bool) -> None:
        """Check links and DHCP servers, and rules if `rules` is set."""
        ...


class HostWatch:
    """Calls `check` soon after the kernel announced a change, or a process that is followed ended.

    Rules are many, and looking at them is slow: they are checked when there were more changes than ours.
    """

    def __init__(self, check: Check) -> None:
        self._check = check
        self._noticed = asyncio.Event()
        self._rules_expected = 0
        self._rules_changed = 0
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
            loop.add_reader(listening.fileno(), self._on_message, listening, protocol)
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

    def expect_rules(self) -> None:
        """Say that one change of rules is ours; call it after the change."""
        self._rules_expected += 1

    def _on_message(self, listening: socket.socket, protocol: int) -> None:
        try:
            while True:
                messages = listening.recv(_MESSAGE_BYTES)
                self._rules_changed += _generations(messages) if protocol == _NETFILTER else 0
                self._noticed.set()
        except BlockingIOError:
            return
        except OSError:  # some were dropped
            self._rules_changed += 1

    def _on_end(self, process: int) -> None:
        self._noticed.set()
        self._forget(process)

    def _forget(self, process: int) -> None:
        descriptor = self._processes.pop(process)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)

    async def _run(self) -> None:
        loop, pause_s = asyncio.get_running_loop(), _QUIET_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL_S):
                    await self._noticed.wait()
            await asyncio.sleep(pause_s)
            self._noticed.clear()
            rules, self._rules_expected = self._rules_changed != self._rules_expected, self._rules_changed
            began = loop.time()
            try:
                await self._check(rules=rules)
            except Exception:  # noqa: BLE001 - the next change is checked, too
                _LOG.exception("networks not checked")
            # Where it takes long, and changes are many, most of the time is left for the rest.
            pause_s = max(_QUIET_S, _SHARE * (loop.time() - began))

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


def _generations(messages: bytes) -> int:
    """Return how many transactions of nftables messages announce."""
    found = place = 0
    while place + _HEADER.size <= len(messages):
        length, kind, *_ = _HEADER.unpack_from(messages, place)
        found += kind == _NEW_GENERATION
        place += max(length + 3 & ~3, _HEADER.size)
    return found
