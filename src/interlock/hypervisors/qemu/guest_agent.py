"""The guest agent: shutdown, passwords, addresses, and file systems frozen while a copy begins.

The protocol is that of the QEMU guest agent (docs/interop/qemu-ga-ref of QEMU): a line of JSON each way, over a serial
port of the guest. The agent is not trusted: lines, answers and waits have limits, and one that sends anything else
counts as absent. Each conversation has a connection of its own, one at a time, and begins by skipping stale answers.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import itertools
import os
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final, TypeVar

import msgspec

from interlock.core.errors import HypervisorError, OperationRejected
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.command_line import AGENT
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.ports import GuestInterface, Permit

_LINE_BYTES_MAX: Final = 65_536
_LINES_MAX: Final = 64
"""The maximum number of lines before an answer."""
_ERROR_LENGTH_MAX: Final = 200
"""The maximum length of an agent's error in messages, in characters."""
_INTERFACES_MAX: Final = 64
_ADDRESSES_MAX: Final = 16
"""The maximum numbers of interfaces, and of addresses of each, that are taken from an agent's answer."""
_MAC: Final = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", re.IGNORECASE)
_RESET: Final = b"\xff\n"
_NUMBERS: Final = itertools.count(os.getpid() << 20)
"""Distinguishes each conversation from all earlier ones, including those of earlier processes."""


_EntryT = TypeVar("_EntryT")


class AgentAbsent(Exception):
    """No agent responds, or it sends invalid answers."""


class AgentError(Exception):
    """The agent returned an error."""


class _Error(msgspec.Struct):
    desc: str = ""


class _Reply(msgspec.Struct):
    returned: Any = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Error | None = None


class _Address(msgspec.Struct):
    text: str = msgspec.field(name="ip-address")


class _Interface(msgspec.Struct):
    mac: str = msgspec.field(name="hardware-address", default="")
    addresses: list[Any] = msgspec.field(name="ip-addresses", default_factory=list)


class Conversation:
    """A connection to the agent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.json.Decoder(_Reply)

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command. Never waits: commands are short, and are buffered if necessary."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        self._writer.write(msgspec.json.encode(message) + b"\n")

    def reset(self) -> None:
        """Have the agent discard an incomplete command of an earlier conversation."""
        self._writer.write(_RESET)

    async def ask(self, command: str, timeout_ms: int, **arguments: Any) -> Any:
        """Return the answer to a command. Raises `AgentAbsent`, `AgentError`."""
        self.send(command, **arguments)
        return await self._in_time(self.receive(), timeout_ms)

    async def synchronise(self, timeout_ms: int, *then: str) -> Any:
        """Skip stale answers; return the answer to the last of the commands `then`, if any.

        They are sent without waiting: an agent that is busy executes them later.
        """
        number = next(_NUMBERS)
        self.send("guest-sync-delimited", id=number)
        for command in then:
            self.send(command)
        return await self._in_time(self._receive_after(number, len(then)), timeout_ms)

    async def _receive_after(self, number: int, more: int) -> Any:
        for _ in range(_LINES_MAX):
            # A stale answer may be an error.
            with contextlib.suppress(AgentError):
                if await self.receive() == number:
                    break
        else:
            raise AgentAbsent
        answer = None
        for _ in range(more):
            answer = await self.receive()
        return answer

    async def receive(self) -> Any:
        """Return the next answer; skip other lines. Raises `AgentError`, `AgentAbsent`."""
        for _ in range(_LINES_MAX):
            line = await self._line()
            try:
                reply = self._decoder.decode(line.rpartition(b"\xff")[2])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            if reply.error is not None:
                raise AgentError(_printable(reply.error.desc))
            if reply.returned is not msgspec.UNSET:
                return reply.returned
        raise AgentAbsent

    async def _line(self) -> bytes:
        """Return the next line. Raises `AgentAbsent` if it is too long or the connection ends."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):  # ValueError: the line is longer than the reader's limit
            raise AgentAbsent from None
        if not line.endswith(b"\n"):
            raise AgentAbsent
        return line

    async def _in_time(self, answer: Coroutine[Any, Any, Any], timeout_ms: int) -> Any:
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await answer
        except TimeoutError:
            raise AgentAbsent from None

    async def close(self) -> None:
        """Close the connection. What an agent that reads nothing left in the buffer is dropped."""
        transport = self._writer.transport
        (transport.close if transport.get_write_buffer_size() == 0 else transport.abort)()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _printable(error: str) -> str:
    return (
        "".join(letter if letter.isprintable() else " " for letter in error[:_ERROR_LENGTH_MAX]).strip()
        or "it gave no reason"
    )


