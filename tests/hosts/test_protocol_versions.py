"""Servers and agents of different versions: what they agree on, and conversations recorded with an earlier version.

`recorded/protocol-4.json` has the frames of a server and an agent that both spoke version 4 only, and of the steps
below: a new agent is given the server's frames, and a new server the agent's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conformance.hypervisor import GivenPermit
from in_process.in_memory_agent import LinkEnd, linked_ends
from interlock.core.errors import Fenced, OperationRejected, Unavailable
from interlock.core.records import Disk, GuestEvent, Image, Spec
from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.agent_service import AgentService
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.methods import PROTOCOLS, RangeCalls, RemoteMethod
from interlock.hypervisors.remote.protocol import (
    OLDEST_VERSION,
    VERSION,
    Hello,
    Refusal,
    Renew,
    Welcome,
    agreed_version,
    decode,
    encode,
    error_of,
    failure_of,
    require_spoken,
)
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import Host, HostIdentity, HypervisorEvent
from interlock.ports.hosts import IssuedCertificate
from waiting import PATIENCE_S, eventually

RECORDED = Path(__file__).parent / "recorded"
IMAGE = Image(id="image", name="image", kind="disk", path="image.disk", size_bytes=3, sha256="0" * 64)
SPEC = Spec(image=IMAGE, root_gib=1)
LEASE_MS = 3000


def hello(oldest: int, newest: int | None = None) -> Hello:
    identity = HostIdentity(id="north")
    return Hello(version=oldest, newest_version=newest, name="north", log="log", identity=identity)


# -------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("oldest", "newest", "agreed"),
    [
        (4, None, 4),
        (VERSION - 1, None, VERSION - 1),
        (VERSION, VERSION, VERSION),
        (OLDEST_VERSION, VERSION, VERSION),
        (OLDEST_VERSION, VERSION + 2, VERSION),
        (VERSION, VERSION + 1, VERSION),
        (1, OLDEST_VERSION, OLDEST_VERSION),
    ],
)
def test_the_newest_version_that_both_speak_is_spoken(oldest: int, newest: int | None, agreed: int) -> None:
    assert agreed_version(hello(oldest, newest), "north") == agreed


def test_the_span_is_three_versions_back_from_the_first_that_negotiates() -> None:
    assert max(4, VERSION - 3) == OLDEST_VERSION
    assert hello(4).newest_version is None
    assert Hello(name="north", log="log").version == OLDEST_VERSION, "what a server of version 4 compares with its own"


@pytest.mark.parametrize(
    ("oldest", "newest", "said", "remedy"),
    [
        (1, None, "speaks protocol version 1, and this server versions 4 to 7", "Upgrade the agent."),
        (2, 3, "speaks protocol versions 2 to 3,", "Upgrade the agent."),
        (VERSION + 1, VERSION + 3, "speaks protocol versions 8 to 10,", "Upgrade the server."),
    ],
)
async def test_an_agent_outside_the_span_is_told_which_side_to_upgrade(
    oldest: int, newest: int | None, said: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = AgentService("north", SimulatedHypervisor(SimulatedHost()), tmp_path)
    monkeypatch.setattr(agent, "_greeting", lambda: hello(oldest, newest))
    agents, servers = linked_ends()
    serving = asyncio.create_task(adapter().serve(servers, nothing, nothing))
    with pytest.raises(Unavailable) as refused:
        await agent.run(agents, lambda *_: None, lambda _: None)
    assert said in refused.value.message
    assert refused.value.remedy == remedy
    with pytest.raises(Unavailable, match="protocol version"):
        await serving


@pytest.mark.parametrize(("version", "remedy"), [(3, "Upgrade the server."), (VERSION + 1, "Upgrade the agent.")])
def test_an_agent_refuses_a_version_that_it_does_not_speak(version: int, remedy: str) -> None:
    with pytest.raises(Unavailable) as refused:
        require_spoken(Welcome(lease_ms=0, version=version))
    assert f"The server chose protocol version {version}, and this agent speaks versions 4 to 7." in str(refused.value)
    assert refused.value.remedy == remedy


def test_a_server_without_versions_in_its_welcome_speaks_version_4() -> None:
    welcome = decode(msgspec.msgpack.encode({"type": "welcome", "lease_ms": 0}))
    assert welcome == Welcome(lease_ms=0, version=4)


def described(method: RemoteMethod) -> str:
    arguments = ", ".join(named(one) for one in method.arguments.__args__)
    return f"{method.name}({arguments}) -> {named(method.answer)}"


def named(kind: Any) -> str:
    return "None" if kind is type(None) else kind.__name__ if isinstance(kind, type) else str(kind)


def test_methods_on_the_wire_change_only_with_the_version() -> None:
    """If this fails for a new method, raise `VERSION`, put the method into `_SINCE`, and record it. If it fails for a
    method that exists, an agent of another version would misunderstand the call: add another method instead.
    """
    found = {
        str(since): sorted(
            described(one) for methods in PROTOCOLS.values() for one in methods.values() if one.since == since
        )
        for since in range(OLDEST_VERSION, VERSION + 1)
    }
    assert found == msgspec.json.decode((RECORDED / "methods.json").read_bytes())


async def test_a_method_that_the_agents_version_does_not_have_is_not_called() -> None:
    agents, servers = linked_ends()
    await agents.send(encode(hello(4)))
    one = adapter()
    serving = asyncio.create_task(one.serve(servers, nothing, nothing))
    assert decode(await agents.receive()) == Welcome(lease_ms=LEASE_MS, version=4)
    await agents.send(msgspec.msgpack.encode({"type": "caught_up"}))
    await one.until_linked()
    with pytest.raises(
        OperationRejected, match="speaks protocol version 4, and file_upload needs version 5"
    ) as refused:
        await one.call(RangeCalls.file_upload, "name", "transfer", lambda *_: None)
    assert refused.value.remedy == "Upgrade the agent."
    await end(serving)


# ------------------------------------------------------------------------------------------ recorded conversations


def adapter() -> RemoteHypervisor:
    return RemoteHypervisor("north", lease_ms=LEASE_MS, silence_ms=30_000, now_ms=lambda: 0, renewed=lambda _: None)


async def nothing(_: Host) -> None:
    return


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Permit(GivenPermit):
    fence = 7


async def steps(one: RemoteHypervisor, vanish: Callable[[], object], vanished: asyncio.Event) -> None:
    """What was done as the frames were recorded."""
    permit = Permit()
    await one.define(permit, "one", SPEC)
    await one.power_on(permit, "one", SPEC)
    seen = await one.inspect("one")
    assert (seen.defined, seen.disks) == (True, ("root",))
    await one.pause(permit, "one")
    await one.unpause(permit, "one")
    await one.attach_disk(permit, "one", Disk(id="data", path="simulated:data"))
    await one.detach_disk(permit, "one", disk_id="data")
    stream = await one.open_console("one")
    await stream.write(b"ls\n")
    await stream.close()
    await one.power_off(permit, "one")
    whole = msgspec.structs.replace(SPEC, root=1, root_is_whole=True)
    await one.root_disk_from(permit, "two", whole, Path(IMAGE.path), lambda *_: None)
    await one.drop_root_disks(permit, "one", SPEC, frozenset({0}))
    await one.power_on(permit, "one", SPEC)
    vanish()
    await vanished.wait()
    one.superseded("one", 9)
    with pytest.raises(Fenced):
        await one.pause(permit, "one")
    assert await one.known() == {"one", "two"}
    assert list(await one.image_copies()) == [one.copy_name(IMAGE.path)]
    with pytest.raises(OperationRejected):
        await one.machine_kind("none")


Frame = dict[str, Any]
_METHODS = {name: method for methods in PROTOCOLS.values() for name, method in methods.items()}


def typed(frame: Frame) -> Frame:
    """The frame, a call with its arguments as what they are decoded to: fields with their default may be omitted."""
    if frame["type"] != "call":
        return frame
    return frame | {"arguments": msgspec.convert(frame["arguments"], _METHODS[frame["method"]].arguments)}


def recorded() -> list[tuple[str, Frame]]:
    found = msgspec.json.decode((RECORDED / "protocol-4.json").read_bytes(), type=list[tuple[str, str]])
    return [(side, msgspec.msgpack.decode(bytes.fromhex(text))) for side, text in found if side != "step"]


@pytest.fixture
def image_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / IMAGE.path).write_bytes(b"abc")


@pytest.mark.usefixtures("image_file")
async def test_a_recorded_agent_of_version_4_is_called_as_it_was() -> None:
    vanished = asyncio.Event()

    def listen(event: HypervisorEvent) -> None:
        assert event.kind is GuestEvent.VANISHED
        vanished.set()

    one = adapter()
    await one.open(listen)
    agents, servers = linked_ends()
    serving = asyncio.create_task(one.serve(servers, nothing, nothing))

    async def agent() -> None:
        for side, frame in recorded():
            if side == "agent":
                await agents.send(msgspec.msgpack.encode(frame))
                continue
            sent = msgspec.msgpack.decode(await agents.receive())
            assert typed(sent) == typed(frame)

    talking = asyncio.create_task(agent())
    await one.until_linked()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(talking, steps(one, lambda: None, vanished))
    await end(serving)


@pytest.mark.usefixtures("image_file")
async def test_a_recorded_server_of_version_4_is_answered_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    host = SimulatedHost()
    agent = AgentService(
        "north", SimulatedHypervisor(host), tmp_path / "agent", reaches=lambda _: True, ranges=Unused()
    )
    await agent.open()
    agents, servers = linked_ends()
    renewals: list[int] = []
    exchanges: list[Exchange] = []

    def welcomed(exchange: Exchange, welcome: Welcome) -> None:
        assert welcome.version == 4
        exchanges.append(exchange)

    causes: dict[str, Callable[[], object]] = {
        "told": lambda: host.vanish("one"),
        "renew": lambda: exchanges[0].post(Renew(number=1, disk_free_mib=5)),
    }

    speaking = asyncio.create_task(agent.run(agents, welcomed, renewals.append))
    async with asyncio.timeout(PATIENCE_S):
        await answer_as_recorded(servers, causes)
    assert renewals == [1]
    await end(speaking)
    await agent.close()


class Unused:
    """The server's files over HTTP, which a server of version 4 does not have."""

    def download(self, transfer: str, start: int, end: int) -> contextlib.AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    async def upload(self, transfer: str, offset: int, piece: bytes) -> None:
        raise NotImplementedError


