"""The command monitor of one QEMU process: QMP commands with timeouts, over the QEMU project's QMP library.

QEMU answers the commands of one monitor in order. A command that was sent to a stopped QEMU may be executed much later,
when it continues. So a monitor tracks unanswered commands, and sends no command with an effect before a query behind
them was answered: then no earlier command can take effect any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any

from qemu.qmp import QMPClient, QMPError
from qemu.qmp.protocol import Runstate
from qemu.qmp.qmp_client import ExecuteError

from interlock.core.errors import GuestNotFound, NotResponding, OperationRejected
from interlock.ports import Permit


class Monitor:
    """A QMP connection, opened on first use, and again after it broke."""

    def __init__(
        self, name: str, connect: Callable[[], socket.socket], timeout_ms: int, on_late: Callable[[], None]
    ) -> None:
        """Args:
        name: the instance id, for messages.
        connect: returns a connected socket, or raises OSError if nobody listens.
        timeout_ms: timeout of one answer.
        on_late: called when a command with an effect completes after its timeout or cancellation.
        """
        self._name = name
        self._open_socket = connect
        self._timeout_ms = timeout_ms
        self._on_late = on_late
        self._client: QMPClient | None = None
        self._handover: socket.socket | None = None
        self._connecting: asyncio.Task[QMPClient] | None = None
        self._unanswered: set[asyncio.Task[Any]] = set()
        self._status_query: asyncio.Task[Any] | None = None
        self._send_lock = asyncio.Lock()

    async def connect(self, timeout_ms: int | None = None) -> None:
        """Connect. Raises `NotResponding` if QEMU sends no greeting in time, `GuestNotFound` if nobody listens."""
        if self._client is not None and self._client.runstate is Runstate.RUNNING:
            return
        if self._connecting is None or self._connecting.done():
            # A late greeting is still waited for: a second connection would queue behind the first.
            self._connecting = asyncio.create_task(self._connect())
        connecting = self._connecting
        await asyncio.wait({connecting}, timeout=(timeout_ms or self._timeout_ms) / 1000)
        if not connecting.done():
            raise self._timed_out()
        if connecting.cancelled():
            raise GuestNotFound(f"The QMP connection of VM {self._name} was closed.")
        failure = connecting.exception()
        if isinstance(failure, BlockingIOError):
            raise self._timed_out()  # the backlog of the socket is full
        if failure is not None:
            raise GuestNotFound(f"QEMU of VM {self._name} cannot be reached: {failure}") from failure
        self._client = connecting.result()

    async def _connect(self) -> QMPClient:
        await self._drop()
        client = QMPClient()
        # It logs an error when a process ends; whoever waits for an answer gets that error, with its instance.
        client.logger.setLevel(logging.CRITICAL)
        # Events are read from the event log; the client would keep all of them for ever.
        client.events.event_filter = _no_event
        connection = self._open_socket()
        # An event loop may wrap the socket, and then it cannot send descriptors.
        self._handover = connection.dup()
        try:
            await client.connect(connection)
        except BaseException:
            connection.close()
            raise
        return client

    async def query(self, command: str = "query-status", arguments: dict[str, Any] | None = None) -> Any:
        """Return the answer to a command without an effect.

        Of `query-status`, at most one is outstanding, however often a stopped QEMU is queried.

        Raises:
            NotResponding: it timed out.
            GuestNotFound: the connection broke.
        """
        await self.connect()
        if command == "query-status":
            if self._status_query is None or self._status_query.done():
                self._status_query = self._send(command, {})
            return await self._answer(self._status_query)
        await self.settle()
        return await self._answer(self._send(command, arguments or {}))

    async def settle(self) -> None:
        """Wait until every command sent before has been answered. Raises `NotResponding`."""
        await self.connect()
        if self._unanswered:
            await self.query()

    async def execute(
        self, permit: Permit, command: str, arguments: dict[str, Any], *, attach: int | None = None
    ) -> Any:
        """Execute a command with an effect; the permit is checked immediately before it is sent.

        Args:
            permit: of the worker.
            command: its name.
            arguments: its arguments.
            attach: a descriptor to send with it.

        Raises:
            Fenced: the permit is lost; the command was not sent.
            OperationRejected: QEMU returned an error.
            NotResponding, GuestNotFound: as `query`; the command may have been executed, or may yet be.
        """
        async with self._send_lock:
            await self.settle()
            permit.check()
            if attach is not None:
                self._hand_over(attach)
            task = self._send(command, arguments)
        try:
            return await self._answer(task)
        finally:
            if not task.done():
                task.add_done_callback(self._note_late)

    def _note_late(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._on_late()

    def _hand_over(self, descriptor: int) -> None:
        try:
            if self._handover is not None:
                socket.send_fds(self._handover, [b" "], [descriptor])
        except OSError as broken:
            raise GuestNotFound(f"The QEMU process of VM {self._name} has ended: {broken}") from broken

    def _send(self, command: str, arguments: dict[str, Any]) -> asyncio.Task[Any]:
        if self._client is None:
            raise GuestNotFound(f"QEMU of VM {self._name} cannot be reached.")
        task = asyncio.ensure_future(self._client.execute(command, arguments or None))
        self._unanswered.add(task)
        task.add_done_callback(self._unanswered.discard)
        task.add_done_callback(retrieve_exception)
        return task

    async def _answer(self, task: asyncio.Task[Any]) -> Any:
        """Wait for one answer. After a timeout or a cancellation it is still outstanding."""
        await asyncio.wait({task}, timeout=self._timeout_ms / 1000)
        if not task.done():
            raise self._timed_out()
        if task.cancelled():
            raise GuestNotFound(f"The QMP connection of VM {self._name} was closed.")
        try:
            return task.result()
        except ExecuteError as refusal:
            raise OperationRejected(f"QEMU returned an error for VM {self._name}: {refusal}") from refusal
        except (QMPError, OSError, EOFError) as broken:
            raise GuestNotFound(f"The QEMU process of VM {self._name} has ended: {broken}") from broken

    def _timed_out(self) -> NotResponding:
        return NotResponding(
            f"QEMU of VM {self._name} did not respond within {self._timeout_ms} ms.",
            remedy="If it does not recover, stop the VM hard: that ends its process.",
        )

    async def close(self) -> None:
        """Close the connection. Commands that were sent and not answered stay sent."""
        connecting = self._connecting
        if connecting is not None and not connecting.done():
            if self._handover is not None:
                # The library handles the end of a connection better than a cancellation.
                with contextlib.suppress(OSError):
                    self._handover.shutdown(socket.SHUT_RDWR)
                await asyncio.wait({connecting}, timeout=self._timeout_ms / 1000)
            connecting.cancel()
            await asyncio.wait({connecting})
        if connecting is not None and not connecting.cancelled() and connecting.exception() is None:
            self._client = connecting.result()
        await self._drop()

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if self._handover is not None:
            self._handover.close()
            self._handover = None
        waiting = tuple(self._unanswered)
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
        if client is not None and client.runstate is not Runstate.IDLE:
            # It raises why the connection broke, which whoever waited for an answer knows already.
            with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
                async with asyncio.timeout(self._timeout_ms / 1000):
                    await client.disconnect()


def _no_event(_event: object) -> bool:
    return False


def retrieve_exception(task: asyncio.Task[Any]) -> None:
    """Retrieve the exception, so that it is not logged if the worker was cancelled."""
    if not task.cancelled():
        task.exception()
