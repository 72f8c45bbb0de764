"""A host that is lost is no dead end: from every state its VMs are evacuated or deleted, and nothing waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from in_process.embedded import IMAGE, admitted
from in_process.three_hosts import Street
from interlock.api.schemas import serializers
from interlock.core.errors import Invalid, OperationRejected
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.records import Admitted, Change, Denied, Held, Instance, Request, Spec, Status
from interlock.core.scheduled_actions import UpkeepTimes
from interlock.core.specs import SharedFolder
from interlock.core.states import EXECUTING_STATES, PowerState, VmState
from interlock.hypervisors.simulated.faults import Method, Slow
from interlock.ports import HostState, Limits, Permit
from interlock.service.policy_requests import NewPolicy
from interlock.service.request_models import NewInstance, NewRequest
from interlock.service.submission_results import SubmissionResult
from waiting import PATIENCE_S

O = Operation  # noqa: E741
V = VmState
WITHOUT_HOST = {O.DELETE, O.FORCE_DELETE, O.EVACUATE}
"""What can be asked for, beyond what only changes the record."""

# From what is done to an active VM: the state it has then, and the one that its evacuation leads to.
WAYS: dict[str, tuple[tuple[Operation, ...], VmState, VmState]] = {
    "active": ((), V.ACTIVE, V.ACTIVE),
    "stopped": ((O.STOP,), V.STOPPED, V.STOPPED),
    "paused": ((O.PAUSE,), V.PAUSED, V.PAUSED),
    "suspended": ((O.SUSPEND,), V.SUSPENDED, V.STOPPED),
    "rescued": ((O.RESCUE,), V.RESCUED, V.RESCUED),
    "resized": ((O.RESIZE,), V.RESIZED, V.ACTIVE),
    "resized while stopped": ((O.STOP, O.RESIZE), V.RESIZED, V.STOPPED),
    "shelved": ((O.SHELVE,), V.SHELVED, V.SHELVED_OFFLOADED),
    "shelved while suspended": ((O.SUSPEND, O.SHELVE), V.SHELVED, V.SHELVED_OFFLOADED),
    "offloaded": ((O.SHELVE, O.SHELVE_OFFLOAD), V.SHELVED_OFFLOADED, V.SHELVED_OFFLOADED),
    "soft-deleted": ((O.SOFT_DELETE,), V.SOFT_DELETED, V.SOFT_DELETED),
    "soft-deleted while resized": ((O.RESIZE, O.SOFT_DELETE), V.SOFT_DELETED, V.SOFT_DELETED),
    "soft-deleted while shelved": ((O.SHELVE, O.SOFT_DELETE), V.SOFT_DELETED, V.SOFT_DELETED),
    "in error": ((O.RESET_STATE,), V.ERROR, V.ACTIVE),
}
GIVEN: dict[Operation, dict[str, Any]] = {
    O.RESIZE: {"memory_mib": 300},
    O.RESET_STATE: {"vm_state": "error", "reason": "a test"},
}
BACK: dict[str, tuple[tuple[Operation, ...], VmState]] = {
    "stopped": ((O.START,), V.ACTIVE),
    "paused": ((O.UNPAUSE,), V.ACTIVE),
    "suspended": ((O.START,), V.ACTIVE),
    "rescued": ((O.UNRESCUE,), V.ACTIVE),
    "shelved": ((O.UNSHELVE,), V.ACTIVE),
    "shelved while suspended": ((O.UNSHELVE,), V.STOPPED),
    "offloaded": ((O.UNSHELVE,), V.ACTIVE),
    "soft-deleted": ((O.RESTORE,), V.ACTIVE),
    "soft-deleted while resized": ((O.RESTORE,), V.ACTIVE),
    "soft-deleted while shelved": ((O.RESTORE,), V.SHELVED_OFFLOADED),
}
"""What is undone afterwards, and where that leads: the record must not promise what was lost."""


@pytest.fixture
def limits() -> Limits:
    return Limits()


async def brought(street: Street, way: str, **size: Any) -> str:
    """A VM on the host north in that state; its id."""
    operations, state, _ = WAYS[way]
    vm = await street.create("web", host="north", **size)
    for operation in operations:
        await carry_out(street, vm, operation, **GIVEN.get(operation, {}))
    instance = await street.house.until(vm, vm_state=state, outstanding=())
    assert instance.host == "north"
    return vm


async def carry_out(street: Street, vm: str, operation: Operation, **parameters: object) -> Request:
    request = await street.house.carry_out(vm, operation, **parameters)
    assert request.status is Status.SUCCEEDED, request
    return request


async def lose(street: Street) -> None:
    """The host north is lost with everything on it, and fenced."""
    await street.fence(street.north)
    for vm in street.north.host.guests:
        street.north.host.vanish(vm)


def running(street: Street, vm: str) -> list[str]:
    """The hosts on which a guest of it runs."""
    hosts = {"here": street.house.host, "north": street.north.host, "south": street.south.host}
    return [name for name, host in hosts.items() if vm in host.guests and host.guests[vm].power.value != "none"]


async def allowed(street: Street, vm: str) -> set[Operation]:
    _, answers = await street.house.server.instances.allowed(street.house.caller, vm)
    return {operation for operation, answer in answers.items() if isinstance(answer, Admitted)}


@pytest.mark.parametrize("way", WAYS)
async def test_every_state_has_its_evacuation(street: Street, way: str) -> None:
    _, _, expected = WAYS[way]
    vm = await brought(street, way)
    await lose(street)
    await carry_out(street, vm, O.EVACUATE, host="south")
    instance = await street.house.until(vm, outstanding=())
    assert (instance.vm_state, instance.host) == (expected, "south")
    assert running(street, vm) == (["south"] if expected in EXECUTING_STATES else [])
    undoing, there = BACK.get(way, ((), expected))
    for operation in undoing:
        await carry_out(street, vm, operation)
    assert (await street.house.until(vm, vm_state=there, outstanding=())).host == "south"


@pytest.mark.parametrize("way", WAYS)
async def test_what_needs_the_lost_host_is_refused_and_not_offered(street: Street, way: str) -> None:
    """And what is offered is what a submission gets."""
    vm = await brought(street, way)
    await lose(street)
    offered = await allowed(street, vm)
    # What is offloaded is on no host, and is unshelved on whichever has room.
    without = WITHOUT_HOST | ({O.UNSHELVE} if way == "offloaded" else set())
    assert {one for one in offered if CATALOGUE[one].lane is not Lane.RECORD} == without
    for operation in Operation:
        if CATALOGUE[operation].lane is Lane.STATE and operation not in without:
            answer = await judged(street, vm, operation)
            assert isinstance(answer, Denied), (operation, answer)
            if operation is not O.CREATE:
                assert answer.reason == "host_fenced", (operation, answer)
                assert "The host north is fenced." in str(answer.because)
                assert "evacuate" in str(answer.because)


async def judged(street: Street, vm: str, operation: Operation) -> object:
    _, answers = await street.house.server.instances.allowed(street.house.caller, vm)
    return answers[operation]


@pytest.mark.parametrize("way", ["suspended", "shelved while suspended", "resized", "rescued", "paused"])
async def test_what_is_lost_is_said_in_the_answer_the_event_and_the_record(street: Street, way: str) -> None:
    said = {
        "suspended": "saved memory",
        "shelved while suspended": "saved memory",
        "resized": "resize is confirmed",
        "rescued": "rescue disk",
        "paused": "memory of its guest is lost",
    }[way]
    vm = await brought(street, way)
    await lose(street)
    answer = await street.house.submit(vm, O.EVACUATE, host="south")
    assert any(said in loss for loss in answer.loses)
    ended = await street.house.ended(admitted(answer))
    assert said in str(ended.message)
    event = await street.house.until_event(vm, "instance.evacuated")
    assert (event.data["from_host"], event.data["host"]) == ("north", "south")
    assert any(said in loss for loss in event.data["lost"])
    instance = await street.house.until(vm, outstanding=())
    assert instance.evacuated is not None
    assert (instance.evacuated.from_host, instance.evacuated.lost) == ("north", tuple(event.data["lost"]))


@pytest.mark.parametrize("way", ["active", "stopped", "suspended", "rescued", "resized", "in error", "soft-deleted"])
async def test_a_lost_disk_begins_as_its_image_only_if_that_is_asked_for(street: Street, way: str) -> None:
    vm = await brought(street, way, root_gib=1)
    await lose(street)
    refused = (await street.house.submit(vm, O.EVACUATE, host="south")).disposition
    assert isinstance(refused, Denied)
    assert "root disk of web" in str(refused.because)
    ended = await carry_out(street, vm, O.EVACUATE, host="south", from_image=True)
    assert "created from its image again" in str(ended.message)


@pytest.mark.parametrize("way", ["shelved", "offloaded", "soft-deleted while shelved"])
async def test_of_what_is_shelved_no_disk_is_lost(street: Street, way: str) -> None:
    vm = await brought(street, way, root_gib=1)
    await lose(street)
    ended = await carry_out(street, vm, O.EVACUATE, host="south")
    assert ended.message is None
    if way == "soft-deleted while shelved":
        await carry_out(street, vm, O.RESTORE)
    await carry_out(street, vm, O.UNSHELVE)
    assert running(street, vm) == ["south"]


async def test_one_that_never_ran_has_nothing_to_lose(street: Street) -> None:
    body = {"name": "web", "image": IMAGE.name, "host": "north", "root_gib": 1, "start": False}
    made = await street.house.server.instances.create(street.house.caller, msgspec.convert(body, NewInstance))
    vm = made.instance.id
    await lose(street)
    await carry_out(street, vm, O.EVACUATE, host="south")
    await carry_out(street, vm, O.START)
    assert running(street, vm) == ["south"]


async def test_what_waits_for_a_lost_host_ends_with_the_reason_and_is_not_in_the_way(street: Street) -> None:
    """What was in flight goes on waiting, and the evacuation takes over from it."""
    vm = await brought(street, "paused")
    await street.north.disconnect()
    unpausing = admitted(await street.house.submit(vm, O.UNPAUSE))
    await street.house.until_event(vm, "request.unknown")
    waiting = admitted(await street.house.submit(vm, O.STOP))
    await lose(street)
    ended = await street.house.ended(waiting)
    assert (ended.status, ended.reason) == (Status.CANCELLED, "host_fenced")
    assert "The host north is fenced." in str(ended.message)
    assert O.EVACUATE in await allowed(street, vm)
    await carry_out(street, vm, O.EVACUATE, host="south")
    assert (await street.house.ended(unpausing)).status is Status.SUPERSEDED
    assert (await street.house.until(vm, outstanding=())).vm_state is V.PAUSED
    assert running(street, vm) == ["south"]


@pytest.mark.parametrize(
    ("way", "operation"),
    [("paused", O.UNPAUSE), ("resized", O.CONFIRM_RESIZE), ("rescued", O.UNRESCUE), ("shelved", O.SHELVE_OFFLOAD)],
)
async def test_an_evacuation_is_admitted_behind_whatever_waits_for_the_lost_host(
    street: Street, way: str, operation: Operation
) -> None:
    vm = await brought(street, way)
    await street.north.disconnect()
    await street.house.submit(vm, operation)
    await street.house.until_event(vm, "request.unknown")
    await lose(street)
    await carry_out(street, vm, O.EVACUATE, host="south")
    assert (await street.house.until(vm, outstanding=())).host == "south"


async def test_a_held_evacuation_is_served_when_its_host_is_fenced(street: Street) -> None:
    vm = await brought(street, "suspended")
    await street.north.disconnect()
    wish = NewRequest(operation=O.EVACUATE, parameters={"host": "south"}, hold="10m")
    answer: SubmissionResult = await street.house.server.instances.submit(street.house.caller, vm, wish)
    assert isinstance(answer.disposition, Held)
    await lose(street)
    assert (await street.house.ended(answer.disposition.request)).status is Status.SUCCEEDED
    assert (await street.house.until(vm, outstanding=())).vm_state is V.STOPPED


async def test_an_evacuation_that_comes_to_its_turn_when_its_host_is_back_changes_nothing(street: Street) -> None:
    """Its target could not be asked until then: a guest is not run twice, and the instance is what it was."""
    vm = await brought(street, "paused")
    await street.fence(street.north)  # an admin's word, and a wrong one: its guests go on
    street.south.host.faults.script(vm, Method.DEFINE, Slow(300))
    evacuation = admitted(await street.house.submit(vm, O.EVACUATE, host="south"))
    await street.house.until_event(vm, "request.taken")
    await street.north.connect(street.house)
    ended = await street.house.ended(evacuation)
    assert ended.status is Status.FAILED
    assert "Host north is not fenced" in str(ended.message)
    instance = await street.house.until(vm, outstanding=())
    assert (instance.vm_state, instance.host) == (V.PAUSED, "north")
    assert running(street, vm) == ["north"]
    await carry_out(street, vm, O.UNPAUSE)


EVACUATE_IN_TURN = """
[policy]
name = "site"
extends = "standard"