@contextlib.asynccontextmanager
async def _conversation(guest: Guest) -> AsyncIterator[Conversation]:
    """Connect to the agent. Raises `AgentAbsent` if it does not respond within the timeout, or the guest is paused."""
    timeout_s = guest.settings.agent_timeout_ms / 1000
    try:
        async with asyncio.timeout(timeout_s):
            await guest.agent_lock.acquire()
    except TimeoutError:
        raise AgentAbsent from None
    try:
        conversation = await _connect(guest)
        try:
            conversation.reset()
            await conversation.synchronise(guest.settings.agent_timeout_ms)
            yield conversation
        finally:
            await conversation.close()
    finally:
        guest.agent_lock.release()


async def _connect(guest: Guest) -> Conversation:
    """Connect to the agent's port, if something in the guest has it open."""
    try:
        if await guest.query_power_state() is not PowerState.RUNNING:
            raise AgentAbsent
        ports = await guest.query("query-chardev")
    except HypervisorError:
        raise AgentAbsent from None
    if not any(port["label"] == AGENT and port["frontend-open"] for port in ports):
        raise AgentAbsent
    try:
        connection = guest.folder.connect(AGENT)
        return Conversation(*await asyncio.open_unix_connection(sock=connection, limit=_LINE_BYTES_MAX))
    except OSError:
        raise AgentAbsent from None


class GuestAgents:
    """The agents of a host's guests. See `ports.Hypervisor` for the methods."""

    def __init__(self, registry: ProcessRegistry) -> None:
        self._registry = registry

    async def agent_answers(self, instance_id: str) -> bool:
        guest = self._registry.find(instance_id)
        return guest is not None and await answers(guest)

    async def agent_interfaces(self, instance_id: str) -> tuple[GuestInterface, ...]:
        return await interfaces(self._registry.require(instance_id))

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        await ask_shutdown(self._registry.require(instance_id), permit)

    async def set_password(self, permit: Permit, instance_id: str, user: str, password: str) -> None:
        await set_password(self._registry.require(instance_id), permit, user, password)


async def answers(guest: Guest) -> bool:
    """Whether the agent responds; at once if nothing in the guest has its port open, else within the timeout."""
    try:
        async with _conversation(guest):
            return True
    except AgentAbsent:
        return False


async def ask_shutdown(guest: Guest, permit: Permit) -> None:
    """See `Hypervisor.ask_shutdown`. An agent sends no answer to a shutdown, except an error."""
    try:
        async with _conversation(guest) as conversation:
            permit.check()
            conversation.send("guest-shutdown", mode="powerdown")
            await _wait_shutdown(guest, conversation)
            return
    except (AgentAbsent, AgentError):
        pass
    await guest.execute(permit, "system_powerdown")


