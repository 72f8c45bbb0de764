"""Quotas of projects: what is used, what is refused, and that two who ask at once cannot both get the last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from in_process.embedded import IMAGE, Embedded, admitted
from interlock.core.errors import InUse, Invalid, NotFound, QuotaExceeded
from interlock.core.operations import Operation
from interlock.core.quotas import Quota
from interlock.core.records import Denied
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Hangs, Method
from interlock.ports import InstanceFilter
from interlock.service.auth import Caller
from interlock.service.request_models import NewInstance, NewRequest, NewVolume
from interlock.service.submission_results import SubmissionResult

pytestmark = pytest.mark.virtual_time

O = Operation  # noqa: E741


class Tenant(Embedded):
    """A server, and a member of the project `research`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SimulatedHost())
        self.admin = self.caller
        self.caller = Caller(token_id="ann", name="ann", role=Role.MEMBER, project="research")

    async def start(self) -> None:
        await super().start()
        if not self.server.projects.exists("research"):
            await self.server.projects.create(self.admin, "research", Quota())

    async def limit(self, **limits: int | None) -> None:
        await self.server.projects.limit(self.admin, "research", limits)

    async def make(self, name: str, *, start: bool = False, **fields: Any) -> SubmissionResult:
        new = NewInstance(name=name, image=IMAGE.name, start=start, **fields)
        return await self.server.instances.create(self.caller, new)

    @property
    def used(self) -> dict[str, int]:
        """What the project uses, without what it uses nothing of."""
        return {what: amount for what, amount in self.server.capacity.quotas.used("research").items() if amount}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Tenant]:
    house = Tenant(tmp_path / "data")
    await house.start()
    yield house
    await house.crash()


async def test_what_exceeds_a_quota_is_refused_with_what_is_used_and_left_and_nothing_is_made(house: Tenant) -> None:
    await house.limit(vcpus=4, memory_mib=512)
    await house.make("one", vcpus=3)
    with pytest.raises(QuotaExceeded) as refused:
        await house.make("two", vcpus=2, memory_mib=512)
    error = refused.value
    assert error.message == (
        "two exceeds the quota of the project research: 3 of 4 vCPUs are used, 1 left, 2 more needed; "
        "128 of 512 MiB of memory are used, 384 left, 512 more needed."
    )
    assert (error.needed, error.used, error.limit, error.free) == (
        {"vcpus": 2, "memory_mib": 512},
        {"vcpus": 3, "memory_mib": 128},
        {"vcpus": 4, "memory_mib": 512},
        {"vcpus": 1, "memory_mib": 384},
    )
    assert house.used == {"instances": 1, "vcpus": 3, "memory_mib": 128}
    await house.make("two", vcpus=1)


async def test_of_many_who_ask_at_once_only_as_many_get_something_as_there_is(house: Tenant) -> None:
    await house.limit(instances=3, volumes=2)
    asked = [house.make(f"vm-{number}", start=True) for number in range(12)]
    asked += [house.server.inventory.make_volume(house.caller, NewVolume(name=f"v{n}", size_mib=1)) for n in range(8)]  # type: ignore[misc]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, QuotaExceeded)]
    assert len(answers) - len(refused) == 3 + 2
    for answer in answers:
        if isinstance(answer, SubmissionResult):
            await house.ended(admitted(answer))
    found = await house.server.store.instances(InstanceFilter(project="research"), 100)
    assert (len(found.items), len(await house.server.store.volumes.all("research"))) == (3, 2)


async def test_a_quota_of_one_project_does_not_bind_another(house: Tenant) -> None:
    await house.limit(instances=0)
    with pytest.raises(QuotaExceeded):
        await house.make("one")
    answer = await house.server.instances.create(house.admin, NewInstance(name="one", image=IMAGE.name, start=False))
    assert answer.instance.project == "default"


async def test_a_resize_is_judged_by_what_it_adds_and_counts_at_once(house: Tenant) -> None:
    await house.limit(vcpus=4)
    answer = await house.make("one", start=True)
    await house.ended(admitted(answer))
    with pytest.raises(QuotaExceeded, match="1 of 4 vCPUs are used, 3 left, 4 more needed"):
        await house.submit("one", O.RESIZE, vcpus=5)
    resize = admitted(await house.submit("one", O.RESIZE, vcpus=4))
    assert house.used["vcpus"] == 4
    with pytest.raises(QuotaExceeded):
        await house.make("two")
    await house.ended(resize)
    await house.carry_out("one", O.REVERT_RESIZE)
    assert house.used["vcpus"] == 1
    await house.make("two")


