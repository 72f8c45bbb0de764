"""What is asked of a guest by the agent in it: to power off, to set a password, to hold still while a copy begins.

The protocol is the QEMU guest agent's (docs/interop/qemu-ga-ref of QEMU): a line of JSON each way, over a serial port
that the guest has beside its console. What answers is the guest's, so that nothing of it is believed: lines, answers
and waits have limits, and whoever talks nonsense counts as an agent that is not there. Each conversation has a
connection of its own, one at a time, and begins by finding out which answers are stale.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final

import msgspec

from interlock.core.errors import HypervisorError, NotThere, Refused
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.command_line import AGENT
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.ports import Permit

_LINE_BYTES_MAX: Final = 65_536
_LINES_MAX: Final = 64
"""How many lines may come before the one that answers."""
_WORDS_MAX: Final = 200
"""How much of what an agent says about an error is told to people, in characters."""
_RESET: Final = b"\xff\n"
_NUMBERS: Final = itertools.count(os.getpid() << 20)
"""Each conversation is told from all before it, also from those of an earlier process of ours."""


class Silence(Exception):
    """No agent answers, or what answers makes no sense."""


class Denial(Exception):
    """The agent said no."""


class _Error(msgspec.Struct):
    desc: str = ""


class _Reply(msgspec.Struct):
    returned: Any = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Error | None = None


class Conversation:
    """A connection to an agent that has answered once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.json.Decoder(_Reply)

    def say(self, command: str, **arguments: Any) -> None:
        """Send a command. Never waits: what is sent is short, and waits in the socket if need be."""
        wish: dict[str, Any] = {"execute": command}
        if arguments:
            wish["arguments"] = arguments
        self._writer.write(msgspec.json.encode(wish) + b"\n")

    def reset(self) -> None:
        """Make the agent forget what an earlier conversation left half-said."""
        self._writer.write(_RESET)

    async def hear_refusal(self) -> None:
        """Return when the agent says yes. Raises `Denial` when it says no, `Silence` when the connection ends."""
        await self._hear()

    async def ask(self, command: str, timeout_ms: int, **arguments: Any) -> Any:
        """The answer to a command. Raises `Silence`, `Denial`."""
        self.say(command, **arguments)
        return await self._in_time(self._hear(), timeout_ms)

    async def synchronise(self, timeout_ms: int, *then: str) -> Any:
        """Pass over whatever is stale, and the answer to the last of the commands that are sent behind that, if any.

        They are sent without waiting: an agent that is still busy finds them when it comes to it.
        """
        number = next(_NUMBERS)
        self.say("guest-sync-delimited", id=number)
        for command in then:
            self.say(command)
        return await self._in_time(self._hear_behind(number, len(then)), timeout_ms)

    async def _hear_behind(self, number: int, more: int) -> Any:
        for _ in range(_LINES_MAX):
            # What is stale may be an error too.
            with contextlib.suppress(Denial):
                if await self._hear() == number:
                    break
        else:
            raise Silence
        answer = None
        for _ in range(more):
            answer = await self._hear()
        return answer

    async def _hear(self) -> Any:
        """The next answer; lines that are none are passed over."""
        for _ in range(_LINES_MAX):
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                raise Silence
            try:
                reply = self._decoder.decode(line.rpartition(b"\xff")[2])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            if reply.error is not None:
                raise Denial(_printable(reply.error.desc))
            if reply.returned is not msgspec.UNSET:
                return reply.returned
        raise Silence

    async def _in_time(self, hearing: Coroutine[Any, Any, Any], timeout_ms: int) -> Any:
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await hearing
        except (TimeoutError, OSError, ValueError):  # the last: a line that is too long
            raise Silence from None

    def close(self) -> None:
        transport = self._writer.transport
        # What is still to be sent must not be lost, and must not be waited for either.
        (transport.close if transport.get_write_buffer_size() == 0 else transport.abort)()


def _printable(words: str) -> str:
    return (
        "".join(letter if letter.isprintable() else " " for letter in words[:_WORDS_MAX]).strip() or "it gave no reason"
    )


@contextlib.asynccontextmanager
async def _conversation(guest: Guest) -> AsyncIterator[Conversation]:
    """Talk with the guest's agent. Raises `Silence` if none answers within the time-out, or the guest stands still."""
    timeout_s = guest.settings.agent_timeout_ms / 1000
    try:
        async with asyncio.timeout(timeout_s):
            await guest.agent_turn.acquire()
    except TimeoutError:
        raise Silence from None
    try:
        conversation = await _call(guest)
        try:
            conversation.reset()
            await conversation.synchronise(guest.settings.agent_timeout_ms)
            yield conversation
        finally:
            conversation.close()
    finally:
        guest.agent_turn.release()


