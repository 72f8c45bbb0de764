"""The hypervisor's promises for everyday: looking, switching on and off, pausing, resetting, disks."""

from __future__ import annotations

import asyncio

import msgspec

from conformance.hypervisor.harness import Bench, check, raises
from interlock.core.errors import GuestNotFound, HypervisorError
from interlock.core.records import GuestEvent
from interlock.core.states import PowerState
from interlock.ports import Observation

# ------------------------------------------------------------------------------------------------- looking at guests


@check
async def inspect_of_an_unknown_instance_is_an_answer(bench: Bench) -> None:
    assert await bench.hypervisor.inspect("never-heard-of") == Observation(defined=False, power_state=PowerState.NONE)


@check
async def what_is_defined_is_known_and_does_not_run(bench: Bench) -> None:
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    assert await bench.hypervisor.known() == {"one"}
    assert await bench.hypervisor.inspect("one") == Observation(defined=True, power_state=PowerState.NONE)


@check
async def define_twice_is_define_once(bench: Bench) -> None:
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    incarnation = await bench.host.incarnation("one")
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    assert await bench.power() is PowerState.RUNNING
    assert await bench.host.incarnation("one") == incarnation


# --------------------------------------------------------------------------------------------------- on and off


@check
async def a_guest_runs_after_power_on(bench: Bench) -> None:
    await bench.start()
    seen = await bench.hypervisor.inspect("one")
    assert (seen.defined, seen.power_state, seen.responsive) == (True, PowerState.RUNNING, True)


@check
async def power_on_twice_starts_one_guest(bench: Bench) -> None:
    await bench.start()
    incarnation = await bench.host.incarnation("one")
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    assert await bench.host.incarnation("one") == incarnation
    assert await bench.power() is PowerState.RUNNING


@check
async def power_on_starts_with_the_disks_of_the_spec(bench: Bench) -> None:
    await bench.start(spec=msgspec.structs.replace(bench.spec, disks=(bench.host.disk("v1"), bench.host.disk("v2"))))
    seen = await bench.hypervisor.inspect("one")
    assert {"v1", "v2"} <= set(seen.disks)
    assert await bench.power() is PowerState.RUNNING


@check
async def power_on_lets_a_paused_guest_go_on(bench: Bench) -> None:
    await bench.start()
    incarnation = await bench.host.incarnation("one")
    await bench.hypervisor.pause(bench.permit, "one")
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    assert await bench.power() is PowerState.RUNNING
    assert await bench.host.incarnation("one") == incarnation


@check
async def power_on_starts_a_guest_that_powered_itself_off(bench: Bench) -> None:
    await bench.start()
    await bench.host.guest_power_off("one")
    await bench.expect(GuestEvent.STOPPED)
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    assert await bench.power() is PowerState.RUNNING


@check
async def power_on_starts_a_guest_that_panicked(bench: Bench) -> None:
    await bench.start()
    await bench.host.guest_panic("one")
    await bench.expect(GuestEvent.CRASHED)
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    assert await bench.power() is PowerState.RUNNING


@check
async def power_on_starts_a_guest_that_vanished(bench: Bench) -> None:
    await bench.start()
    await bench.host.kill("one")
    await bench.expect(GuestEvent.VANISHED)
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    assert await bench.power() is PowerState.RUNNING


