"""The command monitor of one QEMU: commands with time-outs, over the QEMU project's own QMP library.

QEMU answers the commands of one monitor in order. A command that was written to a QEMU that does not answer may be
carried out much later, when it thaws. So each monitor knows whether it has unanswered commands, and nothing that has
an effect is written before a question behind them was answered: whoever sends it acts on a machine that has come to
rest. Which commands are sent, and what the answers mean, is not here.
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

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.ports import Permit


class Monitor:
    """A connection that is made when it is first needed, and again after it broke."""

    def __init__(self, name: str, call: Callable[[], socket.socket], timeout_ms: int) -> None:
        """Args:
        name: the instance, for messages.
        call: gives a connected socket, or raises OSError when nobody listens.
        timeout_ms: how long one answer may take.
        """
        self._name = name
        self._call = call
        self._timeout_ms = timeout_ms
        self._client: QMPClient | None = None
        self._handover: socket.socket | None = None
        self._connecting: asyncio.Task[QMPClient] | None = None
        self._unanswered: set[asyncio.Task[Any]] = set()
        self._question: asyncio.Task[Any] | None = None
        self._in_turn = asyncio.Lock()

    async def connect(self, timeout_ms: int | None = None) -> None:
        """Be connected. Raises `NotResponding` if QEMU does not greet in time, `NotThere` if nobody listens."""
        if self._client is not None and self._client.runstate is Runstate.RUNNING:
            return
        if self._connecting is None or self._connecting.done():
            # A greeting that is late stays awaited: calling again would only queue up behind ourselves.
            self._connecting = asyncio.create_task(self._connect())
        connecting = self._connecting
        await asyncio.wait({connecting}, timeout=(timeout_ms or self._timeout_ms) / 1000)
        if not connecting.done():
            raise self._silent()
        if connecting.cancelled():
            raise NotThere(f"What holds instance {self._name} was let go of.")
        failure = connecting.exception()
        if isinstance(failure, BlockingIOError):
            raise self._silent()  # so many wait to be greeted already that there is no room to queue up
        if failure is not None:
            raise NotThere(f"Nothing answers for instance {self._name}: {failure}") from failure
        self._client = connecting.result()

    async def _connect(self) -> QMPClient:
        await self._drop()
        client = QMPClient()
        # It calls it an error when a process ends under it; whoever waits for an answer is told, with its instance.
        client.logger.setLevel(logging.CRITICAL)
        # The journal is where events are read; the client would keep all of them for ever.
        client.events.event_filter = _no_event
        caller = self._call()
        # An event loop may wrap the socket so that descriptors can no longer be sent through it.
        self._handover = caller.dup()
        try:
            await client.connect(caller)
        except BaseException:
            caller.close()
            raise
        return client

    async def ask(self, question: str = "query-status", arguments: dict[str, Any] | None = None) -> Any:
        """The answer to a question without an effect.

        At most one question of a kind waits for an answer, however often a frozen QEMU is asked.

        Raises:
            NotResponding: no answer in time.
            NotThere: the connection broke.
        """
        await self.connect()
        if question == "query-status":
            if self._question is None or self._question.done():
                self._question = self._send(question, {})
            return await self._answer(self._question)
        await self.settle()
        return await self._answer(self._send(question, arguments or {}))

    async def settle(self) -> None:
        """Return when everything sent before has been answered. Raises `NotResponding`."""
        await self.connect()
        if self._unanswered:
            await self.ask()

    async def tell(self, permit: Permit, command: str, arguments: dict[str, Any], *, attach: int | None = None) -> Any:
        """Have a command with an effect carried out; the permit is checked as it is written.

        Args:
            permit: of the worker that wants it.
            command: its name.
            arguments: its arguments.
            attach: a descriptor to hand over with it.

        Raises:
            Fenced: the permit is lost; the command was not written.
            Refused: QEMU said no.
            NotResponding, NotThere: as `ask`; the command may have been carried out, or may yet be.
        """
        async with self._in_turn:
            await self.settle()
            permit.check()
            if attach is not None:
                self._hand_over(attach)
            task = self._send(command, arguments)
        return await self._answer(task)

    def _hand_over(self, descriptor: int) -> None:
        try:
            if self._handover is not None:
                socket.send_fds(self._handover, [b" "], [descriptor])
        except OSError as broken:
            raise NotThere(f"What holds instance {self._name} has gone: {broken}") from broken

    def _send(self, command: str, arguments: dict[str, Any]) -> asyncio.Task[Any]:
        if self._client is None:
            raise NotThere(f"Nothing answers for instance {self._name}.")
        task = asyncio.ensure_future(self._client.execute(command, arguments or None))
        self._unanswered.add(task)
        task.add_done_callback(self._unanswered.discard)
        task.add_done_callback(_look_at)
        return task

    async def _answer(self, task: asyncio.Task[Any]) -> Any:
        """Wait for one answer. Neither a time-out nor a cancelled worker makes us forget that it is outstanding."""
        await asyncio.wait({task}, timeout=self._timeout_ms / 1000)
        if not task.done():
            raise self._silent()
        if task.cancelled():
            raise NotThere(f"What holds instance {self._name} was let go of.")
        try:
            return task.result()
        except ExecuteError as refusal:
            raise Refused(f"QEMU refused for instance {self._name}: {refusal}") from refusal
        except (QMPError, OSError, EOFError) as broken:
            raise NotThere(f"What holds instance {self._name} has gone: {broken}") from broken

    def _silent(self) -> NotResponding:
        return NotResponding(
            f"QEMU gave no answer for instance {self._name} within {self._timeout_ms} ms.",
            remedy="If it does not recover, stop the instance hard: that ends its process.",
        )

    async def close(self) -> None:
        """Let go of the connection. What was sent and not answered stays sent."""
        connecting = self._connecting
        if connecting is not None and not connecting.done():
            if self._handover is not None:
                # The library takes a connection that ends better than a cancelled one.
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
            # It tells why the connection broke, which whoever waited for an answer has been told already.
            with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
                async with asyncio.timeout(self._timeout_ms / 1000):
                    await client.disconnect()


def _no_event(_event: object) -> bool:
    return False


def _look_at(task: asyncio.Task[Any]) -> None:
    """Nobody may be left to hear of it: the worker that sent it may have been cancelled."""
    if not task.cancelled():
        task.exception()