async def _call(guest: Guest) -> Conversation:
    """A connection to the agent's port, if something in the guest has that open."""
    try:
        if await guest.look() is not PowerState.RUNNING:
            raise Silence
        ports = await guest.ask("query-chardev")
    except HypervisorError:
        raise Silence from None
    if not any(port["label"] == AGENT and port["frontend-open"] for port in ports):
        raise Silence
    try:
        caller = guest.folder.call(AGENT)
    except OSError:
        raise Silence from None
    return Conversation(*await asyncio.open_unix_connection(sock=caller, limit=_LINE_BYTES_MAX))


async def answers(guest: Guest) -> bool:
    """Whether an agent answers. At once where nothing in the guest listens, else within the agent's time-out."""
    try:
        async with _conversation(guest):
            return True
    except Silence:
        return False


async def ask_shutdown(guest: Guest, permit: Permit) -> None:
    """See `Hypervisor.ask_shutdown`. An agent that powers off the guest gives no answer; one that will not says so."""
    try:
        async with _conversation(guest) as conversation:
            permit.check()
            conversation.say("guest-shutdown", mode="powerdown")
            await _refusal_or_rest(guest, conversation)
            return
    except (Silence, Denial):
        pass
    await guest.tell(permit, "system_powerdown")


async def _refusal_or_rest(guest: Guest, conversation: Conversation) -> None:
    """Wait for a moment for the agent to refuse, or the guest to power off. Raises `Denial`."""
    rest = asyncio.ensure_future(guest.rests.wait())
    reply = asyncio.ensure_future(conversation.hear_refusal())
    try:
        timeout_s = guest.settings.agent_timeout_ms / 1000
        await asyncio.wait({rest, reply}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if reply.done():
            reply.result()
    finally:
        for task in (rest, reply):
            task.cancel()
        await asyncio.wait({rest, reply})


async def set_password(guest: Guest, permit: Permit, user: str, password: str) -> None:
    """See `Hypervisor.set_password`."""
    if await guest.look() in ENDED_STATES:
        raise NotThere(f"No guest of instance {guest.instance_id} runs.")
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
    except Silence:
        raise Refused(
            f"No guest agent answers in the guest of instance {guest.instance_id}.",
            remedy="Install qemu-guest-agent in the guest and see that it runs.",
        ) from None
    except Denial as denial:
        raise Refused(
            f"The guest agent of instance {guest.instance_id} did not set the password: {denial}.",
            remedy="See that the user exists in the guest, and what the agent's log there says.",
        ) from None


# ------------------------------------------------------------------------------------------------------- holding still


@contextlib.asynccontextmanager
async def frozen(guest: Guest, permit: Permit) -> AsyncIterator[bool]:
    """Have the guest's file systems flushed and held still while the body runs; whether they are.

    Where no agent answers, or it cannot, the body runs all the same. Afterwards the guest is let go on in any case:
    after an error, a cancellation, a freeze that took too long; and if we are killed, by the next of us that finds it.
    Keep the body short: programs in the guest that write stand still meanwhile.
    """
    async with contextlib.AsyncExitStack() as held:
        try:
            conversation = await held.enter_async_context(_conversation(guest))
        except Silence:
            conversation = None
        if conversation is None:
            yield False
            return
        owed = False
        try:
            permit.check()
            with contextlib.suppress(OSError):
                guest.folder.note_frozen()
            owed = True
            still = await _freeze(guest, conversation)
            if not still:
                owed = not await _see_through(_thaw(guest, conversation))
            yield still
        finally:
            if owed:
                await _see_through(_thaw(guest, conversation))


async def _freeze(guest: Guest, conversation: Conversation) -> bool:
    try:
        await conversation.ask("guest-fsfreeze-freeze", guest.settings.freeze_timeout_ms)
    except (Silence, Denial):
        return False
    return True


async def _thaw(guest: Guest, conversation: Conversation) -> bool:
    """Let the guest's file systems go on; whether the agent says that they do.

    It is sent without waiting for anything, so that an agent that is still busy finds it in its turn.
    """
    try:
        await conversation.synchronise(guest.settings.freeze_timeout_ms, "guest-fsfreeze-thaw")
    except Silence:
        return False
    except Denial:
        pass  # nothing was frozen
    with contextlib.suppress(OSError):
        guest.folder.forget_frozen()
    return True


async def _see_through(thawing: Coroutine[Any, Any, bool]) -> bool:
    """Do it to its end, however often we are cancelled meanwhile; it has a time-out of its own."""
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
    """Let a guest go on that was being frozen when we were killed."""
    try:
        async with _conversation(guest) as conversation:
            await _thaw(guest, conversation)
    except Silence:
        return
