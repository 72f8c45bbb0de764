"""The hypervisor's promises about root disks, and about a disk that is swapped under a guest."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from conformance.hypervisor.harness import Bench, GivenPermit, check, raises
from conformance.hypervisor.memory import Progress, cancelled
from interlock.core.errors import Fenced, GuestNotFound, OperationRejected
from interlock.core.records import Spec
from interlock.core.states import PowerState


def with_root(bench: Bench, number: int = 0, gib: int = 1, *, whole: bool = False) -> Spec:
    return msgspec.structs.replace(bench.spec, root_gib=gib, root=number, root_is_whole=whole)


async def marked(bench: Bench, mark: int) -> Spec:
    """Define an instance, and write on its root disk."""
    spec = with_root(bench)
    await bench.hypervisor.define(bench.permit, "one", spec)
    await bench.host.mark_root(spec, "one", mark)
    return spec


async def copy(bench: Bench, old: Spec, new: Spec) -> None:
    await bench.in_time(bench.hypervisor.copy_root_disk(bench.permit, "one", old, new, Progress()))


def names_in(folder: str) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]


# ----------------------------------------------------------------------------------------------------- by number


@check
async def define_makes_a_root_disk_and_never_makes_it_again(bench: Bench) -> None:
    spec = await marked(bench, 7)
    await bench.hypervisor.define(bench.permit, "one", spec)
    await bench.hypervisor.define(bench.permit, "one", with_root(bench, gib=5))
    assert await bench.host.root_mark(spec, "one") == 7


@check
async def a_root_disk_that_was_made_and_is_missing_is_not_made_again(bench: Bench) -> None:
    spec = await marked(bench, 7)
    made = msgspec.structs.replace(spec, root_made=True)
    await bench.hypervisor.define(bench.permit, "one", made)
    assert await bench.host.root_mark(made, "one") == 7
    await bench.hypervisor.drop_root_disks(bench.permit, "one", spec, frozenset())
    async with raises(OperationRejected):
        await bench.hypervisor.define(bench.permit, "one", made)
    async with raises(OperationRejected):
        await bench.hypervisor.power_on(bench.permit, "one", made)
    async with raises(OperationRejected):
        await copy(bench, made, with_root(bench, 1))
    assert await bench.host.root_mark(made, "one") is None
    await bench.start(spec=spec)


@check
async def each_number_is_a_root_disk_of_its_own(bench: Bench) -> None:
    spec, other = await marked(bench, 7), with_root(bench, 3)
    await bench.hypervisor.define(bench.permit, "one", other)
    assert await bench.host.root_mark(other, "one") == 0
    assert await bench.host.root_mark(spec, "one") == 7
    await bench.start(spec=other)
    assert "root" in (await bench.hypervisor.inspect("one")).disks


@check
async def only_the_numbers_that_are_named_are_kept(bench: Bench) -> None:
    spec, other = await marked(bench, 7), with_root(bench, 3)
    await bench.hypervisor.define(bench.permit, "one", other)
    for _ in range(2):
        await bench.hypervisor.drop_root_disks(bench.permit, "one", other, frozenset({3}))
        assert await bench.host.root_mark(spec, "one") is None
        assert await bench.host.root_mark(other, "one") == 0


@check
async def a_root_disk_that_a_guest_has_is_not_removed(bench: Bench) -> None:
    await bench.start(spec=with_root(bench))
    async with raises(OperationRejected):
        await bench.hypervisor.drop_root_disks(bench.permit, "one", with_root(bench), frozenset())
    assert "root" in (await bench.hypervisor.inspect("one")).disks


# -------------------------------------------------------------------------------------------------------- copies


@check
async def a_copy_holds_what_was_there_and_is_made_once(bench: Bench) -> None:
    old, new = await marked(bench, 7), with_root(bench, 1, gib=2)
    await copy(bench, old, new)
    await bench.host.mark_root(old, "one", 8)
    await copy(bench, old, new)
    assert (await bench.host.root_mark(old, "one"), await bench.host.root_mark(new, "one")) == (8, 7)
    await bench.start(spec=new)


@check
async def a_copy_that_would_be_smaller_is_refused(bench: Bench) -> None:
    old, new = with_root(bench, gib=2), with_root(bench, 1, gib=1)
    await bench.hypervisor.define(bench.permit, "one", old)
    async with raises(OperationRejected):
        await copy(bench, old, new)
    assert await bench.host.root_mark(new, "one") is None


@check
async def a_revoked_permit_has_no_effect_on_root_disks(bench: Bench) -> None:
    old, new, permit = await marked(bench, 7), with_root(bench, 1), GivenPermit()
    permit.revoke()
    with tempfile.TemporaryDirectory() as folder:
        async with raises(Fenced):
            await bench.hypervisor.copy_root_disk(permit, "one", old, new, Progress())
        async with raises(Fenced):
            await bench.hypervisor.drop_root_disks(permit, "one", old, frozenset())
        async with raises(Fenced):
            await bench.hypervisor.export_root_disk(permit, "one", old, Path(folder, "export"), Progress())
        assert names_in(folder) == []
    assert (await bench.host.root_mark(old, "one"), await bench.host.root_mark(new, "one")) == (7, None)


# ------------------------------------------------------------------------------------------------------- exports


@check
async def a_root_disk_can_be_made_of_an_export(bench: Bench) -> None:
    old, new = await marked(bench, 7), with_root(bench, 1, whole=True)
    with tempfile.TemporaryDirectory() as folder:
        target, progress = Path(folder, "export.qcow2"), Progress()
        await bench.in_time(bench.hypervisor.export_root_disk(bench.permit, "one", old, target, progress))
        assert progress.told[-1][0] == progress.told[-1][1]
        assert names_in(folder) == ["export.qcow2"]
        await bench.hypervisor.undefine(bench.permit, "one")
        for _ in range(2):
            await bench.in_time(bench.hypervisor.root_disk_from(bench.permit, "one", new, target, Progress()))
    assert await bench.host.root_mark(new, "one") == 7
    await bench.start(spec=new)


@check
async def a_root_disk_that_stands_by_itself_is_not_made_up(bench: Bench) -> None:
    async with raises(OperationRejected):
        await bench.hypervisor.define(bench.permit, "one", with_root(bench, 1, whole=True))


@check
async def the_guest_goes_on_while_its_disk_is_exported(bench: Bench) -> None:
    spec = await marked(bench, 7)
    await bench.start(spec=spec)
    incarnation, before = await bench.host.incarnation("one"), await bench.hypervisor.inspect("one")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "export.qcow2")
        await bench.in_time(bench.hypervisor.export_root_disk(bench.permit, "one", spec, target, Progress()))
        assert names_in(folder) == ["export.qcow2"]
        assert await bench.hypervisor.inspect("one") == before
        assert await bench.host.incarnation("one") == incarnation
        new = with_root(bench, 1, whole=True)
        await bench.in_time(bench.hypervisor.root_disk_from(bench.permit, "two", new, target, Progress()))
        assert await bench.host.root_mark(new, "two") == 7


@check
async def an_export_that_was_cancelled_is_whole_or_not_there(bench: Bench) -> None:
    spec = await marked(bench, 7)
    await bench.start(spec=spec)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "export.qcow2")
        await cancelled(
            bench,
            lambda progress: bench.hypervisor.export_root_disk(bench.permit, "one", spec, target, progress),
        )
        assert names_in(folder) in ([], ["export.qcow2"])
        assert await bench.power() is PowerState.RUNNING
        await bench.in_time(bench.hypervisor.export_root_disk(bench.permit, "one", spec, target, Progress()))
        assert names_in(folder) == ["export.qcow2"]


@check
async def what_cannot_be_written_to_is_refused(bench: Bench) -> None:
    spec = await marked(bench, 7)
    target = Path("/no-such-folder/export.qcow2")
    async with raises(OperationRejected):
        await bench.in_time(bench.hypervisor.export_root_disk(bench.permit, "one", spec, target, Progress()))


# ------------------------------------------------------------------------------------------------------- rescues


@check
async def a_rescued_guest_has_its_own_disk_beside_what_it_boots(bench: Bench) -> None:
    spec = await marked(bench, 7)
    rescued = msgspec.structs.replace(spec, rescue_image=bench.spec.image)
    await bench.start(spec=rescued)
    assert "root" in (await bench.hypervisor.inspect("one")).disks
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.start(spec=spec)
    assert (await bench.hypervisor.inspect("one")).disks == ("root",)
    assert await bench.host.root_mark(spec, "one") == 7


# --------------------------------------------------------------------------------------------------------- swaps


@check
async def a_swap_is_seen_and_converges(bench: Bench) -> None:
    old, new = bench.host.disk("v1"), bench.host.disk("v2")
    await bench.start(spec=msgspec.structs.replace(bench.spec, disks=(old,)))
    incarnation = await bench.host.incarnation("one")
    for _ in range(2):
        await bench.in_time(bench.hypervisor.swap_disk(bench.permit, "one", old, new, Progress()))
        seen = (await bench.hypervisor.inspect("one")).disks
        assert ("v1" in seen, "v2" in seen) == (False, True)
    assert await bench.host.incarnation("one") == incarnation


@check
async def what_was_swapped_out_can_be_attached_again_and_what_was_swapped_in_detached(bench: Bench) -> None:
    old, new = bench.host.disk("v1"), bench.host.disk("v2")
    await bench.start()
    await bench.hypervisor.attach_disk(bench.permit, "one", old)
    await bench.in_time(bench.hypervisor.swap_disk(bench.permit, "one", old, new, Progress()))
    await bench.hypervisor.attach_disk(bench.permit, "one", old)
    assert {"v1", "v2"} <= set((await bench.hypervisor.inspect("one")).disks)
    await bench.hypervisor.detach_disk(bench.permit, "one", "v2")
    seen = (await bench.hypervisor.inspect("one")).disks
    assert ("v1" in seen, "v2" in seen) == (True, False)


@check
async def a_swap_that_was_cancelled_leaves_one_of_the_disks(bench: Bench) -> None:
    old, new = bench.host.disk("v1"), bench.host.disk("v2")
    await bench.start(spec=msgspec.structs.replace(bench.spec, disks=(old,)))
    await cancelled(bench, lambda progress: bench.hypervisor.swap_disk(bench.permit, "one", old, new, progress))
    assert len({"v1", "v2"} & set((await bench.hypervisor.inspect("one")).disks)) == 1
    await bench.in_time(bench.hypervisor.swap_disk(bench.permit, "one", old, new, Progress()))
    assert {"v1", "v2"} & set((await bench.hypervisor.inspect("one")).disks) == {"v2"}


@check
async def a_swap_of_what_is_not_there_is_refused(bench: Bench) -> None:
    old, new = bench.host.disk("v1"), bench.host.disk("v2")
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    async with raises(GuestNotFound):
        await bench.hypervisor.swap_disk(bench.permit, "one", old, new, Progress())
    await bench.start()
    async with raises(OperationRejected):
        await bench.hypervisor.swap_disk(bench.permit, "one", old, new, Progress())
    assert not {"v1", "v2"} & set((await bench.hypervisor.inspect("one")).disks)


@check
async def a_revoked_permit_swaps_nothing(bench: Bench) -> None:
    old, new, permit = bench.host.disk("v1"), bench.host.disk("v2"), GivenPermit()
    await bench.start(spec=msgspec.structs.replace(bench.spec, disks=(old,)))
    before = await bench.hypervisor.inspect("one")
    permit.revoke()
    async with raises(Fenced):
        await bench.in_time(bench.hypervisor.swap_disk(permit, "one", old, new, Progress()))
    assert await bench.hypervisor.inspect("one") == before


@check
async def a_disk_that_a_guest_has_is_not_copied_at_rest(bench: Bench) -> None:
    old, new = bench.host.disk("v1"), bench.host.disk("v2")
    await bench.in_time(bench.hypervisor.copy_disk(bench.permit, "one", old, new, Progress()))
    await bench.start(spec=msgspec.structs.replace(bench.spec, disks=(old,)))
    async with raises(OperationRejected):
        await bench.in_time(bench.hypervisor.copy_disk(bench.permit, "one", old, new, Progress()))
    async with raises(OperationRejected):
        await bench.in_time(bench.hypervisor.copy_disk(bench.permit, "one", new, old, Progress()))
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.in_time(bench.hypervisor.copy_disk(bench.permit, "one", old, new, Progress()))


@check
async def a_revoked_permit_copies_nothing(bench: Bench) -> None:
    permit = GivenPermit()
    permit.revoke()
    async with raises(Fenced):
        await bench.hypervisor.copy_disk(permit, "one", bench.host.disk("v1"), bench.host.disk("v2"), Progress())
