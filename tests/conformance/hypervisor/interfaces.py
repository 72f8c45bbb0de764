"""The hypervisor's promises about network interfaces beyond the first."""

from __future__ import annotations

import msgspec

from conformance.hypervisor.harness import Bench, GivenPermit, check, raises
from interlock.core.errors import Fenced, GuestNotFound, OperationRejected
from interlock.core.networks import mac_of
from interlock.core.records import Interface
from interlock.core.specs import PRIMARY
from interlock.core.states import PowerState

FIRST = Interface(id="n1", mac="52:54:00:00:00:01")
SECOND = Interface(id="n2", mac="52:54:00:00:00:02")


async def seen(bench: Bench) -> set[str]:
    return set((await bench.hypervisor.inspect("one")).interfaces)


@check
async def attaching_an_interface_is_seen_and_converges(bench: Bench) -> None:
    await bench.start()
    assert await seen(bench) == set()
    for _ in range(2):
        await bench.hypervisor.attach_interface(bench.permit, "one", FIRST)
        assert (await bench.hypervisor.inspect("one")).interfaces == ("n1",)


@check
async def detaching_an_interface_is_seen_and_converges(bench: Bench) -> None:
    await bench.start()
    for interface in (FIRST, SECOND):
        await bench.hypervisor.attach_interface(bench.permit, "one", interface)
    for _ in range(2):
        await bench.hypervisor.detach_interface(bench.permit, "one", "n1")
        assert await seen(bench) == {"n2"}
    await bench.hypervisor.attach_interface(bench.permit, "one", FIRST)
    assert await seen(bench) == {"n1", "n2"}


@check
async def power_on_starts_with_the_interfaces_of_the_spec(bench: Bench) -> None:
    await bench.start(spec=msgspec.structs.replace(bench.spec, interfaces=(FIRST, SECOND)))
    assert await seen(bench) == {"n1", "n2"}
    await bench.hypervisor.detach_interface(bench.permit, "one", "n2")
    assert await seen(bench) == {"n1"}
    assert await bench.power() is PowerState.RUNNING


@check
async def interfaces_are_found_again_by_who_comes_after(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.attach_interface(bench.permit, "one", FIRST)
    await bench.abandon()
    await bench.open()
    assert await seen(bench) == {"n1"}
    await bench.hypervisor.power_off(bench.permit, "one")
    assert await seen(bench) == set()


@check
async def updating_interfaces_converges_and_keeps_them(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.attach_interface(bench.permit, "one", FIRST)
    primary = Interface(id=PRIMARY, mac=mac_of("one"))
    for _ in range(2):
        await bench.hypervisor.update_interface(bench.permit, "one", primary, ())
        await bench.hypervisor.update_interface(bench.permit, "one", FIRST, ())
    assert await seen(bench) == {"n1"}
    async with raises(OperationRejected):
        await bench.hypervisor.update_interface(bench.permit, "one", SECOND, ())
    await bench.hypervisor.power_off(bench.permit, "one")
    async with raises(GuestNotFound):
        await bench.hypervisor.update_interface(bench.permit, "one", primary, ())


@check
async def interfaces_need_a_guest_that_runs(bench: Bench) -> None:
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    async with raises(GuestNotFound):
        await bench.hypervisor.attach_interface(bench.permit, "one", FIRST)
    async with raises(GuestNotFound):
        await bench.hypervisor.detach_interface(bench.permit, "one", "n1")


@check
async def a_revoked_permit_has_no_effect_on_interfaces(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.attach_interface(bench.permit, "one", FIRST)
    permit = GivenPermit()
    permit.revoke()
    async with raises(Fenced):
        await bench.hypervisor.attach_interface(permit, "one", SECOND)
    async with raises(Fenced):
        await bench.hypervisor.detach_interface(permit, "one", "n1")
    assert await seen(bench) == {"n1"}
