"""What a store promises of the policies that were in force."""

from __future__ import annotations

from msgspec.structs import replace

from conformance.store.harness import START_MS, Bench, check
from interlock.core.policy_switches import Outstanding, PolicyBundle, PolicySwitch, SwitchSource

BUNDLE = PolicyBundle(main="site.toml", files={"site.toml": "# Größe\n", "base/base.toml": "\tx = 'ü'\r\n"})
SWITCH = PolicySwitch(
    digest="d" * 64,
    name="site",
    at_ms=START_MS,
    by="root",
    source=SwitchSource.LOADED,
    configured_digest="c" * 64,
    outstanding=Outstanding.REJUDGE,
)


@check
async def a_switch_of_the_policy_is_durable_with_its_text(bench: Bench) -> None:
    assert await bench.store.policies.switches(10) == ()
    number = await bench.store.policies.switch(SWITCH, BUNDLE)
    async with bench.power_cut() as found:
        assert await found.policies.switches(10) == (replace(SWITCH, number=number),)
        assert await found.policies.bundle(number) == BUNDLE
    await bench.reopen()
    assert await bench.store.policies.bundle(number) == BUNDLE
    assert await bench.store.policies.bundle(number + 1) is None


@check
async def switches_are_told_newest_first_and_never_forgotten(bench: Bench) -> None:
    other = PolicyBundle(main="site.toml", files={"site.toml": "another"})
    numbers = [
        await bench.store.policies.switch(replace(SWITCH, at_ms=START_MS + place), bundle)
        for place, bundle in enumerate((BUNDLE, other, BUNDLE))
    ]
    assert numbers == sorted(set(numbers))
    switches = await bench.store.policies.switches(10)
    assert [switch.number for switch in switches] == numbers[::-1]
    assert [switch.at_ms for switch in switches] == [START_MS + 2, START_MS + 1, START_MS]
    assert [await bench.store.policies.bundle(number) for number in numbers] == [BUNDLE, other, BUNDLE]
    assert await bench.store.policies.switches(1) == switches[:1]
    assert await bench.store.policies.switches(10, before=numbers[1]) == switches[2:]


@check
async def a_switch_is_settled_once_all_was_judged_again(bench: Bench) -> None:
    first = await bench.store.policies.switch(SWITCH, BUNDLE)
    second = await bench.store.policies.switch(SWITCH, BUNDLE)
    await bench.store.policies.settle(second, 3)
    async with bench.power_cut() as found:
        assert [switch.cancelled for switch in await found.policies.switches(2)] == [3, None]
    await bench.store.policies.settle(first, 0)
    assert [switch.cancelled for switch in await bench.store.policies.switches(2)] == [3, 0]
