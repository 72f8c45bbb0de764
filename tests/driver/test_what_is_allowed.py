"""What is said to be allowed is what a submission is then answered."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest

from in_process.embedded import IMAGE, Embedded, admitted, refused
from in_process.in_memory_agent import Neighbour
from interlock.core.operations import Operation
from interlock.core.preconditions import RULE
from interlock.core.records import Admitted, Denied, Held, Status
from interlock.core.states import GuestTrouble
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import HostState
from interlock.service import hosts
from interlock.service.request_models import NewInstance, NewNetwork, NewRequest

O = Operation  # noqa: E741
BARE = (
    *(O.START, O.STOP, O.REBOOT, O.PAUSE, O.UNPAUSE, O.SUSPEND, O.RESUME, O.RESCUE, O.UNRESCUE, O.CONFIRM_RESIZE),
    *(O.REVERT_RESIZE, O.SHELVE, O.SHELVE_OFFLOAD, O.UNSHELVE, O.EVACUATE, O.SOFT_DELETE, O.RESTORE, O.LOCK, O.UNLOCK),
)
"""What can be asked without saying anything more."""


async def on_north(house: Embedded, name: str = "web") -> str:
    wish = NewInstance(name=name, image=IMAGE.name, host="north")
    answer = await house.server.instances.create(house.caller, wish)
    await house.ended(admitted(answer))
    return answer.instance.id


async def allowed(house: Embedded, vm: str) -> set[Operation]:
    _, answers = await house.server.instances.allowed(house.caller, vm)
    return {operation for operation, answer in answers.items() if isinstance(answer, Admitted)}


async def test_an_evacuation_is_allowed_from_when_the_host_is_fenced(house: Embedded, north: Neighbour) -> None:
    vm = await on_north(house)
    assert O.EVACUATE not in await allowed(house, vm)
    assert isinstance((await house.submit(vm, O.EVACUATE)).disposition, Denied)
    await north.disconnect()
    assert O.EVACUATE not in await allowed(house, vm)
    await house.server.other_hosts.fence(house.caller, "north")
    assert O.EVACUATE in await allowed(house, vm)
    refused = await house.submit(vm, O.UNPAUSE)
    if isinstance(refused.disposition, Denied):
        assert O.EVACUATE in refused.allowed_instead
    assert (await house.carry_out(vm, O.EVACUATE)).status == "succeeded"
    assert O.EVACUATE not in await allowed(house, vm)


@pytest.mark.parametrize("fenced", [False, True])
@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_asked_is_answered_as_was_said(
    house: Embedded, north: Neighbour, seed: int, *, fenced: bool
) -> None:
    chance = random.Random(seed)
    vm = await on_north(house)
    if fenced:
        await north.disconnect()
        await house.server.other_hosts.fence(house.caller, "north")
    for _ in range(25):
        operation = chance.choice(BARE)
        said = operation in await allowed(house, vm)
        answer = await house.submit(vm, operation)
        assert isinstance(answer.disposition, Admitted) == said, (operation, answer.disposition)
        if said and fenced:
            break  # what was admitted waits for a host that is gone
        if isinstance(answer.disposition, Admitted):
            await house.ended(answer.disposition.request)


async def test_an_evacuation_that_is_held_is_admitted_when_its_host_is_fenced(
    house: Embedded, north: Neighbour
) -> None:
    vm = await on_north(house)
    wish = NewRequest(operation=O.EVACUATE, hold="10m")
    answer = await house.server.instances.submit(house.caller, vm, wish)
    assert isinstance(answer.disposition, Held)
    await north.disconnect()
    assert len((await house.server.instances.describe(house.caller, vm)).held) == 1
    await house.server.other_hosts.fence(house.caller, "north")
    ended = await house.ended(answer.disposition.request)
    assert ended.status is Status.SUCCEEDED
    assert (await house.server.instances.describe(house.caller, vm)).host == "here"


async def test_one_that_is_held_when_the_server_starts_again_finds_its_host_fenced(
    house: Embedded, north: Neighbour
) -> None:
    vm = await on_north(house)
    wish = NewRequest(operation=O.EVACUATE, hold="10m")
    answer = await house.server.instances.submit(house.caller, vm, wish)
    assert isinstance(answer.disposition, Held)
    await north.disconnect()
    (host,) = await house.server.store.hosts.all()
    await house.server.store.hosts.put(msgspec.structs.replace(host, state=HostState.FENCED))
    await house.crash()
    await house.start()
    assert (await house.ended(answer.disposition.request)).status is Status.SUCCEEDED


async def test_a_password_is_refused_where_no_guest_agent_answers(house: Embedded) -> None:
    vm = await house.create("web")
    guest = house.host.guests[vm]
    guest.has_agent = False
    assert O.SET_PASSWORD not in await allowed(house, vm)
    for hold in (None, "10m"):
        wish = NewRequest(operation=O.SET_PASSWORD, parameters={"user": "ada"}, hold=hold)
        answer = await house.server.instances.submit(house.caller, vm, wish)
        assert refused(answer) == "no_guest_agent"
        assert answer.password is None
    guest.has_agent = True
    assert O.SET_PASSWORD in await allowed(house, vm)
    assert (await house.carry_out(vm, O.SET_PASSWORD, user="ada")).status is Status.SUCCEEDED


async def test_whether_an_agent_answers_is_left_open_where_the_guest_gives_no_answer(
    house: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked when its turn has come, and may answer by then."""
    vm = await house.create("web")
    house.host.freeze(vm)
    house.server.hypervisor._answer_timeout_s = 0.01  # type: ignore[attr-defined]
    instance = await house.server.instances.describe(house.caller, vm)
    assert await house.server.other_hosts.agent_answers(instance) is None
    house.server.hypervisor._answer_timeout_s = 3600  # type: ignore[attr-defined]
    monkeypatch.setattr(hosts, "AGENT_WAIT_S", 0.01)
    assert await house.server.other_hosts.agent_answers(instance) is None, "a decision waits only for a moment"
    monkeypatch.undo()
    house.host.thaw(vm)
    assert await house.server.other_hosts.agent_answers(instance) is True
    frozen = msgspec.structs.replace(instance, guest_trouble=GuestTrouble.NOT_RESPONDING)
    assert await house.server.other_hosts.agent_answers(frozen) is None, "known not to respond: not waited for"
    await house.carry_out(vm, O.STOP)
    instance = await house.server.instances.describe(house.caller, vm)
    assert await house.server.other_hosts.agent_answers(instance) is None