async def _wait_shutdown(guest: Guest, conversation: Conversation) -> None:
    """Wait until the guest powers off, at most for the timeout. Raises `AgentError` if the agent returns one."""
    powered_off = asyncio.ensure_future(guest.powered_off.wait())
    reply = asyncio.ensure_future(conversation.receive())
    try:
        timeout_s = guest.settings.agent_timeout_ms / 1000
        await asyncio.wait({powered_off, reply}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if reply.done():
            reply.result()
    finally:
        for task in (powered_off, reply):
            task.cancel()
        await asyncio.wait({powered_off, reply})


async def set_password(guest: Guest, permit: Permit, user: str, password: str) -> None:
    """See `Hypervisor.set_password`."""
    await guest.require_running()
    secret = base64.b64encode(password.encode()).decode()
    try:
        async with _conversation(guest) as conversation:
            permit.check()
            await conversation.ask(
                "guest-set-user-password",
                guest.settings.agent_timeout_ms,
                username=user,
                password=secret,
                crypted=False,
            )
    except AgentAbsent:
        raise _no_agent(guest) from None
    except AgentError as error:
        raise OperationRejected(
            f"The guest agent of VM {guest.instance_id} did not set the password: {error}.",
            remedy="Check that the user exists in the guest, and the log of the agent there.",
        ) from None


def _no_agent(guest: Guest) -> OperationRejected:
    return OperationRejected(
        f"No guest agent answers in VM {guest.instance_id}.",
        remedy="Install qemu-guest-agent in the guest, and check that it runs.",
    )


async def interfaces(guest: Guest) -> tuple[GuestInterface, ...]:
    """See `Hypervisor.agent_interfaces`."""
    await guest.require_running()
    try:
        async with _conversation(guest) as conversation:
            answer = await conversation.ask("guest-network-get-interfaces", guest.settings.agent_timeout_ms)
    except AgentAbsent:
        raise _no_agent(guest) from None
    except AgentError as error:
        raise OperationRejected(
            f"The guest agent of VM {guest.instance_id} did not report its addresses: {error}.",
            remedy="Allow it the command guest-network-get-interfaces.",
        ) from None
    found = _valid(answer, _Interface, _INTERFACES_MAX)
    return tuple(
        GuestInterface(mac=one.mac.lower(), addresses=_addresses(one)) for one in found if _MAC.fullmatch(one.mac)
    )


def _addresses(interface: _Interface) -> tuple[str, ...]:
    addresses = []
    for one in _valid(interface.addresses, _Address, _ADDRESSES_MAX):
        with contextlib.suppress(ValueError):
            # What follows a `%` is any text.
            addresses.append(str(ipaddress.ip_address(one.text.partition("%")[0])))
    return tuple(addresses)


def _valid(answer: Any, kind: type[_EntryT], most: int) -> list[_EntryT]:
    """Return the entries of a list in an agent's answer that are as they should be."""
    found = []
    for one in answer[:most] if isinstance(answer, list) else ():
        with contextlib.suppress(msgspec.ValidationError):
            found.append(msgspec.convert(one, kind))
    return found


# ------------------------------------------------------------------------------------------------------- freezing


@contextlib.asynccontextmanager
async def frozen(guest: Guest, permit: Permit) -> AsyncIterator[bool]:
    """Flush and freeze the guest's file systems while the body runs; yield whether they are frozen.

    If no agent responds, or it cannot freeze them, the body runs all the same. They are thawed in any case: after an
    error, a cancellation, or a freeze that timed out; and after a crash by the next server that adopts the guest. Keep
    the body short: programs in the guest that write are blocked meanwhile.
    """
    async with contextlib.AsyncExitStack() as held:
        try:
            conversation = await held.enter_async_context(_conversation(guest))
        except AgentAbsent:
            conversation = None
        if conversation is None:
            yield False
            return
        must_thaw = False
        try:
            permit.check()
            with contextlib.suppress(OSError):
                guest.folder.note_frozen()
            must_thaw = True
            is_frozen = await _freeze(guest, conversation)
            if not is_frozen:
                must_thaw = not await _uncancelled(_thaw(guest, conversation))
            yield is_frozen
        finally:
            if must_thaw:
                await _uncancelled(_thaw(guest, conversation))


async def _freeze(guest: Guest, conversation: Conversation) -> bool:
    try:
        await conversation.ask("guest-fsfreeze-freeze", guest.settings.freeze_timeout_ms)
    except (AgentAbsent, AgentError):
        return False
    return True


async def _thaw(guest: Guest, conversation: Conversation) -> bool:
    """Thaw the guest's file systems; return whether the agent confirms it.

    The command is sent without waiting, so that an agent that is busy executes it later.
    """
    try:
        await conversation.synchronise(guest.settings.freeze_timeout_ms, "guest-fsfreeze-thaw")
    except AgentAbsent:
        return False
    except AgentError:
        pass  # nothing was frozen
    with contextlib.suppress(OSError):
        guest.folder.forget_frozen()
    return True


async def _uncancelled(thawing: Coroutine[Any, Any, bool]) -> bool:
    """Complete a step, which has a timeout, however often the worker is cancelled meanwhile."""
    task = asyncio.ensure_future(thawing)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as again:
            cancelled = again
    if cancelled is not None:
        raise cancelled
    return task.result()


async def thaw_forgotten(guest: Guest) -> None:
    """Thaw a guest that was being frozen during a crash of the server."""
    if not guest.folder.is_noted_frozen():
        return
    try:
        async with _conversation(guest) as conversation:
            await _thaw(guest, conversation)
    except AgentAbsent:
        return
