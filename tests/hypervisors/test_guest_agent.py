"""What is asked of a guest agent, against agents that answer well, badly, late, or not at all."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from conformance.hypervisor import GivenPermit
from interlock.core.errors import Fenced, GuestNotFound, OperationRejected
from interlock.core.states import PowerState
from interlock.hypervisors.qemu import guest_agent
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest, no_guest
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import GuestInterface
from waiting import PATIENCE_S

PERMIT = GivenPermit()
Say = Callable[[dict[str, Any]], bytes | None]


def line(value: Any) -> bytes:
    return msgspec.json.encode(value) + b"\n"


class FakeGuest:
    """What of a guest its agent's client needs, with an agent of the test's at the other end of the line."""

    def __init__(self, folder: Path, agent_timeout_ms: int = 300) -> None:
        self.instance_id = "one"
        self.settings = QemuSettings(folder=folder, agent_timeout_ms=agent_timeout_ms, freeze_timeout_ms=300)
        self.folder = InstanceFolder(folder)
        self.agent_lock = asyncio.Lock()
        self.powered_off = asyncio.Event()
        self.state = PowerState.RUNNING
        self.listens = True
        self.heard: list[str] = []
        self.told: list[str] = []
        self.serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any] = self.behave
        self.words: dict[str, Say] = {}
        self.frozen = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.folder.connect = self._call  # type: ignore[method-assign]

    def guest(self) -> Guest:
        return cast("Guest", self)

    async def query_power_state(self) -> PowerState:
        return self.state

    async def require_running(self) -> PowerState:
        if self.state in ENDED_STATES:
            raise no_guest(self.instance_id)
        return self.state

    async def query(self, question: str) -> Any:
        assert question == "query-chardev"
        return [{"label": "agent", "frontend-open": self.listens}]

    async def execute(self, permit: GivenPermit, command: str) -> None:
        permit.check()
        self.told.append(command)

    def _call(self, name: str) -> socket.socket:
        assert name == "agent"
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        task = asyncio.ensure_future(self._answer(theirs))
        self._tasks.add(task)
        return ours

    async def _answer(self, theirs: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=theirs)
        with contextlib.suppress(OSError):
            try:
                await self.serve(reader, writer)
            finally:
                writer.transport.abort()
                await writer.wait_closed()

    async def behave(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """An agent as it should be, but for the answers that a test puts in `words`."""
        while text := await reader.readline():
            if text == b"\xff\n":
                continue
            wish = msgspec.json.decode(text)
            name = wish["execute"]
            self.heard.append(name)
            if name == "guest-fsfreeze-freeze":
                self.frozen = True
            if name == "guest-fsfreeze-thaw":
                self.frozen = False
            if name in self.words:
                said = self.words[name](wish.get("arguments", {}))
            elif name == "guest-sync-delimited":
                said = b"\xff" + line({"return": wish["arguments"]["id"]})
            else:
                said = line({"return": {}})
            if said is not None:
                writer.write(said)
                await writer.drain()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeGuest]:
    fake = FakeGuest(tmp_path)
    yield fake
    await fake.close()


async def test_an_agent_that_echoes_the_number_answers(fake: FakeGuest) -> None:
    assert await guest_agent.answers(fake.guest())


async def test_what_is_left_of_an_earlier_conversation_is_passed_over(fake: FakeGuest) -> None:
    fake.words["guest-sync-delimited"] = lambda wish: (
        b'{"return": 1}\n{"half": \xff' + line({"error": {"desc": "old"}}) + b"\xff" + line({"return": wish["id"]})
    )
    assert await guest_agent.answers(fake.guest())


async def test_where_nothing_listens_nothing_is_sent(fake: FakeGuest) -> None:
    fake.listens = False
    assert not await guest_agent.answers(fake.guest())
    assert fake.heard == []


async def test_a_guest_that_stands_still_is_not_asked(fake: FakeGuest) -> None:
    fake.state = PowerState.PAUSED
    assert not await guest_agent.answers(fake.guest())


async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x" * 65_536)
        await writer.drain()


async def flood_with_answers(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b'{"return": {}}\n' * 1000)
        await writer.drain()


async def flood_with_nonsense(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"\n\xff\xfe{\n" * 1000)
        await writer.drain()


async def deep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'{"return": ' + b"[" * 60_000 + b"\n")
    writer.write(b'{"x": ' + b'{"x":' * 10_000 + b"\n")
    await reader.read()


async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    while await reader.read(65_536):
        pass


async def deaf(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def hang_up(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    return


@pytest.mark.parametrize("serve", [flood, flood_with_answers, flood_with_nonsense, deep, silent, deaf, hang_up])
async def test_an_agent_that_misbehaves_counts_as_none_in_time(
    fake: FakeGuest, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]
) -> None:
    fake.serve = serve
    async with asyncio.timeout(PATIENCE_S):
        assert not await guest_agent.answers(fake.guest())
        await guest_agent.ask_shutdown(fake.guest(), PERMIT)
        with pytest.raises(OperationRejected, match="No guest agent answers"):
            await guest_agent.set_password(fake.guest(), PERMIT, "root", "secret")
        async with guest_agent.frozen(fake.guest(), PERMIT) as still:
            assert not still
    assert fake.told == ["system_powerdown"]


_AFTER_THE_SYNC = {
    "a line that is too long": b"x" * 200_000 + b"\n",
    "an answer that is too long": b'{"return": "' + b"x" * 200_000 + b'"}\n',
    "no end": b"x" * 70_000,
    "half an answer": b'{"return": {"a"',
    "nesting": b'{"return": ' + b"[" * 60_000 + b"\n",
    "no UTF-8": b'{"return": "\xc3\x28\xfe"}\n' * 100,
    "huge numbers": b'{"return": 1' + b"0" * 5_000 + b"}\n" + b'{"return": 1e999999}\n',
    "another shape": b'{"error": "no"}\n{"error": {"desc": 5}}\n[]\n"return"\nnull\n17\n',
    "an event": b'{"event": "RESET", "return": null, "error": null}\n',
    "zero bytes": b"\x00" * 50_000 + b"\n",
}


@pytest.mark.parametrize("bytes_", _AFTER_THE_SYNC.values(), ids=_AFTER_THE_SYNC.keys())
async def test_whatever_an_agent_says_after_it_was_recognised_costs_only_the_agent(
    fake: FakeGuest, bytes_: bytes
) -> None:
    """A line of 200 kB after a correct sync made stop and reboot fail with an internal error."""
    for command in ("guest-shutdown", "guest-set-user-password", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"):
        fake.words[command] = lambda _: bytes_
    async with asyncio.timeout(PATIENCE_S):
        await guest_agent.ask_shutdown(fake.guest(), PERMIT)
        with contextlib.suppress(OperationRejected):  # what looks like an answer is one
            await guest_agent.set_password(fake.guest(), PERMIT, "root", "secret")
        async with guest_agent.frozen(fake.guest(), PERMIT):
            pass
        fake.folder.note_frozen()
        await guest_agent.thaw_forgotten(fake.guest())


async def test_an_agent_that_hangs_up_as_it_is_called_counts_as_none(fake: FakeGuest) -> None:
    def refuse(name: str) -> socket.socket:
        assert name == "agent"
        ours, theirs = socket.socketpair()
        theirs.close()
        ours.close()
        return ours

    fake.folder.connect = refuse  # type: ignore[method-assign]
    assert not await guest_agent.answers(fake.guest())


async def test_a_shutdown_that_the_agent_takes_on_presses_no_button(fake: FakeGuest) -> None:
    def power_off(wish: dict[str, Any]) -> None:
        assert wish == {"mode": "powerdown"}
        fake.powered_off.set()

    fake.words["guest-shutdown"] = power_off
    await guest_agent.ask_shutdown(fake.guest(), PERMIT)
    assert fake.told == []
    assert fake.heard[-1] == "guest-shutdown"


async def test_a_shutdown_that_the_agent_refuses_presses_the_button(fake: FakeGuest) -> None:
    fake.words["guest-shutdown"] = lambda _: line({"error": {"class": "GenericError", "desc": "disabled"}})
    await guest_agent.ask_shutdown(fake.guest(), PERMIT)
    assert fake.told == ["system_powerdown"]


async def test_who_lost_the_permit_asks_nothing_of_the_agent(fake: FakeGuest) -> None:
    permit = GivenPermit()
    permit.revoke()
    with pytest.raises(Fenced):
        await guest_agent.ask_shutdown(fake.guest(), permit)
    with pytest.raises(Fenced):
        await guest_agent.set_password(fake.guest(), permit, "root", "secret")
    with pytest.raises(Fenced):
        async with guest_agent.frozen(fake.guest(), permit):
            pass
    assert set(fake.heard) == {"guest-sync-delimited"}


async def test_a_password_is_sent_as_the_protocol_has_it(fake: FakeGuest) -> None:
    sent: dict[str, Any] = {}

    def take(wish: dict[str, Any]) -> bytes:
        sent.update(wish)
        return line({"return": {}})

    fake.words["guest-set-user-password"] = take
    await guest_agent.set_password(fake.guest(), PERMIT, "root", "grün")
    assert sent == {"username": "root", "password": base64.b64encode("grün".encode()).decode(), "crypted": False}


async def test_what_an_agent_says_about_an_error_is_told_within_limits(fake: FakeGuest) -> None:
    fake.words["guest-set-user-password"] = lambda _: line({"error": {"desc": "no\x1b[2J user" + "!" * 10_000}})
    with pytest.raises(OperationRejected) as refused:
        await guest_agent.set_password(fake.guest(), PERMIT, "root", "secret")
    assert "no [2J user!!" in refused.value.message
    assert len(refused.value.message) < 400


async def test_a_guest_that_does_not_run_has_no_password_to_set(fake: FakeGuest) -> None:
    fake.state = PowerState.SHUTDOWN
    with pytest.raises(GuestNotFound):
        await guest_agent.set_password(fake.guest(), PERMIT, "root", "secret")


async def test_file_systems_are_held_still_for_as_long_as_the_body_runs(fake: FakeGuest) -> None:
    async with guest_agent.frozen(fake.guest(), PERMIT) as still:
        assert still
        assert fake.frozen
        assert fake.folder.is_noted_frozen()
    assert not fake.frozen
    assert not fake.folder.is_noted_frozen()


async def test_an_error_in_the_body_thaws(fake: FakeGuest) -> None:
    async def body() -> None:
        async with guest_agent.frozen(fake.guest(), PERMIT):
            assert fake.frozen
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await body()
    assert not fake.frozen


async def test_a_cancelled_body_thaws_also_when_it_is_cancelled_again(fake: FakeGuest) -> None:
    inside = asyncio.Event()
    thawing = asyncio.Event()

    async def body() -> None:
        async with guest_agent.frozen(fake.guest(), PERMIT):
            inside.set()
            await asyncio.Event().wait()

    def hold_up(_: dict[str, Any]) -> bytes:
        thawing.set()
        return line({"return": 1})

    fake.words["guest-fsfreeze-thaw"] = hold_up
    task = asyncio.ensure_future(body())
    await inside.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await thawing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not fake.frozen
    assert not fake.folder.is_noted_frozen()


async def test_a_worker_that_is_cancelled_while_it_freezes_thaws(fake: FakeGuest) -> None:
    asked = asyncio.Event()

    def never_answer(_: dict[str, Any]) -> None:
        asked.set()

    async def body() -> None:
        async with guest_agent.frozen(fake.guest(), PERMIT):
            raise AssertionError

    fake.words["guest-fsfreeze-freeze"] = never_answer
    task = asyncio.ensure_future(body())
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not fake.frozen


async def test_a_freeze_that_takes_too_long_is_thawed_before_the_body(fake: FakeGuest) -> None:
    fake.words["guest-fsfreeze-freeze"] = lambda _: None
    async with guest_agent.frozen(fake.guest(), PERMIT) as still:
        assert not still
        assert not fake.frozen
        assert "guest-fsfreeze-thaw" in fake.heard


async def test_a_thaw_without_an_answer_is_remembered_and_made_up_for(fake: FakeGuest) -> None:
    fake.words["guest-fsfreeze-thaw"] = lambda _: None
    async with guest_agent.frozen(fake.guest(), PERMIT):
        pass
    assert fake.folder.is_noted_frozen()
    del fake.words["guest-fsfreeze-thaw"]
    await guest_agent.thaw_forgotten(fake.guest())
    assert not fake.folder.is_noted_frozen()


async def test_two_conversations_do_not_mix(fake: FakeGuest) -> None:
    found = await asyncio.gather(*(guest_agent.answers(fake.guest()) for _ in range(5)))
    assert found == [True] * 5


async def test_the_addresses_that_an_agent_reports_are_returned(fake: FakeGuest) -> None:
    reported = [
        {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1"}]},
        {
            "hardware-address": "52:54:00:AA:00:01",
            "ip-addresses": [{"ip-address": "10.7.0.2"}, {"ip-address": "fd00::2"}],
        },
    ]
    fake.words["guest-network-get-interfaces"] = lambda _: line({"return": reported})
    expected = GuestInterface(mac="52:54:00:aa:00:01", addresses=("10.7.0.2", "fd00::2"))
    assert await guest_agent.interfaces(fake.guest()) == (expected,)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        "10.7.0.2",
        [7, None, {"hardware-address": 7}, {"hardware-address": "52:54:00:aa:00:01\n"}],
        [{"hardware-address": "52:54:00:aa:00:01", "ip-addresses": {}}],
    ],
)
async def test_what_an_agent_reports_in_another_form_is_passed_over(fake: FakeGuest, answer: Any) -> None:
    fake.words["guest-network-get-interfaces"] = lambda _: line({"return": answer})
    assert await guest_agent.interfaces(fake.guest()) == ()


async def test_of_an_agents_report_only_addresses_are_taken_and_not_too_many(fake: FakeGuest) -> None:
    entries = [{"ip-address": text} for text in ("<b>", "10.7.0.2 ", "fe80::1%\x1b[2J", "10.7.0.3")] + [7]
    many = [{"ip-address": f"10.9.0.{number}"} for number in range(100)]
    reported = [
        {"hardware-address": "52:54:00:aa:00:01", "ip-addresses": entries},
        *({"hardware-address": "52:54:00:aa:00:02", "ip-addresses": many} for _ in range(100)),
    ]
    fake.words["guest-network-get-interfaces"] = lambda _: line({"return": reported[:9]})
    first, second, *_ = await guest_agent.interfaces(fake.guest())
    assert first.addresses == ("fe80::1", "10.7.0.3")
    assert len(second.addresses) == 16
    fake.words["guest-network-get-interfaces"] = lambda _: line({"return": [reported[0]] * 100})
    assert len(await guest_agent.interfaces(fake.guest())) == 64


async def test_an_agent_that_reports_no_addresses_is_told_of(fake: FakeGuest) -> None:
    fake.words["guest-network-get-interfaces"] = lambda _: line({"error": {"desc": "not allowed"}})
    with pytest.raises(OperationRejected, match="did not report its addresses: not allowed"):
        await guest_agent.interfaces(fake.guest())
    fake.listens = False
    with pytest.raises(OperationRejected, match="No guest agent answers"):
        await guest_agent.interfaces(fake.guest())
