"""What takes effect after it was given up on is taken into the record (law 10)."""

from __future__ import annotations

import pytest

from in_process.embedded import Embedded
from interlock.core.operations import Operation
from interlock.core.records import Denied, Disk, Instance, Status
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import AnswerLost, GuestIgnores, Method

O = Operation  # noqa: E741


async def _attached(fleet: Embedded) -> tuple[str, str]:
    vm, volume = await fleet.create("web"), await fleet.make_volume("data")
    assert (await fleet.carry_out(vm, O.ATTACH_VOLUME, volume=volume.id)).status is Status.SUCCEEDED
    return vm, volume.id


async def _held_on_to(fleet: Embedded, host: SimulatedHost) -> tuple[str, str]:
    """A guest that was to let go of a volume and has not: the detach failed."""
    vm, volume = await _attached(fleet)
    host.faults.script(vm, Method.DETACH_DISK, GuestIgnores(), GuestIgnores())
    assert (await fleet.carry_out(vm, O.DETACH_VOLUME, volume=volume)).status is Status.FAILED
    instance = await fleet.until(vm, detaching=(volume,))
    assert _volumes(instance) == [volume]
    assert await _attached_to(fleet, volume) == vm
    return vm, volume


def _volumes(instance: Instance) -> list[str]:
    assert instance.spec is not None
    return [disk.id for disk in instance.spec.disks]


async def _attached_to(fleet: Embedded, volume: str) -> str | None:
    found = await fleet.server.store.volumes.get(volume)
    assert found is not None
    return found.attached_to


async def _is_detached(fleet: Embedded, vm: str, volume: str) -> None:
    event = await fleet.until_event(vm, "guest.changed")
    assert event.data == {"detached": [volume]}
    instance = await fleet.until(vm, detaching=())
    assert _volumes(instance) == []
    other = await fleet.create("other")
    assert (await fleet.carry_out(other, O.ATTACH_VOLUME, volume=volume)).status is Status.SUCCEEDED


async def test_a_guest_that_lets_go_late_has_let_go(fleet: Embedded, host: SimulatedHost) -> None:
    vm, volume = await _held_on_to(fleet, host)
    assert host.lets_go(vm)
    await _is_detached(fleet, vm, volume)


async def test_a_guest_that_lets_go_while_no_server_is_there_has_let_go(fleet: Embedded, host: SimulatedHost) -> None:
    vm, volume = await _held_on_to(fleet, host)
    await fleet.crash()
    assert host.lets_go(vm)
    await fleet.start()
    await _is_detached(fleet, vm, volume)