[[rule]]
id = "evacuate-in-turn"
operations = ["evacuate"]
vm_state = ["@sources"]
host_reachable = false
verdict = "admit"
because = "The host is lost."
"""


async def test_an_evacuation_that_a_site_admits_in_turn_is_served_while_the_host_is_lost(street: Street) -> None:
    """Its queue is judged with the host as it is: it is neither cancelled nor refused as if the host were reachable."""
    server, caller = street.house.server, street.house.caller
    loaded = await server.policies.load(caller, NewPolicy(main="site.toml", files={"site.toml": EVACUATE_IN_TURN}))
    assert loaded.proof.holds
    vm = await brought(street, "paused")
    await street.north.disconnect()
    unpausing = admitted(await street.house.submit(vm, O.UNPAUSE))
    await street.house.until_event(vm, "request.unknown")
    await lose(street)
    evacuating = admitted(await street.house.submit(vm, O.EVACUATE, host="south"))
    assert evacuating.rule == "evacuate-in-turn"
    assert [one.status for one in (await street.house.until(vm)).outstanding] == [Status.UNKNOWN, Status.QUEUED]
    await carry_out(street, vm, O.RESET_STATE, vm_state="active", reason="its worker is lost")
    assert (await street.house.ended(unpausing)).status is Status.SUPERSEDED
    assert (await street.house.ended(evacuating)).status is Status.SUCCEEDED
    assert running(street, vm) == ["south"]


async def test_an_evacuation_whose_target_is_lost_too_can_be_asked_for_again_at_once(street: Street) -> None:
    vm = await brought(street, "suspended")
    await lose(street)
    await street.south.disconnect()
    with pytest.raises(Invalid, match="south"):
        await street.house.submit(vm, O.EVACUATE, host="south")
    await street.south.connect(street.house)
    street.south.host.faults.script(vm, Method.DEFINE, Slow(60_000))
    evacuation = admitted(await street.house.submit(vm, O.EVACUATE, host="south"))
    await street.house.until_event(vm, "request.taken")
    await street.fence(street.south)
    ended = await street.house.ended(evacuation)
    assert ended.status is Status.FAILED
    assert "Target host south is fenced" in str(ended.message)
    assert (await street.house.until(vm, outstanding=())).vm_state is V.SUSPENDED
    await carry_out(street, vm, O.EVACUATE, host="here")
    assert (await street.house.until(vm, outstanding=())).vm_state is V.STOPPED


async def test_deleting_does_not_wait_for_a_lost_host(street: Street) -> None:
    vm = await brought(street, "paused")
    other = await street.create("other", host="north")
    await street.north.disconnect()
    waiting = admitted(await street.house.submit(other, O.DELETE))
    await street.house.until_event(other, "request.unknown")
    await lose(street)
    ended = await carry_out(street, vm, O.DELETE)
    assert "removed when the host comes back" in str(ended.message)
    assert (await street.house.ended(waiting)).status is Status.SUCCEEDED
    assert set(street.north.host.guests) == {vm, other}
    await street.north.connect(street.house)
    await until_empty(street)


async def share_root(street: Street, vm: str) -> None:
    """Have its root disk in a shared folder, by its record."""

    def decide(instance: Instance, _now_ms: int) -> Change[None]:
        assert instance.spec is not None
        spec = msgspec.structs.replace(instance.spec, shared=SharedFolder(id="s", path="/shared"))
        return Change(instance=msgspec.structs.replace(instance, spec=spec), answer=None)

    await street.house.server.store.change(vm, decide)


async def test_the_root_disk_of_a_vm_on_a_lost_host_is_removed_from_the_shared_folder(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, unshared = await brought(street, "active"), await street.create("other", host="north")
    await share_root(street, vm)
    await lose(street)
    dropped: list[tuple[str, frozenset[int]]] = []

    async def drop(_permit: Permit, instance_id: str, _spec: Spec, kept: frozenset[int]) -> None:
        dropped.append((instance_id, kept))

    monkeypatch.setattr(street.house.server.hypervisor, "drop_root_disks", drop)
    for one in (unshared, vm):
        await carry_out(street, one, O.DELETE)
    assert dropped == [(vm, frozenset())]


@pytest.mark.parametrize("host", ["here", "north"])
async def test_only_a_forced_deletion_succeeds_without_the_shared_folder(
    street: Street, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    vm = await street.create("web", host=host)
    await share_root(street, vm)
    if host == "north":
        await lose(street)

    async def refuse(*_: object) -> None:
        raise OperationRejected("The shared folder is missing.")

    monkeypatch.setattr(street.house.server.hypervisor, "drop_root_disks", refuse)
    assert (await street.house.carry_out(vm, O.DELETE)).status is Status.FAILED
    assert vm in street.north.host.guests or vm in street.house.host.guests
    ended = await carry_out(street, vm, O.FORCE_DELETE)
    assert ended.message == "Its root disk was not removed: The shared folder is missing."
    assert vm not in street.house.host.guests


async def until_empty(street: Street) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while street.north.host.guests:  # noqa: ASYNC110 - nobody tells when it is removed
            await asyncio.sleep(0.01)


async def test_a_host_that_is_back_is_told_to_its_instances(street: Street) -> None:
    vm = await brought(street, "stopped")
    await lose(street)
    fenced = await street.house.until_event(vm, "instance.host_fenced")
    assert fenced.data == {"host": "north", "by": "tester"}
    await street.north.connect(street.house)
    assert (await street.house.until_event(vm, "instance.host_back")).data["host"] == "north"
    await carry_out(street, vm, O.START)
    assert running(street, vm) == ["north"]


async def test_the_hosts_events_are_kept_and_told_to_its_instances(street: Street) -> None:
    vm = await brought(street, "active")
    await lose(street)
    await street.north.connect(street.house)
    await street.house.until_event(vm, "instance.host_back")
    kinds = [event.kind for event in await street.house.events(vm) if event.kind.startswith("instance.host_")]
    assert kinds == ["instance.host_fenced", "instance.host_back"]
    seen = await street.house.server.other_hosts.show(street.house.caller, "north")
    assert [(one.kind, one.by) for one in seen.host.history] == [("joined", None), ("fenced", "tester"), ("back", None)]


async def test_a_guest_on_a_lost_host_is_stuck_and_its_power_state_unknown(street: Street) -> None:
    vm = await brought(street, "active")
    resting = await street.create("resting", host="north")
    await carry_out(street, resting, O.STOP)
    await street.create("here")
    assert await street.house.server.instances.stuck(street.house.caller) == ()
    await lose(street)
    found = await street.house.server.instances.stuck(street.house.caller)
    assert {one.instance.id for one in found} == {vm, resting}
    for one in found:
        assert one.host is not None
        assert {O.EVACUATE, O.DELETE} <= set(one.allowed)
        shown = serializers.stuck(one, street.house.server.instances.now_ms())
        assert "fenced" in shown.why
        assert "vm evacuate" in str(shown.remedy)
    assert shown_power(await street.house.until(vm), HostState.FENCED) is PowerState.UNKNOWN
    assert shown_power(await street.house.until(resting), HostState.FENCED) is PowerState.NONE


@pytest.mark.parametrize("root", [{}, {"root_gib": 1}], ids=["nothing lost", "root disk lost"])
async def test_the_evacuation_that_is_advised_for_a_stuck_guest_is_admitted(street: Street, root: Any) -> None:
    vm = await brought(street, "active", **root)
    await lose(street)
    (found,) = await street.house.server.instances.stuck(street.house.caller)
    remedy = str(serializers.stuck(found, street.house.server.instances.now_ms()).remedy)
    advised = {"host": "any"} | ({"from_image": True} if "--host any --from-image`" in remedy else {})
    await carry_out(street, vm, O.EVACUATE, **advised)
    assert ("without the data on its root disk" in remedy) == bool(root)


def shown_power(instance: Instance, state: HostState) -> PowerState:
    times = UpkeepTimes(resize_confirm_window_ms=0, reclaim_after_ms=0, offload_after_ms=0)
    return serializers.instance(instance, times, state).power_state


async def test_a_reset_of_the_state_is_no_way_around(street: Street) -> None:
    vm = await brought(street, "active")
    await lose(street)
    await carry_out(street, vm, O.RESET_STATE, vm_state="stopped", reason="a test")
    assert isinstance((await street.house.submit(vm, O.START)).disposition, Denied)
    await carry_out(street, vm, O.EVACUATE, host="south")
    assert (await street.house.until(vm, outstanding=())).vm_state is V.STOPPED