async def answer_as_recorded(servers: LinkEnd, causes: dict[str, Callable[[], object]]) -> None:
    """Send the server's frames, and have happen what caused others; the agent must send its own as it did."""
    for side, frame in recorded():
        if side == "server":
            await servers.send(msgspec.msgpack.encode(frame))
            continue
        causes.get(frame["type"], lambda: None)()
        sent = msgspec.msgpack.decode(await servers.receive())
        while sent["type"] == "moved":
            sent = msgspec.msgpack.decode(await servers.receive())
        match frame["type"]:
            case "hello":
                assert {name: sent[name] for name in ("type", "version", "name")} == {
                    "type": "hello",
                    "version": 4,
                    "name": "north",
                }
                assert frame.keys() <= sent.keys()
            case "answer":
                assert sent["number"] == frame["number"]
                assert kind_of(sent["failure"]) == kind_of(frame["failure"])
                assert comparable(sent["value"]) == comparable(frame["value"])
            case _:
                assert sent == frame


def kind_of(failure: Frame | None) -> str | None:
    return None if failure is None else str(failure["kind"])


def comparable(value: Any) -> Any:
    """An answer without what differs each time: the age of a copy, and fields that were added since."""
    if isinstance(value, dict):
        return set(value) - {"paused", "responsive"} if "defined" in value else list(value)
    return sorted(value) if isinstance(value, list) else value