@pytest.mark.parametrize("how", ["reset", "own reset", "power off", "panic", "vanish", "stop", "hard stop", "reboot"])
async def test_a_guest_that_is_reset_or_ends_has_let_go(
    fleet: Embedded, host: SimulatedHost, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As the message of the detach that failed says. The next start plugged the volume in again."""
    vm, volume = await _held_on_to(fleet, host)
    match how:
        case "reset":
            await fleet.carry_out(vm, O.REBOOT, hard=True)
        case "own reset":
            assert host.guest_resets(vm)
        case "power off":
            assert host.guest_powers_off(vm)
        case "panic":
            assert host.guest_panics(vm)
            await fleet.until(vm, vm_state=VmState.ERROR)
            assert await _attached_to(fleet, volume) == vm, "what is left of the guest has it open"
            release = fleet.server.store.volumes.release

            async def released(volume_id: str, instance_id: str) -> None:
                assert host.guests[vm].power is PowerState.NONE
                await release(volume_id, instance_id)

            monkeypatch.setattr(fleet.server.store.volumes, "release", released)
            assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
        case "vanish":
            assert host.vanish(vm)
        case "stop" | "hard stop":
            await fleet.carry_out(vm, O.STOP, hard=how == "hard stop")
        case _:
            await fleet.carry_out(vm, O.REBOOT)
    await _is_detached(fleet, vm, volume)
    if how not in {"reset", "own reset", "reboot", "panic"}:
        assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    assert volume not in host.guests[vm].disks


async def test_a_guest_that_ends_while_no_server_is_there_has_let_go(fleet: Embedded, host: SimulatedHost) -> None:
    vm, volume = await _held_on_to(fleet, host)
    await fleet.crash()
    assert host.guest_powers_off(vm)
    await fleet.start()
    await _is_detached(fleet, vm, volume)


@pytest.mark.parametrize("plugged_in", [True, False])
async def test_a_claim_that_a_killed_server_left_is_released_unless_the_guest_has_the_volume(
    fleet: Embedded, host: SimulatedHost, *, plugged_in: bool
) -> None:
    vm, volume = await fleet.create("web"), await fleet.make_volume("data")
    assert await fleet.server.store.volumes.claim(volume.id, vm)
    await fleet.crash()
    if plugged_in:
        host.guests[vm].disks[volume.id] = Disk(id=volume.id, path=volume.path)
    await fleet.start()
    await fleet.server.agent.adopted()
    assert await _attached_to(fleet, volume.id) == (vm if plugged_in else None)


async def test_what_is_being_detached_is_not_attached_again(fleet: Embedded, host: SimulatedHost) -> None:
    vm, volume = await _held_on_to(fleet, host)
    again = (await fleet.submit(vm, O.ATTACH_VOLUME, volume=volume)).disposition
    assert isinstance(again, Denied)
    assert again.reason == "being_detached"


async def test_a_second_detach_that_succeeds_leaves_nothing_to_be_detached(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm, volume = await _held_on_to(fleet, host)
    assert (await fleet.carry_out(vm, O.DETACH_VOLUME, volume=volume)).status is Status.SUCCEEDED
    await fleet.until(vm, detaching=())
    assert await _attached_to(fleet, volume) is None


async def test_an_interface_that_is_let_go_of_late_is_detached(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    interface = (await fleet.carry_out(vm, O.ATTACH_INTERFACE)).id
    host.faults.script(vm, Method.DETACH_INTERFACE, GuestIgnores(), GuestIgnores())
    assert (await fleet.carry_out(vm, O.DETACH_INTERFACE, interface=interface)).status is Status.FAILED
    await fleet.until(vm, detaching=(interface,))
    assert host.lets_go(vm)
    instance = await fleet.until(vm, detaching=())
    assert instance.spec is not None
    assert instance.spec.interfaces == ()


@pytest.mark.parametrize("what", ["volume", "interface"])
async def test_a_paused_guest_is_not_asked_to_let_go(fleet: Embedded, what: str) -> None:
    vm, volume = await _attached(fleet)
    interface = (await fleet.carry_out(vm, O.ATTACH_INTERFACE)).id
    await fleet.carry_out(vm, O.PAUSE)
    operation, device = (O.DETACH_VOLUME, volume) if what == "volume" else (O.DETACH_INTERFACE, interface)
    refused = (await fleet.submit(vm, operation, **{what: device})).disposition
    assert isinstance(refused, Denied)
    assert (refused.reason, "is paused" in (refused.because or "")) == ("paused", True)
    await fleet.carry_out(vm, O.UNPAUSE)
    assert (await fleet.carry_out(vm, operation, **{what: device})).status is Status.SUCCEEDED


async def test_an_attach_of_which_only_the_answer_was_lost_is_recorded(fleet: Embedded, host: SimulatedHost) -> None:
    vm, volume = await fleet.create("web"), await fleet.make_volume("data")
    host.faults.script(vm, Method.ATTACH_DISK, AnswerLost(), AnswerLost())
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume=volume.id)

    async def recorded() -> bool | None:
        return True if _volumes(await fleet.until(vm)) == [volume.id] else None

    assert await fleet.server.instances.watch.until(vm, recorded, 5_000)
    assert await _attached_to(fleet, volume.id) == vm
    assert volume.id in host.guests[vm].disks