async def test_a_vm_that_is_shelved_away_gives_its_resources_back_and_needs_them_to_return(house: Tenant) -> None:
    await house.limit(memory_mib=128)
    answer = await house.make("one", start=True)
    await house.ended(admitted(answer))
    await house.carry_out("one", O.SHELVE)
    await house.carry_out("one", O.SHELVE_OFFLOAD)
    assert house.used == {"instances": 1}
    await house.make("two")
    with pytest.raises(QuotaExceeded, match="one exceeds the quota of the project research"):
        await house.submit("one", O.UNSHELVE)
    found = await house.server.instances.allowed(house.caller, "one")
    denied = found[1][O.UNSHELVE]
    assert isinstance(denied, Denied), "what is allowed does not fail on what could be known"
    assert (denied.reason, "quota" in (denied.because or "")) == ("quota", True)


async def test_a_soft_deleted_vm_counts_until_it_is_deleted_so_that_it_can_be_restored(house: Tenant) -> None:
    await house.limit(instances=1)
    answer = await house.make("one", start=True)
    await house.ended(admitted(answer))
    await house.carry_out("one", O.SOFT_DELETE)
    with pytest.raises(QuotaExceeded):
        await house.make("two")
    await house.carry_out("one", O.RESTORE)
    await house.carry_out("one", O.DELETE)
    assert house.used == {}
    await house.make("two")


async def test_root_disks_and_volumes_share_the_quota_of_disk(house: Tenant) -> None:
    await house.limit(disk_mib=3 * 1024)
    await house.make("one", root_gib=2)
    with pytest.raises(
        QuotaExceeded, match=r"The volume data exceeds .* 2048 of 3072 MiB of disk are used, 1024 left, 2048 more"
    ):
        await house.server.inventory.make_volume(house.caller, NewVolume(name="data", size_mib=2048))
    await house.server.inventory.make_volume(house.caller, NewVolume(name="data", size_mib=1024))
    with pytest.raises(QuotaExceeded):
        await house.make("two", root_gib=1)
    await house.server.inventory.delete_volume(house.caller, "data")
    await house.make("two", root_gib=1)


async def test_snapshots_count_from_their_request_on(house: Tenant) -> None:
    await house.limit(images=1)
    for name in ("one", "two"):
        answer = await house.make(name, start=True, root_gib=1)
        await house.ended(admitted(answer))
        await house.carry_out(name, O.STOP)
    disk = msgspec.structs.replace(IMAGE, id="disk", name="disk", kind="disk", format="qcow2")
    await house.put_image(disk)
    for name in ("one", "two"):
        await house.carry_out(name, O.REBUILD, image="disk")
    snapshots = [house.submit(name, O.SNAPSHOT, name=f"of-{name}") for name in ("one", "two")]
    answers = await asyncio.gather(*snapshots, return_exceptions=True)
    (made,) = [answer for answer in answers if isinstance(answer, SubmissionResult)]
    (refused,) = [answer for answer in answers if isinstance(answer, QuotaExceeded)]
    assert refused.used == {"images": 1}
    assert (await house.ended(admitted(made))).status == "succeeded"
    assert house.used["images"] == 1
    with pytest.raises(QuotaExceeded):
        await house.submit("two", O.BACKUP, backup_type="daily", rotation=1)
    (image,) = [one for one in await house.server.inventory.images(house.caller) if one.project]
    await house.server.inventory.delete_image(house.caller, image.id)
    await house.submit("two", O.SNAPSHOT, name="again")


async def test_outstanding_requests_are_limited_and_a_delete_always_goes_through(house: Tenant) -> None:
    answer = await house.make("one", start=True)
    await house.ended(admitted(answer))
    await house.make("two")
    await house.limit(outstanding_requests=1)
    house.host.faults.script(answer.instance.id, Method.PAUSE, Hangs())
    await house.submit("one", O.PAUSE)
    with pytest.raises(QuotaExceeded, match="1 of 1 outstanding requests are used, 0 left, 1 more needed"):
        await house.submit("two", O.START)
    with pytest.raises(QuotaExceeded):
        await house.submit("one", O.UNPAUSE)
    assert (await house.carry_out("two", O.DELETE)).status == "succeeded"
    admitted(
        await house.server.instances.submit(
            msgspec.structs.replace(house.admin, project="research"), "one", NewRequest(operation=O.UNPAUSE)
        )
    )