async def test_an_agent_is_told_why_a_server_refuses_it(tmp_path: Path) -> None:
    """Also by one of version 4, whose refusal knows nothing of spans."""
    agent = AgentService("north", SimulatedHypervisor(SimulatedHost()), tmp_path)
    agents, servers = linked_ends()
    failure = {"kind": "Unavailable", "message": "The agent speaks another language.", "remedy": "Run the same."}
    await servers.send(msgspec.msgpack.encode({"type": "refusal", "failure": failure}))
    with pytest.raises(Unavailable, match="The agent speaks another language"):
        await agent.run(agents, lambda *_: None, lambda _: None)
    assert isinstance(decode(await servers.receive()), Hello)
    assert not isinstance(decode(msgspec.msgpack.encode({"type": "welcome", "lease_ms": 1})), Refusal)


async def test_an_agent_gets_a_certificate_with_its_welcome_and_renews_it_in_time(tmp_path: Path) -> None:
    requests: list[str] = []

    def certify(name: str, request: str) -> IssuedCertificate:
        assert name == "north"
        requests.append(request)
        return IssuedCertificate(certificate=f"certificate {len(requests)}", ca="ca", renew_s=0)

    certificate = HostCertificate(tmp_path / "tls")
    hypervisor = SimulatedHypervisor(SimulatedHost())
    agent = AgentService("north", hypervisor, tmp_path, ranges=Unused(), certificate=certificate)
    await agent.open()
    one = RemoteHypervisor(
        "north", lease_ms=LEASE_MS, silence_ms=30_000, now_ms=lambda: 0, renewed=lambda _: None, certify=certify
    )
    agents, servers = linked_ends()
    exchanges: list[Exchange] = []
    running = (
        asyncio.create_task(one.serve(servers, nothing, nothing)),
        asyncio.create_task(agent.run(agents, lambda exchange, _: exchanges.append(exchange), lambda _: None)),
    )
    await one.until_linked()
    assert one.certificate_name == "north"
    assert certificate.path is not None
    assert certificate.path.read_text().endswith("certificate 1")
    agent.renew_certificate(exchanges[0])
    agent.renew_certificate(exchanges[0])  # not before the first answer, or a minute
    await eventually(lambda: str(certificate.path and certificate.path.read_text()).endswith("certificate 2"))
    assert len(set(requests)) == 2
    await end(*running)
    await agent.close()


def test_an_error_of_another_kind_arrives_as_the_one_that_it_is_derived_from() -> None:
    class PortTaken(OperationRejected):
        pass

    arrived = error_of(failure_of(PortTaken("taken", remedy="wait")))
    assert (type(arrived), arrived.message, arrived.remedy) == (OperationRejected, "taken", "wait")