async def test_a_host_that_cannot_reach_a_volume_is_no_place_for_it(house: Embedded, north: Neighbour) -> None:
    vm, there = await house.create("web"), await on_north(house, "there")
    for name in ("local", "shared"):
        await house.make_volume(name)
    volume = await house.server.store.volumes.get("local")
    assert volume is not None
    await house.server.store.volumes.delete(volume.id)
    await house.server.store.volumes.put(msgspec.structs.replace(volume, path="/only/here"))
    assert refused(await house.submit(there, O.ATTACH_VOLUME, volume="local")) == "host_lacks_volumes"
    await house.carry_out(there, O.ATTACH_VOLUME, volume="shared")
    assert refused(await house.submit(there, O.SWAP_VOLUME, old="shared", new="local")) == "host_lacks_volumes"
    await house.carry_out(vm, O.ATTACH_VOLUME, volume="local")
    assert refused(await house.submit(vm, O.MIGRATE, host="north")) == "host_lacks_volumes"
    assert refused(await house.submit(vm, O.MIGRATE, host="any")) == "no_other_host"
    # What will have been detached by then is not in the way.
    house.host.freeze(vm)
    detach = admitted(await house.submit(vm, O.DETACH_VOLUME, volume="local"))
    migrate = admitted(await house.submit(vm, O.MIGRATE, host="any"))
    house.host.thaw(vm)
    await house.ended(detach)
    assert (await house.ended(migrate)).status is Status.SUCCEEDED
    assert north.name == "north"


async def test_what_nova_could_never_start_is_not_made_without_a_start(tmp_path: Path) -> None:
    nova = Embedded(tmp_path / "nova", SimulatedHost(), policy="nova")
    await nova.start()
    wish = NewInstance(name="web", image=IMAGE.name, start=False)
    answer = await nova.server.instances.create(nova.caller, wish)
    assert refused(answer) == "never_started"
    assert await nova.server.store.instance_named("default", "web") is None
    await nova.create("web")
    await nova.server.close()


