"""What a worker owes its request however early it is stopped."""

from __future__ import annotations

import asyncio

import pytest

from interlock.core import lifecycle
from interlock.core.admission import admit
from interlock.core.operations import Lane, Operation
from interlock.core.records import Change, Instance, Request, Status, Submission
from interlock.driver.work import Work
from interlock.driver.worker import Worker
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Hangs, Method
from interlock.testing.embedded import Embedded, admitted
from interlock.testing.virtual_time import settle

O = Operation  # noqa: E741


async def _taken(fleet: Embedded, vm: str) -> tuple[Instance, Request]:
    """A start that was admitted and taken, told to nobody, so that no driver sees to it."""
    submission = Submission(request_id="start", operation=O.START, requested_by="tester")

    def decide(instance: Instance, now_ms: int) -> Change[tuple[Instance, Request | None]]:
        asked = admit(instance, submission, fleet.server.policy, now_ms).instance
        change = lifecycle.take(asked, Lane.STATE, now_ms)
        return Change(instance=change.instance, requests=change.requests, answer=(change.instance, change.answer))

    instance, taken = await fleet.server.store.change(vm, decide)
    assert taken is not None
    return instance, taken


@pytest.mark.parametrize("how", ["interrupt", "supersede"])
async def test_a_worker_that_is_stopped_before_its_first_step_still_ends_its_request(fleet: Embedded, how: str) -> None:
    """A task cancelled before its first step never runs; its request would have stayed in flight without anybody."""
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)
    server = fleet.server
    work = Work(server.means, instance, taken)
    worker = Worker(work, server.in_force, lambda: None)
    getattr(worker, how)()
    await worker.wait(5)
    ended = await server.store.request(taken.id)
    assert ended is not None
    assert ended.status is Status.CANCELLED


@pytest.mark.parametrize("turns", range(5))
async def test_a_worker_is_stopped_also_together_with_news(fleet: Embedded, host: SimulatedHost, turns: int) -> None:
    """Found by an attach that was superseded, went on when the guest thawed, and claimed its volume once more."""
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)
    host.faults.script(vm, Method.POWER_ON, Hangs())
    worker = Worker(Work(fleet.server.means, instance, taken), fleet.server.in_force, lambda: None)
    await fleet.until_event(vm, "request.unknown")
    await settle()
    worker.work.news.set()
    for _ in range(turns):
        await asyncio.sleep(0)  # one turn of the loop, for each order in which the two can come
    worker.supersede()
    await worker.wait(5)
    assert worker.done


async def test_a_key_keeps_its_answer_when_its_volume_has_gone_elsewhere_since(fleet: Embedded) -> None:
    """Found under load: the second attach with the same key was told that the volume was in use."""
    from interlock.service.wishes import NewRequest

    one, two = await fleet.create("one"), await fleet.create("two")
    volume = await fleet.make_volume("shared")
    wish = NewRequest(operation=O.ATTACH_VOLUME, parameters={"volume": volume.id})
    first = admitted(await fleet.server.instances.submit(fleet.caller, one, wish, "key"))
    await fleet.ended(first)
    await fleet.carry_out(one, O.DETACH_VOLUME, volume=volume.id)
    await fleet.carry_out(two, O.ATTACH_VOLUME, volume=volume.id)
    again = admitted(await fleet.server.instances.submit(fleet.caller, one, wish, "key"))
    assert again.id == first.id