async def test_held_requests_are_limited(house: Tenant) -> None:
    for name in ("one", "two"):
        answer = await house.make(name, start=True, blocked_operations=(O.PAUSE,))
        await house.ended(admitted(answer))
    await house.limit(held_requests=1)
    hold = NewRequest(operation=O.PAUSE, hold="1h")
    await house.server.instances.submit(house.caller, "one", hold)
    with pytest.raises(QuotaExceeded, match="1 of 1 held requests are used"):
        await house.server.instances.submit(house.caller, "two", hold)
    assert house.used["held_requests"] == 1


async def test_a_lowered_quota_leaves_what_there_is_and_refuses_more(house: Tenant) -> None:
    for name in ("one", "two"):
        answer = await house.make(name, start=True)
        await house.ended(admitted(answer))
    await house.limit(instances=1, vcpus=1)
    await house.carry_out("one", O.STOP)
    await house.carry_out("one", O.START)
    with pytest.raises(QuotaExceeded) as refused:
        await house.make("three")
    assert refused.value.free == {"instances": 0, "vcpus": 0}
    await house.limit(instances=None, vcpus=None)
    await house.make("three")


async def test_use_and_quotas_survive_a_restart(house: Tenant) -> None:
    await house.limit(instances=2)
    answer = await house.make("one", start=True, vcpus=2, root_gib=1, blocked_operations=(O.PAUSE,))
    await house.ended(admitted(answer))
    await house.server.inventory.make_volume(house.caller, NewVolume(name="data", size_mib=10))
    await house.server.instances.submit(house.caller, "one", NewRequest(operation=O.PAUSE, hold="1h"))
    before = house.used
    await house.crash()
    await house.start()
    assert house.used == before
    assert (before["disk_mib"], before["held_requests"]) == (1024 + 10, 1)
    await house.make("two")
    with pytest.raises(QuotaExceeded):
        await house.make("three")


# --------------------------------------------------------------------------------------------------------- projects


async def test_a_project_is_deleted_only_when_nothing_is_in_it(house: Tenant) -> None:
    projects, tokens = house.server.projects, house.server.tokens
    await tokens.make(house.admin, "ann", Role.MEMBER, "research")
    await house.make("one")
    await house.server.inventory.make_volume(house.caller, NewVolume(name="data", size_mib=10))
    with pytest.raises(InUse, match="The project research is not empty: it has 1 VM, 1 volume, 1 token"):
        await projects.delete(house.admin, "research")
    await house.make("two")
    for name in ("one", "two"):
        await house.carry_out(name, O.DELETE)
    await house.server.inventory.delete_volume(house.caller, "data")
    await tokens.delete(house.admin, "ann")
    await projects.delete(house.admin, "research")
    with pytest.raises(NotFound):
        projects.find(house.admin, "research")
    with pytest.raises(NotFound):
        await house.make("late")
    with pytest.raises(NotFound):
        await house.server.inventory.make_volume(house.caller, NewVolume(name="late", size_mib=10))


async def test_a_new_project_does_not_inherit_the_history_of_an_earlier_one_unasked(house: Tenant) -> None:
    projects = house.server.projects
    answer = await house.make("one", start=True)
    await house.ended(admitted(answer))
    assert (await house.carry_out("one", O.DELETE)).status == "succeeded"
    await house.until(answer.instance.id, vm_state=VmState.DELETED)
    await projects.delete(house.admin, "research")
    with pytest.raises(InUse, match="Records of VMs of an earlier project named research"):
        await projects.create(house.admin, "research", Quota())
    with pytest.raises(InUse):
        await house.server.tokens.make(house.admin, "ann", Role.MEMBER, "research")
    await projects.create(house.admin, "research", Quota(instances=1), with_history=True)
    await house.make("two")
    with pytest.raises(QuotaExceeded):
        await house.make("three")


async def test_the_project_of_the_servers_own_tokens_stays(house: Tenant) -> None:
    with pytest.raises(Invalid, match="The project default cannot be deleted"):
        await house.server.projects.delete(house.admin, "default")


async def test_a_token_and_the_deletion_of_its_project_do_not_cross(house: Tenant) -> None:
    """Either the token is there and the project stays, or the project is gone and comes back with the token."""
    made, deleted = await asyncio.gather(
        house.server.tokens.make(house.admin, "ann", Role.MEMBER, "research"),
        house.server.projects.delete(house.admin, "research"),
        return_exceptions=True,
    )
    assert not isinstance(made, BaseException)
    assert isinstance(deleted, InUse)
    assert house.server.projects.exists("research")