@check
async def power_off_ends_the_guest_and_keeps_the_instance(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.power_off(bench.permit, "one")
    assert await bench.hypervisor.inspect("one") == Observation(defined=True, power_state=PowerState.NONE)


@check
async def power_off_of_what_is_off_does_nothing(bench: Bench) -> None:
    await bench.hypervisor.power_off(bench.permit, "never-heard-of")
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    await bench.hypervisor.power_off(bench.permit, "one")
    assert await bench.power() is PowerState.NONE


@check
async def the_power_button_is_heeded_and_told(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.press_power_button(bench.permit, "one")
    await bench.in_time(bench.hypervisor.wait_powered_off("one"))
    assert await bench.power() in {PowerState.SHUTDOWN, PowerState.NONE}
    await bench.expect(GuestEvent.STOPPED)


@check
async def a_guest_that_ignores_its_power_button_runs_on(bench: Bench) -> None:
    await bench.start()
    await bench.host.guest_ignores("one")
    await bench.hypervisor.press_power_button(bench.permit, "one")
    off = asyncio.ensure_future(bench.hypervisor.wait_powered_off("one"))
    await bench.hypervisor.pause(bench.permit, "one")
    await bench.hypervisor.unpause(bench.permit, "one")
    assert not off.done()
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.in_time(off)
    assert bench.told.kinds() == []


@check
async def wait_powered_off_returns_where_no_guest_runs(bench: Bench) -> None:
    await bench.in_time(bench.hypervisor.wait_powered_off("never-heard-of"))
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    await bench.in_time(bench.hypervisor.wait_powered_off("one"))


@check
async def wait_powered_off_returns_when_what_held_the_guest_ends(bench: Bench) -> None:
    await bench.start()
    off = asyncio.ensure_future(bench.hypervisor.wait_powered_off("one"))
    await bench.power()
    assert not off.done()
    await bench.host.kill("one")
    await bench.in_time(off)


@check
async def undefine_leaves_nothing(bench: Bench) -> None:
    await bench.start(spec=msgspec.structs.replace(bench.spec, disks=(bench.host.disk("v1"),)))
    await bench.hypervisor.undefine(bench.permit, "one")
    assert await bench.host.remains("one") == []
    assert "one" not in await bench.hypervisor.known()
    assert not (await bench.hypervisor.inspect("one")).defined
    await bench.hypervisor.undefine(bench.permit, "one")


@check
async def undefine_does_not_touch_volumes(bench: Bench) -> None:
    spec = msgspec.structs.replace(bench.spec, disks=(bench.host.disk("v1"),))
    await bench.start(spec=spec)
    await bench.hypervisor.undefine(bench.permit, "one")
    await bench.start("two", spec=spec)
    assert "v1" in (await bench.hypervisor.inspect("two")).disks


@check
async def guests_do_not_disturb_each_other(bench: Bench) -> None:
    await bench.start("one")
    await bench.start("two")
    await bench.hypervisor.pause(bench.permit, "one")
    assert (await bench.power("one"), await bench.power("two")) == (PowerState.PAUSED, PowerState.RUNNING)
    await bench.hypervisor.undefine(bench.permit, "one")
    assert await bench.power("two") is PowerState.RUNNING
    assert await bench.hypervisor.known() == {"two"}


# ---------------------------------------------------------------------------------------------- while it is running


@check
async def pause_and_unpause_converge(bench: Bench) -> None:
    await bench.start()
    for _ in range(2):
        await bench.hypervisor.pause(bench.permit, "one")
        assert await bench.power() is PowerState.PAUSED
    for _ in range(2):
        await bench.hypervisor.unpause(bench.permit, "one")
        assert await bench.power() is PowerState.RUNNING


@check
async def what_needs_a_guest_says_so_where_none_runs(bench: Bench) -> None:
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    for command in (bench.hypervisor.pause, bench.hypervisor.unpause):
        async with raises(HypervisorError):
            await command(bench.permit, "one")
    async with raises(GuestNotFound):
        await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))
    async with raises(GuestNotFound):
        await bench.hypervisor.detach_disk(bench.permit, "one", "v1")
    assert await bench.power() is PowerState.NONE


@check
async def reset_runs_the_guest_afresh_whatever_it_was(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.reset(bench.permit, "one")
    assert await bench.power() is PowerState.RUNNING
    await bench.hypervisor.pause(bench.permit, "one")
    await bench.hypervisor.reset(bench.permit, "one")
    assert await bench.power() is PowerState.RUNNING
    await bench.host.until_up("one")
    await bench.host.guest_panic("one")
    await bench.expect(GuestEvent.CRASHED)
    await bench.hypervisor.reset(bench.permit, "one")
    assert await bench.power() is PowerState.RUNNING


@check
async def reset_runs_a_guest_that_powered_itself_off(bench: Bench) -> None:
    await bench.start()
    await bench.host.guest_power_off("one")
    await bench.expect(GuestEvent.STOPPED)
    await bench.hypervisor.reset(bench.permit, "one")
    assert await bench.power() is PowerState.RUNNING


@check
async def attach_is_seen_and_converges(bench: Bench) -> None:
    await bench.start()
    for _ in range(2):
        await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))
        assert (await bench.hypervisor.inspect("one")).disks.count("v1") == 1


@check
async def detach_is_seen_and_converges(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))
    for _ in range(2):
        await bench.hypervisor.detach_disk(bench.permit, "one", "v1")
        assert "v1" not in (await bench.hypervisor.inspect("one")).disks
    await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))
    assert "v1" in (await bench.hypervisor.inspect("one")).disks


@check
async def a_disk_of_the_spec_can_be_detached(bench: Bench) -> None:
    await bench.start(spec=msgspec.structs.replace(bench.spec, disks=(bench.host.disk("v1"),)))
    await bench.hypervisor.detach_disk(bench.permit, "one", "v1")
    assert "v1" not in (await bench.hypervisor.inspect("one")).disks
    assert await bench.power() is PowerState.RUNNING


@check
async def a_detached_disk_can_be_attached_to_another_guest(bench: Bench) -> None:
    await bench.start("one")
    await bench.start("two")
    await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))
    await bench.hypervisor.detach_disk(bench.permit, "one", "v1")
    await bench.hypervisor.attach_disk(bench.permit, "two", bench.host.disk("v1"))
    assert "v1" in (await bench.hypervisor.inspect("two")).disks