SMALL = """
[policy]
extends = "standard"

[[rule]]
id = "small"
operations = ["resize"]
vcpus_max = 4
verdict = "admit"

[[rule]]
id = "no-resize"
operations = ["resize"]
verdict = "deny"
reason = "too_large"
"""


async def test_a_resize_that_the_policy_admits_to_some_sizes_is_said_to_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    small = Embedded(tmp_path / "small", SimulatedHost(), policy=str(path))
    await small.start()
    vm = await small.create("web")
    assert O.RESIZE in await allowed(small, vm)
    assert isinstance((await small.submit(vm, O.RESIZE, vcpus=2)).disposition, Admitted)
    await small.server.close()

    path.write_text(SMALL.replace("vcpus_max = 4", 'target_hosts = ["nowhere"]'))
    none = Embedded(tmp_path / "none", SimulatedHost(), policy=str(path))
    await none.start()
    vm = await none.create("web")
    assert O.RESIZE not in await allowed(none, vm)
    denied = (await none.submit(vm, O.RESIZE, vcpus=2)).disposition
    assert isinstance(denied, Denied)
    assert denied.rule == "no-resize"
    await none.server.close()


# ------------------------------------------------------------------------------------------------------- law 8, by HTTP


class Client:
    """One server behind its HTTP door, with another host, an image, volumes and a VM that boots from its disk."""

    def __init__(self, house: Embedded) -> None:
        self.house = house
        token = (house.server.folder / "admin.token").read_text().strip()
        transport = httpx.ASGITransport(app=house.server.app())
        headers = {"Authorization": f"Bearer {token}"}
        self.http = httpx.AsyncClient(transport=transport, base_url="http://interlock.test", headers=headers)

    async def post(
        self, path: str, operation: Operation, parameters: dict[str, Any], **headers: str
    ) -> tuple[int, dict[str, Any]]:
        body = {"operation": operation.value, "parameters": parameters}
        answer = await self.http.post(f"/v1/instances/web/{path}", json=body, headers=headers)
        return answer.status_code, answer.json()

    async def generation(self) -> int:
        return int((await self.http.get("/v1/instances/web")).json()["generation"])

    async def listed(self) -> dict[str, dict[str, Any]]:
        answers = (await self.http.get("/v1/instances/web/allowed")).json()["operations"]
        return {one["operation"]: one for one in answers}

    async def ended(self, request_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/v1/requests/{request_id}", params={"wait": "20s"})
        ended: dict[str, Any] = answer.json()
        return ended


DISK = msgspec.structs.replace(IMAGE, id="disk-image", name="disk", kind="disk", size_bytes=1 << 30)
ISO = msgspec.structs.replace(IMAGE, id="iso-image", name="iso", kind="iso", size_bytes=1 << 20)
LARGE = msgspec.structs.replace(DISK, id="large-image", name="large", size_bytes=64 << 30)
WITHOUT: Final = frozenset({O.DELETE, O.FORCE_DELETE, O.CREATE, O.RESET_STATE})
"""What ends the VM, and what lies about it."""


@pytest.fixture
async def client(house: Embedded, north: Neighbour) -> AsyncIterator[Client]:
    assert north.name == "north"
    for image in (DISK, ISO, LARGE):
        await house.put_image(image)
    for name, size_bytes in (("one", 1 << 20), ("two", 1 << 21), ("three", 1 << 21)):
        volume = await house.make_volume(name)
        await house.server.store.volumes.delete(volume.id)
        await house.server.store.volumes.put(msgspec.structs.replace(volume, size_bytes=size_bytes))
    await house.server.networks.create(house.caller, NewNetwork(name="lab"))
    other = await house.create("other")
    await house.carry_out(other, O.ATTACH_VOLUME, volume="three")
    answer = await house.server.instances.create(house.caller, NewInstance(name="web", image="disk", root_gib=2))
    await house.ended(admitted(answer))
    made = Client(house)
    yield made
    await made.http.aclose()


def parameters_for(operation: Operation, chance: random.Random, interfaces: list[str], number: int) -> dict[str, Any]:
    """Some parameters that make sense by themselves."""
    volume, other = chance.choice(("one", "two", "three")), chance.choice(("one", "two", "three"))
    image = {"image": chance.choice(("disk", "iso", "large", IMAGE.name))} if chance.random() < 0.7 else {}
    host = {"host": chance.choice(("any", "here", "north"))}
    known: dict[Operation, dict[str, Any]] = {
        O.ATTACH_VOLUME: {"volume": volume},
        O.DETACH_VOLUME: {"volume": volume},
        O.SWAP_VOLUME: {"old": volume, "new": other, "copy": chance.random() < 0.7},
        O.ATTACH_INTERFACE: {"mac": f"52:54:00:00:00:0{chance.randrange(3)}"} if chance.random() < 0.5 else {},
        O.DETACH_INTERFACE: {"interface": chance.choice([*interfaces, "nobody"])},
        O.MOVE_INTERFACE: {"interface": chance.choice([*interfaces, "primary", "nobody"]), "network": "lab"},
        O.SET_INTERFACE: {"interface": chance.choice([*interfaces, "primary"]), "inbound_kbit": 100},
        O.ADD_FORWARD: {"host_port": chance.choice((8080, 8081)), "guest_port": 80},
        O.REMOVE_FORWARD: {"host_port": chance.choice((8080, 8081))},
        O.RESIZE: {chance.choice(["vcpus", "root_gib"]): chance.randint(1, 4)},
        O.REBUILD: image,
        O.RESCUE: image,
        O.MIGRATE: host,
        O.LIVE_MIGRATE: host,
        O.EVACUATE: host,
        O.SNAPSHOT: {"name": f"copy-{number}"},
        O.BACKUP: {"backup_type": "daily", "rotation": 2},
        O.RENAME: {"name": ("web", "other")[number % 2]},
        O.STOP: {"hard": chance.random() < 0.5},
        O.REBOOT: {"hard": chance.random() < 0.5},
    }
    return known.get(operation, {})


async def asked_at_once(
    client: Client, operation: Operation, parameters: dict[str, Any]
) -> tuple[dict[str, Any], tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]:
    """What `allowed` says without and with the parameters, and what the submission gets, all of one generation."""
    while True:
        before = await client.generation()
        listed, told = (await client.listed())[operation.value], await client.post("allowed", operation, parameters)
        status, answer = await client.post("requests", operation, parameters, **{"If-Match": f'"{before}"'})
        if status != 412:
            return listed, told, (status, answer)
        await client.http.get("/v1/instances/web", params={"after_generation": before, "wait": "1s"})


async def interfaces_of(client: Client) -> list[str]:
    spec = (await client.house.server.instances.describe(client.house.caller, "web")).spec
    assert spec is not None
    return [one.id for one in spec.interfaces]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("waits", [True, False])
async def test_what_is_said_beforehand_is_what_a_submission_gets_and_what_is_admitted_succeeds(
    client: Client, seed: int, *, waits: bool
) -> None:
    """Law 8, for every operation, with and without parameters, whatever is outstanding."""
    chance = random.Random(seed)
    seen: set[str] = set()
    for number in range(60):
        operation = chance.choice([one for one in O if one not in WITHOUT])
        parameters = parameters_for(operation, chance, await interfaces_of(client), number)
        listed, (told, said), (status, answer) = await asked_at_once(client, operation, parameters)
        if told != 200:
            assert (told, said["detail"]) == (status, answer["detail"]), (operation, parameters)
            continue
        given = answer.get("disposition", "denied")
        assert (said["disposition"], said["rule"]) == (given, answer["rule"]), (operation, parameters, said, answer)
        assert said["reason"] == answer.get("reason")
        if given == "denied":
            assert (status, said["remedy"]) == (409, answer["remedy"])
            assert said["rule"] != RULE or said["remedy"]
            seen.add(said["reason"])
        else:
            # What some parameters have admitted is not refused where none are named. A hard one is its own variant.
            variant = not parameters or parameters.get("hard") is True
            assert listed["disposition"] != "denied" or variant, (operation, parameters, listed)
        if not parameters:
            assert (listed["disposition"], listed["reason"]) == (said["disposition"], said["reason"]), operation
        if given == "admitted" and (waits or chance.random() < 0.3):
            ended = await client.ended(answer["request"]["id"])
            assert ended["status"] != "failed", (operation, parameters, ended)
    assert seen
