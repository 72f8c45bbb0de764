"""The hypervisor's promises about a guest's memory: saved, gone on from, given up, dumped."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from conformance.hypervisor.harness import Bench, GivenPermit, check, raises
from interlock.core.errors import Fenced, GuestNotFound
from interlock.core.records import GuestEvent
from interlock.core.states import PowerState
from interlock.ports import Observation


class Progress:
    """A report that remembers what it was told.

    Args:
        then: what it does when it is told something.
    """

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.told: list[tuple[int, int | None]] = []
        self._then = then

    def __call__(self, done: int, total: int | None = None) -> None:
        self.told.append((done, total))
        self._then()


async def cancelled(bench: Bench, begin: Callable[[Progress], Awaitable[None]]) -> None:
    """Begin something and cancel it as it first tells how far it is, which may be too late."""
    begun: list[asyncio.Future[None]] = []

    def cancel() -> None:
        begun[0].cancel()

    begun.append(asyncio.ensure_future(begin(Progress(then=cancel))))
    await bench.in_time(asyncio.wait(begun))
    assert begun[0].cancelled()


def size_of(path: Path) -> int:
    return path.stat().st_size


def files_in(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


async def save(bench: Bench, instance_id: str = "one") -> None:
    await bench.in_time(bench.hypervisor.save_memory(bench.permit, instance_id, Progress()))


async def restore(bench: Bench, instance_id: str = "one") -> None:
    await bench.in_time(bench.hypervisor.restore_memory(bench.permit, instance_id, bench.spec, Progress()))


async def is_saved(bench: Bench, instance_id: str = "one") -> bool:
    return (await bench.hypervisor.inspect(instance_id)).memory_saved


# -------------------------------------------------------------------------------------------------- saving


@check
async def what_was_saved_is_seen_and_nothing_holds_the_guest(bench: Bench) -> None:
    await bench.start()
    assert not await is_saved(bench)
    await save(bench)
    saved = Observation(defined=True, power_state=PowerState.NONE, memory_saved=True)
    assert await bench.hypervisor.inspect("one") == saved
    assert bench.told.kinds() == [], "an end that was asked for is no news"


@check
async def saving_twice_is_saving_once(bench: Bench) -> None:
    await bench.start()
    await save(bench)
    await save(bench)
    assert await is_saved(bench)


@check
async def saving_tells_how_far_it_is(bench: Bench) -> None:
    await bench.start()
    progress = Progress()
    await bench.in_time(bench.hypervisor.save_memory(bench.permit, "one", progress))
    done, total = progress.told[-1]
    assert done == total
    assert total
    assert [done for done, _ in progress.told] == sorted(done for done, _ in progress.told)


@check
async def saving_needs_a_guest_that_runs(bench: Bench) -> None:
    async with raises(GuestNotFound):
        await save(bench)
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    async with raises(GuestNotFound):
        await save(bench)
    await bench.start()
    await bench.host.guest_panic("one")
    await bench.expect(GuestEvent.CRASHED)
    async with raises(GuestNotFound):
        await save(bench)
    assert not await is_saved(bench)
    assert await bench.power() is PowerState.CRASHED


@check
async def a_cancelled_saving_leaves_the_guest_as_it_was(bench: Bench) -> None:
    """Cancelled wherever it is as it first tells how far it is; what was too late is whole."""
    await bench.start()
    for state in (PowerState.RUNNING, PowerState.PAUSED):
        if state is PowerState.PAUSED:
            await bench.hypervisor.pause(bench.permit, "one")
        incarnation = await bench.host.incarnation("one")
        await cancelled(bench, lambda progress: bench.hypervisor.save_memory(bench.permit, "one", progress))
        seen = await bench.hypervisor.inspect("one")
        if seen.memory_saved:
            assert seen.power_state is PowerState.NONE
            await restore(bench)
            continue
        assert seen.power_state is state
        assert await bench.host.incarnation("one") == incarnation
    assert bench.told.kinds() == []


@check
async def saving_needs_a_permit_at_every_moment(bench: Bench) -> None:
    await bench.start()
    lost = GivenPermit()

    async with raises(Fenced):
        await bench.in_time(bench.hypervisor.save_memory(lost, "one", Progress(then=lost.revoke)))
    assert not await is_saved(bench)
    async with raises(Fenced):
        await bench.hypervisor.save_memory(lost, "one", Progress())
    await bench.hypervisor.unpause(bench.permit, "one")
    assert await bench.power() is PowerState.RUNNING


@check
async def a_guest_that_is_killed_while_it_is_saved_is_not_saved(bench: Bench) -> None:
    await bench.start()
    await bench.host.freeze("one")
    saving = asyncio.ensure_future(bench.hypervisor.save_memory(bench.permit, "one", Progress()))
    await bench.host.kill("one")
    async with raises(GuestNotFound):
        await bench.in_time(saving)
    assert not await is_saved(bench)
    await bench.expect(GuestEvent.VANISHED)


# ---------------------------------------------------------------------------------------------- going on from it


@check
async def a_restored_guest_runs_and_nothing_is_saved_any_more(bench: Bench) -> None:
    await bench.start()
    before = await bench.hypervisor.inspect("one")
    await save(bench)
    await restore(bench)
    assert await bench.hypervisor.inspect("one") == before
    await bench.host.until_up("one")
    await bench.hypervisor.press_power_button(bench.permit, "one")
    await bench.expect(GuestEvent.STOPPED)
    assert bench.told.kinds() == [GuestEvent.STOPPED]


@check
async def restoring_twice_starts_one_guest(bench: Bench) -> None:
    await bench.start()
    await save(bench)
    await restore(bench)
    incarnation = await bench.host.incarnation("one")
    await restore(bench)
    assert await bench.host.incarnation("one") == incarnation
    assert await bench.power() is PowerState.RUNNING


@check
async def a_guest_that_was_paused_runs_when_it_is_restored(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.pause(bench.permit, "one")
    await save(bench)
    await restore(bench)
    assert await bench.power() is PowerState.RUNNING


@check
async def a_guest_can_be_saved_again_and_again(bench: Bench) -> None:
    await bench.start()
    for _ in range(3):
        await save(bench)
        await restore(bench)
    assert await bench.power() is PowerState.RUNNING
    await bench.host.until_up("one")


@check
async def restoring_needs_something_saved(bench: Bench) -> None:
    async with raises(GuestNotFound):
        await restore(bench)
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    async with raises(GuestNotFound):
        await restore(bench)
    assert await bench.power() is PowerState.NONE


@check
async def a_guest_is_restored_with_its_disks(bench: Bench) -> None:
    """Also those that were plugged in and out meanwhile, so that they are in other places than at first."""
    bench.spec = msgspec.structs.replace(bench.spec, disks=(bench.host.disk("v1"), bench.host.disk("v2")))
    await bench.start()
    await bench.hypervisor.detach_disk(bench.permit, "one", "v1")
    await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v3"))
    bench.spec = msgspec.structs.replace(bench.spec, disks=(bench.host.disk("v2"), bench.host.disk("v3")))
    before = await bench.hypervisor.inspect("one")
    await save(bench)
    await restore(bench)
    assert await bench.hypervisor.inspect("one") == before
    await bench.hypervisor.detach_disk(bench.permit, "one", "v2")
    assert "v2" not in (await bench.hypervisor.inspect("one")).disks


@check
async def a_saved_memory_outlives_an_adapter(bench: Bench) -> None:
    await bench.start()
    await save(bench)
    await bench.abandon()
    assert await bench.open() == []
    assert await is_saved(bench)
    await restore(bench)
    assert await bench.power() is PowerState.RUNNING
    await bench.abandon()
    assert await bench.open() == []
    assert not await is_saved(bench)
    assert await bench.power() is PowerState.RUNNING


# -------------------------------------------------------------------------------------------------- giving it up


@check
async def a_memory_that_is_given_up_is_gone(bench: Bench) -> None:
    await bench.hypervisor.forget_memory(bench.permit, "one")
    await bench.start()
    await save(bench)
    for _ in range(2):
        await bench.hypervisor.forget_memory(bench.permit, "one")
        assert not await is_saved(bench)
    async with raises(GuestNotFound):
        await restore(bench)


@check
async def giving_up_the_memory_does_not_disturb_a_guest(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.forget_memory(bench.permit, "one")
    assert await bench.power() is PowerState.RUNNING


@check
async def power_on_gives_the_saved_memory_up(bench: Bench) -> None:
    await bench.start()
    await save(bench)
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    assert await bench.power() is PowerState.RUNNING
    assert not await is_saved(bench)
    await bench.host.until_up("one")
    await bench.hypervisor.power_off(bench.permit, "one")
    async with raises(GuestNotFound):
        await restore(bench)


@check
async def power_off_keeps_the_saved_memory(bench: Bench) -> None:
    await bench.start()
    await save(bench)
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    assert await is_saved(bench)


@check
async def undefine_gives_the_saved_memory_up(bench: Bench) -> None:
    await bench.start()
    await save(bench)
    await bench.hypervisor.undefine(bench.permit, "one")
    assert await bench.host.remains("one") == []
    assert await bench.hypervisor.inspect("one") == Observation(defined=False, power_state=PowerState.NONE)


# ------------------------------------------------------------------------------------------------------- dumping


@check
async def a_dump_is_there_and_the_guest_is_what_it_was(bench: Bench) -> None:
    await bench.start()
    with tempfile.TemporaryDirectory() as folder:
        for number, state in enumerate((PowerState.RUNNING, PowerState.PAUSED, PowerState.CRASHED)):
            if state is PowerState.PAUSED:
                await bench.hypervisor.pause(bench.permit, "one")
            if state is PowerState.CRASHED:
                await bench.hypervisor.unpause(bench.permit, "one")
                await bench.host.guest_panic("one")
                await bench.expect(GuestEvent.CRASHED)
            target, progress = Path(folder, str(number)), Progress()
            for _ in range(2):
                await bench.in_time(bench.hypervisor.dump_memory(bench.permit, "one", target, progress))
            assert size_of(target) > 0
            assert progress.told[-1][0] == progress.told[-1][1]
            assert await bench.power() is state
        assert files_in(folder) == {"0", "1", "2"}
    assert bench.told.kinds() == [GuestEvent.CRASHED]


@check
async def a_dump_needs_a_guest_and_a_permit(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "dump")
        async with raises(GuestNotFound):
            await bench.hypervisor.dump_memory(bench.permit, "one", target, Progress())
        await bench.start()
        lost = GivenPermit()
        lost.revoke()
        async with raises(Fenced):
            await bench.hypervisor.dump_memory(lost, "one", target, Progress())
        assert files_in(folder) == set()
    assert await bench.power() is PowerState.RUNNING


@check
async def a_dump_that_is_cancelled_leaves_no_file(bench: Bench) -> None:
    await bench.start()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "dump")
        await cancelled(bench, lambda progress: bench.hypervisor.dump_memory(bench.permit, "one", target, progress))
        assert files_in(folder) <= {"dump"}
        # Another one finds nothing in its way.
        await bench.in_time(bench.hypervisor.dump_memory(bench.permit, "one", target, Progress()))
        assert files_in(folder) == {"dump"}
    assert await bench.power() is PowerState.RUNNING
